"""`edgecloud serve`: the verification service."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from edgecloud.cli.app import app
from edgecloud.cli.config_file import ConfigFlag, PrintConfigFlag, write_config
from edgecloud.cli.output import JsonFlag, print_json

logger = logging.getLogger(__name__)


@app.command()
def serve(
    context: typer.Context,
    model: Annotated[
        Path, typer.Argument(metavar="BUNDLE_OR_MODEL", help="A bundle (text or graph), or a Hugging Face folder with safetensors.")
    ],
    host: Annotated[str, typer.Option(help="Address to listen on. Off loopback it takes TLS or --insecure.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes any free port and prints it.")] = 7070,
    dtype: Annotated[str, typer.Option(help="auto (as saved), float32, bfloat16, float16.")] = "auto",
    exact: Annotated[
        str,
        typer.Option(
            help="bitwise: logits are the same bits whatever shares a pass, or the start fails; tolerance: to rounding; "
            "auto: bitwise, but for float32, where it would cost a single stream 15 %."
        ),
    ] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1. CUDA has never been run by us.")] = "cpu",
    threads: Annotated[int, typer.Option(help="Threads of torch. 0: as many as this process may use.")] = 0,
    cache_mb: Annotated[int, typer.Option(help="Key-value cache in MiB.")] = 1024,
    page_size: Annotated[int, typer.Option(help="Tokens a page.")] = 16,
    max_pass_tokens: Annotated[int, typer.Option(help="Most tokens of one pass; longer prompts take several.")] = 512,
    max_draft_tokens: Annotated[int, typer.Option(help="Longest draft a client may send.")] = 32,
    max_sessions: Annotated[int, typer.Option(help="Most sessions; idle ones make room.")] = 1024,
    max_batch_rows: Annotated[int, typer.Option(help="Of a graph: most rows of a run that requests share. 1: none do.")] = 8,
    batch_window_ms: Annotated[
        float, typer.Option(help="Of a graph: how long a request waits for company that is expected.")
    ] = 2.0,
    max_underway_mb: Annotated[int, typer.Option(help="Of a graph: MiB that all requests under way may hold.")] = 512,
    max_message_mb: Annotated[int, typer.Option(help="MiB of a message. 0: 1; of a graph, what some of its samples take.")] = 0,
    max_requests: Annotated[int, typer.Option(help="Most requests at a time.")] = 512,
    max_connection_requests: Annotated[int, typer.Option(help="Most requests at a time of one connection.")] = 256,
    max_connection_age_s: Annotated[float, typer.Option(help="Seconds until a client has to open its connection anew.")] = 3600.0,
    slow_reader_s: Annotated[float, typer.Option(help="Seconds until a reader that takes no message is left.")] = 60.0,
    idle_s: Annotated[float, typer.Option(help="Seconds until an unused session is dropped.")] = 300.0,
    drain_s: Annotated[float, typer.Option(help="Seconds that requests under way may take when told to stop.")] = 25.0,
    tokens_file: Annotated[Path | None, typer.Option(help="Who may come in, with quotas; `edgecloud token` makes lines.")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="PEM certificate chain.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM private key.")] = None,
    client_ca: Annotated[Path | None, typer.Option(help="PEM certificates that clients' must be signed by.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Allow plaintext off loopback.")] = False,
    metrics_port: Annotated[int | None, typer.Option(help="Serve Prometheus metrics there; 0 takes any free port.")] = None,
    log_format: Annotated[Literal["text", "json"], typer.Option(help="Lines for people, or one JSON object a line.")] = "text",
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], typer.Option(help="debug logs every request; never ids or tokens.")
    ] = "info",
    config: ConfigFlag = None,
    print_config: PrintConfigFlag = False,
    json: JsonFlag = False,
) -> None:
    """Serve the target model (verify drafts, decode), or the cloud's part of a graph, over gRPC."""
    from edgecloud.cloud.logs import set_up_logs
    from edgecloud.cloud.server import ServerConfig, Serving
    from edgecloud.cloud.server import serve as serve_until_stopped

    server_config = ServerConfig(
        host=host, port=port, dtype=dtype, exact=exact, device=device, num_threads=threads,
        cache_bytes=cache_mb << 20, page_size=page_size,
        max_pass_tokens=max_pass_tokens, max_draft_tokens=max_draft_tokens, max_sessions=max_sessions, idle_s=idle_s,
        max_batch_rows=max_batch_rows, batch_window_ms=batch_window_ms, max_underway_bytes=max_underway_mb << 20,
        max_requests=max_requests, max_connection_requests=max_connection_requests, max_connection_age_s=max_connection_age_s,
        max_message_bytes=max_message_mb << 20, slow_reader_s=slow_reader_s, drain_s=drain_s, tokens_file=tokens_file,
        metrics_port=metrics_port, tls_cert=tls_cert, tls_key=tls_key, client_ca=client_ca, insecure=insecure,
    )  # fmt: skip
    if print_config:
        write_config(context)
        return
    set_up_logs(log_format, log_level)

    def on_serving(serving: Serving) -> None:
        if json:
            print_json(asdict(serving))
        if serving.graph_cuts:
            what = f"graph on {serving.device}, exact: {serving.exact}, cuts {', '.join(serving.graph_cuts)}"
        else:
            window = f"window {serving.max_context_tokens} tokens"
            what = f"{serving.dtype} on {serving.device}, exact: {serving.exact}, {window}"
        plaintext = "" if serving.tls else ", plaintext"
        logger.info("serving %s (%s) on %s%s", serving.model_name, what, serving.address, plaintext)

    serve_until_stopped(model, server_config, on_serving)
