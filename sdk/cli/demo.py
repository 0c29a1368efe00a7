"""`edgecloud demo`: all of it on one machine, with a table at the end."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from edgecloud.cli.app import app
from edgecloud.cli.interrupt import stopped_like_ctrl_c
from edgecloud.cli.output import JsonFlag, print_json, progress_console, remarks, table_console
from edgecloud.cli.progress import generations
from edgecloud.errors import ConfigError

if TYPE_CHECKING:
    from edgecloud.demo import DemoReport, Row


@app.command()
def demo(
    prompts: Annotated[int, typer.Option(help="How many of the built-in prompts.")] = 12,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 20,
    draft: Annotated[
        Path | None, typer.Option(help="A distilled draft; default: the target itself, in int4.", show_default=False)
    ] = None,
    bundle: Annotated[Path | None, typer.Option(help="Take this bundle; default: fetch and partition the demo pair.")] = None,
    json: JsonFlag = False,
) -> None:
    """Fetch, partition, serve and generate on this machine: three modes over three links, as a table.

    Exit code 1 if speculative text differs from the cloud's.
    """
    from edgecloud.demo import prepare_bundle, run_demo, verdict

    if draft is not None and bundle is not None:
        raise ConfigError("--bundle has a draft already; give --draft or --bundle")

    begin = time.monotonic()
    console = progress_console()
    remark = remarks(console)
    with stopped_like_ctrl_c():
        path = prepare_bundle(remark, draft) if bundle is None else bundle
        with generations(console, remark) as progress:
            report = run_demo(path, prompts, max_new_tokens, remark=remark, progress=progress)
    remark(f"done in {time.monotonic() - begin:.0f} s")
    if json:
        print_json(report.to_dict())
    else:
        output = table_console()
        output.print(to_table(report))
        output.print(verdict(report.rows), highlight=False)
    if not report.identical:
        sys.stderr.write("error: a verified answer differs from the cloud's; see the last column\n")
        raise typer.Exit(1)


def to_table(report: DemoReport) -> Table:
    """What each mode cost on each link."""
    pins = f"service on core {report.cloud_cpu}, device on core {report.device_cpu}"
    table = Table(
        title=f"{report.bundle}, {report.num_prompts} prompts, {report.max_new_tokens} tokens, greedy\n"
        f"{pins if report.cloud_cpu is not None else 'one core for all'}; {report.machine['cpu']}",
        box=SIMPLE_HEAD,
        padding=0,  # so that it fits into 80 columns
        caption="Times are medians over the prompts. Passes and bytes: "
        "per token of the answer, the prompt's included. Agree: share of tokens before the first that differs.",
    )
    for heading in ("link", "mode"):
        table.add_column(heading, no_wrap=True)
    for heading in ("RTT\nms", "TTFT\nms", "TPOT\nms", "accep-\ntance", "cloud\npasses", "bytes\nup", "bytes\ndown"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("text identical to cloud")
    for row in report.rows:
        table.add_row(*_cells(row), end_section=row.mode != "cloud")
    return table


def _cells(row: Row) -> list[str]:
    return [
        row.link or "none needed",
        row.mode,
        "-" if row.rtt_ms is None else f"{row.rtt_ms:.0f}",
        f"{row.ttft_ms:.0f}",
        f"{row.tpot_ms:.1f}",
        "-" if row.acceptance_rate is None else f"{row.acceptance_rate:.0%}",
        f"{row.target_passes_per_token:.2f}",
        f"{row.uplink_bytes_per_token:.1f}",
        f"{row.downlink_bytes_per_token:.1f}",
        _identity(row),
    ]


def _identity(row: Row) -> str:
    if not row.verified:
        return f"unverified, {row.agreement:.0%} agree"
    if row.identical:
        return "yes"
    return f"no: {row.num_prompts - row.num_identical} of {row.num_prompts} differ"
