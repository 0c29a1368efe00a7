"""`edgecloud demo`: all of it on one machine, with a table at the end."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from edgecloud.cli.app import app
from edgecloud.cli.output import JsonFlag, print_json, progress_console, table_console

if TYPE_CHECKING:
    from edgecloud.demo import DemoReport, Row

GRACE_S = 15.0  # from a signal to the end
TABLE_WIDTH, REMARK_EVERY = 100, 14  # where there is no terminal


@app.command()
def demo(
    prompts: Annotated[int, typer.Option(help="How many of the built-in prompts.")] = 12,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 20,
    bundle: Annotated[Path | None, typer.Option(help="Take this bundle; default: fetch and partition the demo pair.")] = None,
    json: JsonFlag = False,
) -> None:
    """Fetch, partition, serve and generate on this machine: three modes over three links, as a table.

    Exit code 1 if speculative text differs from the cloud's.
    """
    from edgecloud.demo import prepare_bundle, verdict

    begin = time.monotonic()
    console = progress_console()

    def remark(text: str) -> None:
        console.print(text, style="dim", highlight=False, soft_wrap=True)

    with _stopped_like_ctrl_c():
        path = prepare_bundle(remark) if bundle is None else bundle
        report = _run(path, prompts, max_new_tokens, console, remark)
    remark(f"done in {time.monotonic() - begin:.0f} s")
    if json:
        print_json(report.to_dict())
    else:
        output = table_console()
        output = output if output.is_terminal else Console(width=TABLE_WIDTH)
        output.print(to_table(report))
        output.print(verdict(report.rows), highlight=False)
    if not report.identical:
        sys.stderr.write("error: a verified answer differs from the cloud's; see the last column\n")
        raise typer.Exit(1)


def _run(bundle: Path, num_prompts: int, max_new_tokens: int, console: Console, remark: Callable[[str], None]) -> DemoReport:
    from edgecloud.demo import run_demo

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("generating", total=None, visible=False)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, visible=True)
            if not console.is_terminal and done % REMARK_EVERY == 0:
                remark(f"{done} of {total} generations")

        return run_demo(bundle, num_prompts, max_new_tokens, remark=remark, progress=progress)


@contextmanager
def _stopped_like_ctrl_c() -> Iterator[None]:
    """SIGTERM and SIGHUP end what was started, too; all of them within `GRACE_S`.

    An exception raised by a signal may come up where it is dropped, in a destructor or a callback of a library.
    """
    overdue = threading.Timer(GRACE_S, _leave)
    overdue.daemon = True

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        if not overdue.is_alive():
            overdue.start()
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        overdue.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave() -> None:
    """End this process where it stands, and say where that was; those it started end with their pipe to it."""
    faulthandler.dump_traceback()
    os._exit(130)


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
