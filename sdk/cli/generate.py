"""`edgecloud generate`: one answer, streamed as text or as one JSON object."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from edgecloud.cli.app import app
from edgecloud.cli.connection import (
    InsecureFlag,
    TlsCaOption,
    TlsCertOption,
    TlsFlag,
    TlsKeyOption,
    TokenFileOption,
    read_token,
    tls_of,
)
from edgecloud.cli.output import JsonFlag, print_json
from edgecloud.errors import ConfigError, EdgecloudError
from edgecloud.quality import CloudShare, Quality, Risk
from edgecloud.types import ExitScope, LossPolicy, ModeChoice, Objective, Preference


@app.command()
def generate(
    bundle: Annotated[Path, typer.Argument(help="Folder written by `edgecloud partition`.")],
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads standard input.")],
    cloud: Annotated[
        str | None, typer.Option(help="HOST:PORT of a verification service; several, separated by commas, stand in for each other.")
    ] = None,
    prefer: Annotated[Preference, typer.Option(help="Of several services: the first that works, or the nearest.")] = "order",
    mode: Annotated[ModeChoice, typer.Option(help="Who makes the tokens.")] = "auto",
    quality: Annotated[
        Literal["exact", "offline"] | None, typer.Option(help="exact: the cloud's own text. offline: the device's.")
    ] = None,
    risk: Annotated[
        float | None, typer.Option(help="Skip the cloud where at most this share differs from its choice, as calibrated: 0.05.")
    ] = None,
    cloud_share: Annotated[
        float | None, typer.Option(help="Send about this share of requests to the cloud, those of which the device is least sure.")
    ] = None,
    scope: Annotated[
        ExitScope | None,
        typer.Option(
            help="Skip single tokens, or route requests before or after the device's answer. A risk: token, a share: before."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 256,
    temperature: Annotated[float, typer.Option(help="0: greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="1: off.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="0: off.")] = 0,
    repetition_penalty: Annotated[float, typer.Option(help="1: off.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text, in every mode.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Stop string; may be given several times.")] = None,
    num_draft_tokens: Annotated[int, typer.Option(help="Tokens drafted a round, in modes speculative and split.")] = 4,
    objective: Annotated[
        Objective,
        typer.Option(
            help="What mode auto makes little of. latency: time per token. cost: passes of the target, at up to 1.5 times the time "
            "of a stream. balanced: both. offline-first: calls."
        ),
    ] = "latency",
    on_cloud_loss: Annotated[
        LossPolicy,
        typer.Option(help="Mode auto without an answer: continue on the device, wait for the cloud, or fail."),
    ] = "continue",
    max_provisional_tokens: Annotated[
        int, typer.Option(help="Most tokens that the device guesses ahead while the cloud is silent.")
    ] = 256,
    deadline_s: Annotated[float | None, typer.Option(help="Seconds the whole generation may take.")] = None,
    threads: Annotated[int, typer.Option(help="Threads of the device's model. 0: as many as this process may use.")] = 0,
    tls_ca: TlsCaOption = None,
    tls: TlsFlag = False,
    tls_cert: TlsCertOption = None,
    tls_key: TlsKeyOption = None,
    token_file: TokenFileOption = None,
    insecure: InsecureFlag = False,
    log_rejections: Annotated[
        Path | None,
        typer.Option(help="Keep what the target corrects, token ids with their context, in this folder for `edgecloud learn`."),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Encode the prompt as it is, without the chat template.")] = False,
    json: JsonFlag = False,
) -> None:
    """Answer a prompt with the device's draft model, the cloud's target, or both."""
    from edgecloud.client import Client
    from edgecloud.types import TokenEvent

    text = sys.stdin.read() if prompt == "-" else prompt
    secure = tls_of(tls, tls_ca, tls_cert, tls_key)
    with Client(
        bundle, cloud.split(",") if cloud else None, prefer=prefer, tls=secure, token=read_token(token_file), insecure=insecure,
        num_draft_tokens=num_draft_tokens, num_threads=threads, learn_from=log_rejections,
    ) as client:  # fmt: skip
        stream = client.stream(
            text, raw=raw, mode=mode, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k,
            repetition_penalty=repetition_penalty, seed=seed, stop_strings=stop or (), deadline_s=deadline_s,
            quality=_quality(quality, risk, cloud_share, scope),
            objective=objective, on_cloud_loss=on_cloud_loss, max_provisional_tokens=max_provisional_tokens, provisional=False,
        )  # fmt: skip
        interrupted = False
        try:
            with stream:
                for event in stream:
                    if isinstance(event, TokenEvent) and not json:
                        sys.stdout.write(event.text)
                        sys.stdout.flush()
        except KeyboardInterrupt:
            interrupted = True
        except EdgecloudError as error:
            if error.reply is not None and error.reply.token_ids and not json:
                sys.stdout.write("\n")
            raise
        if json:
            print_json(stream.reply.to_dict())
        else:
            sys.stdout.write("\n")
        if interrupted:
            raise typer.Exit(130)


def _quality(
    named: Literal["exact", "offline"] | None, risk: float | None, share: float | None, scope: ExitScope | None
) -> Quality | None:
    """The one that was asked for. Raises ConfigError: there are several, or a scope of nothing."""
    given = {"--quality": named, "--risk": risk, "--cloud-share": share}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ConfigError(f"{' and '.join(names)} are given; give one of them")
    if scope is not None and risk is None and share is None:
        raise ConfigError(f"--scope is {scope}; it goes with --risk or --cloud-share")
    if risk is not None:
        return Risk(risk, scope or "token")
    if share is not None:
        return CloudShare(share, scope or "before")
    return named
