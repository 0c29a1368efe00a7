"""`edgecloud calibrate`: from which score on a device may answer without the cloud, at a risk that the user states."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from edgecloud.cli.app import app
from edgecloud.cli.output import JsonFlag, print_json, progress_console, remarks, table_console
from edgecloud.cli.progress import generations
from edgecloud.prompts import read_prompts

if TYPE_CHECKING:
    from edgecloud.calibration import Calibration, ExitRule

SCOPE_NAMES = {"token": "tokens", "before": "requests, by the first guesses", "after": "requests, by the draft's answer"}


@app.command()
def calibrate(
    bundle: Annotated[
        Path, typer.Argument(help="Folder written by `edgecloud partition`, with edge/ and cloud/.", show_default=False)
    ],
    prompts: Annotated[
        Path,
        typer.Option(
            help="A prompt a line, or a .jsonl with turns, question or prompt; as the users' will be. 200 or more.",
            show_default=False,
        ),
    ],
    risk: Annotated[
        list[float] | None,
        typer.Option(help="Share of unverified tokens that may differ from the target's choice; may be repeated.  [default: 0.05]"),
    ] = None,
    delta: Annotated[float, typer.Option(help="Chance that a risk does not hold after all; confidence is 1 - delta.")] = 0.05,
    cloud_share: Annotated[
        list[float] | None, typer.Option(help="Share of requests to send to the cloud, whatever the risk; may be repeated.")
    ] = None,
    temperature: Annotated[
        list[float] | None, typer.Option(help="Sampling temperature to calibrate for; may be repeated.  [default: 0]")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of each answer that count.")] = 48,
    answers: Annotated[
        Path | None, typer.Option(help="The target's greedy answers, a .jsonl with prompt_ids and answer_ids: saves time.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Fit exit thresholds on prompts so that stated risks hold, and write them into the bundle.

    A risk that the prompts do not show to hold is written down as "nothing may be skipped", with the number of prompts that
    might show it. What was measured is kept: a run that was stopped goes on where it was.
    """
    from edgecloud.partitioner import extra_installed

    texts = read_prompts(prompts)
    console = progress_console()
    remark = remarks(console)
    remark("loading torch and transformers")
    with extra_installed():
        from edgecloud.partitioner.calibrate import Wanted
        from edgecloud.partitioner.calibrate import calibrate as run_calibration

    wanted = Wanted(
        tuple(risk or ([] if cloud_share else [0.05])),
        delta,
        tuple(cloud_share or ()),
        tuple([0.0] if temperature is None else temperature),
        max_new_tokens,
    )
    with generations(console, remark, "prompts") as progress:
        found = run_calibration(bundle, texts, wanted, answers=answers, remark=remark, progress=progress)
    if json:
        print_json({"bundle": str(bundle), **found.to_dict()})
        return
    output = table_console()
    if found.rules:
        output.print(rule_table(found))
    if found.shares:
        output.print(share_table(found))


def rule_table(found: Calibration) -> Table:
    """Rules that keep to a risk."""
    table = Table(title=f"Exits whose risk holds with confidence {1 - found.delta:g}", title_justify="left")
    table.add_column("what may exit")
    for heading in ("risk", "temperature", "threshold", "tokens unverified", "of these diverged", "prompts"):
        table.add_column(heading, justify="right")
    for rule in found.rules:
        figures = _figures(rule)
        table.add_row(
            SCOPE_NAMES[rule.scope], f"{rule.risk:g}", f"{rule.temperature:g}", *figures, str(rule.num_prompts)
        )  # fmt: skip
    return table


def _figures(rule: ExitRule) -> tuple[str, str, str]:
    if rule.threshold is not None:
        return f"{rule.threshold:g}", f"{rule.exit_share:.1%}", f"{rule.divergence:.2%}"
    needed = "no threshold holds" if rule.prompts_needed is None else f"about {rule.prompts_needed} prompts needed"
    return "nothing", needed, "-"


def share_table(found: Calibration) -> Table:
    """Rules that keep to a share of the cloud."""
    table = Table(title="Requests by the share that goes to the cloud; no risk is stated", title_justify="left")
    table.add_column("judged")
    for heading in ("share", "temperature", "threshold", "local tokens diverged"):
        table.add_column(heading, justify="right")
    for rule in found.shares:
        table.add_row(
            SCOPE_NAMES[rule.scope], f"{rule.cloud_share:g}", f"{rule.temperature:g}", f"{rule.threshold:.4f}",
            f"{rule.divergence:.1%}",
        )  # fmt: skip
    return table
