"""`edgecloud inspect`: what is in a bundle, and whether it is whole."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from edgecloud.cli.app import app
from edgecloud.cli.graph_tables import cuts_table, graph_table
from edgecloud.cli.output import JsonFlag, print_json, table_console
from edgecloud.manifest import bundle_kind
from edgecloud.partitioner.graph_inspection import GraphInspection, inspect_graph_bundle

if TYPE_CHECKING:
    from edgecloud.partitioner.inspection import GraphContents, Inspection, Products


@app.command()
def inspect(
    bundle: Annotated[Path, typer.Argument(help="Folder written by `edgecloud partition`.", show_default=False)],
    json: JsonFlag = False,
) -> None:
    """Say what a bundle holds and what a device needs to run it, and check every file's hash. Exit code 1 if one is wrong."""
    found = _inspect(bundle)
    if json:
        print_json(found.to_dict())
    elif isinstance(found, GraphInspection):
        table_console().print(graph_table(found), cuts_table(found))
    else:
        table_console().print(contents_table(found))
    for problem in found.problems:
        sys.stderr.write(f"error: {problem}\n")
    if found.problems:
        raise typer.Exit(1)


def _inspect(bundle: Path) -> Inspection | GraphInspection:
    if bundle_kind(bundle) == "graph":
        return inspect_graph_bundle(bundle)
    from edgecloud.partitioner import extra_installed

    with extra_installed():
        from edgecloud.partitioner.inspection import inspect_bundle

    return inspect_bundle(bundle)


def contents_table(found: Inspection) -> Table:
    """For a terminal."""
    table = Table(title=found.bundle, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    target, draft, front = found.target, found.draft, found.front
    kept = "" if found.num_kept_ids is None else f", proposes {found.num_kept_ids} of {draft['vocab_size']} tokens"
    rows = {
        "pair": f"{found.pair_id}, by {found.created_by}, licence {found.licence or 'unknown'}",
        "target": f"{target['name']}, {target['dtype']}, {target['num_parameters'] / 1e6:.1f} M weights, {target['fingerprint']}",
        "draft": f"{draft['name']}, {draft['quantization']}, {draft['fingerprint']}{kept}",
        "tokenizer": found.tokenizer["fingerprint"],
    }
    if front is not None:
        rows["front"] = (
            f"layers 0 to {front['cut'] - 1} of {front['num_layers']}, {front['quantization']}, "
            f"boundary {front['codec']}, {front['width']} channels"
            + ("" if front["exit_head"] is None else f"; drafts by an exit head in {front['exit_head']['quantization']}")
        )
    rows["window"] = f"{found.window_tokens} tokens"
    for part, graph in found.graphs.items():
        rows[f"{part}'s graph"] = f"{_mb(graph.num_bytes)}; " + "; ".join(map(_describe, graph.products))
        rows[f"{part}'s memory"] = _memory(graph)
    rows["device's memory"] = f"about {_mb(found.ram_bytes)} for weights and full caches, estimated"
    state = f"{len(found.problems)} not as listed" if found.problems else "all hashes right"
    absent = "" if found.target_is_here else "; the target is not here, this is a device's copy"
    rows["files"] = f"{found.num_files}, {_mb(found.num_bytes)}, {state}{absent}"
    for name, value in rows.items():
        table.add_row(name, value)
    for note in found.checks.get("notes", []):
        table.add_row("note", str(note))
    return table


def _describe(products: Products) -> str:
    if products.bits is None:
        return f"{products.count} products in floating point"
    level = f"accuracy level {products.accuracy_level}"
    return f"{products.count} products in int{products.bits}, blocks of {products.block_size}, {level}"


def _memory(graph: GraphContents) -> str:
    caches = f"{_mb(graph.kv_bytes)} of caches at the window ({graph.kv_bytes_per_token} bytes a token)"
    measured = "" if graph.rss_bytes is None else f"; {_mb(graph.rss_bytes)} measured at partition time, short context"
    return f"{_mb(graph.num_bytes)} of weights, {caches}{measured}"


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB"
