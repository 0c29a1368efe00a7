"""`edgecloud bench`: modes x links x prompts, as a table and as a report."""

from __future__ import annotations

import shlex
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

if TYPE_CHECKING:
    from edgecloud.bench import Bench
    from edgecloud.cells import Cell


@app.command()
def bench(
    bundle: Annotated[Path, typer.Argument(help="Folder written by `edgecloud partition`, with the target in it.")],
    modes: Annotated[
        str,
        typer.Option(
            help="cloud, speculative:K, split:K, auto, auto:OBJECTIVE, cascade:RISK, edge, between commas; cloud is needed."
        ),
    ] = "cloud,speculative:1,speculative:4,auto",
    links: Annotated[
        str, typer.Option(help="Between commas: round trips such as 20ms; wifi, lte, 5g; trace:FILE[@RTT] (60 ms).")
    ] = "2ms,20ms,lte,5g",
    prompts: Annotated[
        Path | None,
        typer.Option(help="A prompt a line, or a .jsonl with turns, question or prompt; default: twelve of our own."),
    ] = None,
    num_prompts: Annotated[int, typer.Option(help="How many of them, spread evenly over the file. 0: all.")] = 12,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 64,
    repeats: Annotated[int, typer.Option(help="How often each.")] = 1,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for bench.json and report.html; takes edgecloud[bench].")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Serve the bundle on this machine and measure modes over simulated links, side by side, prompt by prompt.

    Medians, and the regret of mode auto: its time over that of the best fixed mode. Service and device have a core each, where
    there are two. Exit code 1 if a verified answer differs from the cloud's.
    """
    from edgecloud.arms import check_distinct, parse_arms
    from edgecloud.bench import run_bench
    from edgecloud.links import parse_link
    from edgecloud.options import check_whole
    from edgecloud.prompts import PROMPTS, read_prompts, spread_evenly

    begin = time.monotonic()
    arms, ways = parse_arms(modes), [parse_link(word) for word in links.split(",")]
    check_distinct("--links", [link.name for link in ways])
    check_whole("--num-prompts", num_prompts, 0)
    check_whole("--max-new-tokens", max_new_tokens, 1)
    check_whole("--repeats", repeats, 1)
    known = list(PROMPTS) if prompts is None else read_prompts(prompts)
    chosen = spread_evenly(known, num_prompts)
    if output is not None:
        from edgecloud.bench_report import prepare_folder, write_report

        prepare_folder(output)
    command = ["edgecloud", "bench", bundle.name, "--modes", modes, "--links", links]
    command += [] if prompts is None else ["--prompts", prompts.name]
    command += ["--num-prompts", str(num_prompts), "--max-new-tokens", str(max_new_tokens), "--repeats", str(repeats)]
    console = progress_console()
    remark = remarks(console)
    remark(f"{len(chosen)} of {len(known)} prompts")
    with stopped_like_ctrl_c(), generations(console, remark) as progress:
        found = run_bench(
            bundle, arms, ways, chosen, max_new_tokens, repeats,
            command=shlex.join(command), remark=remark, progress=progress,
        )  # fmt: skip
        if output is not None:
            for file in write_report(found, output):
                remark(f"wrote {file}")
    remark(f"done in {time.monotonic() - begin:.0f} s")
    if json:
        print_json(found.to_dict())
    else:
        _print_tables(found)
    if not found.identical:
        near = "; the service says exact: tolerance, so near ties may fall either way" if found.exact == "tolerance" else ""
        sys.stderr.write(f"error: a verified answer differs from the cloud's, see the last column{near}\n")
        raise typer.Exit(1)


def _print_tables(found: Bench) -> None:
    output = table_console()
    output.print(to_table(found))
    for row in found.regrets:
        words = f"{row.link}: {row.arm} took {row.ratio:.2f} times as long as {row.best}, the best fixed mode there."
        output.print(words, highlight=False)


def to_table(found: Bench) -> Table:
    """What each mode cost on each link."""
    pins = f"service on core {found.cloud_cpu}, device on core {found.device_cpu}"
    table = Table(
        title=f"{found.bundle}, {len(found.prompts)} prompts, {found.max_new_tokens} tokens, greedy\n"
        f"{pins if found.cloud_cpu is not None else 'one core for all'}; {found.machine['cpu']}",
        box=SIMPLE_HEAD,
        padding=0,
        caption="Times are medians over the generations; total is that of all prompts, once. Visible: until the first token is "
        "shown, be it a guess. Passes and bytes: per token of the answer, the prompt's included.",
    )
    for heading in ("link", "mode"):
        table.add_column(heading, no_wrap=True)
    for heading in ("RTT\nms", "visible\nms", "TTFT\nms", "TPOT\nms", "total\ns", "accep-\ntance", "cloud\npasses", "bytes\nup"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("identical\nto cloud")
    for cell, after in zip(found.cells, [*found.cells[1:], None], strict=True):
        table.add_row(*_cells(cell), end_section=after is None or after.link != cell.link)
    return table


def _cells(cell: Cell) -> list[str]:
    return [
        cell.link,
        cell.arm,
        "-" if cell.rtt_ms is None else f"{cell.rtt_ms:.0f}",
        f"{cell.first_visible_ms:.0f}",
        f"{cell.ttft_ms:.0f}",
        f"{cell.tpot_ms:.1f}",
        f"{cell.total_ms / 1e3:.1f}",
        "-" if cell.acceptance_rate is None else f"{cell.acceptance_rate:.0%}",
        f"{cell.target_passes_per_token:.2f}",
        f"{cell.uplink_bytes_per_token:.1f}",
        "unverified" if not cell.verified else "yes" if cell.identical else f"{cell.num_identical} of {cell.num_samples}",
    ]
