"""`edgecloud verify`: is what a bundle says of itself still true here?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from edgecloud.cli.app import app
from edgecloud.cli.output import JsonFlag, print_json, progress_console, remarks, table_console
from edgecloud.errors import ConfigError
from edgecloud.manifest import bundle_kind

if TYPE_CHECKING:
    from edgecloud.partitioner.findings import Verification


@app.command()
def verify(
    bundle: Annotated[
        Path, typer.Argument(help="Folder written by `edgecloud partition`, with edge/ and cloud/.", show_default=False)
    ],
    inputs: Annotated[
        list[Path] | None,
        typer.Option(help="Samples for a graph bundle: an .npz with an array for every input; more of them all count."),
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Measure what a bundle says of itself again, against the target or whole graph in it. Exit code 1 if something is worse."""
    found = _verify(bundle, inputs or [])
    if json:
        print_json(found.to_dict())
    else:
        table = Table(title=f"{found.bundle}: {'as recorded' if found.passed else 'worse than recorded'}", title_justify="left")
        table.add_column("figure")
        for heading in ("recorded", "measured", "limit"):
            table.add_column(heading, justify="right")
        table.add_column("")
        for finding in found.findings:
            figures = (finding.recorded, finding.measured, finding.limit)
            table.add_row(finding.what, *map(_figure, figures), "ok" if finding.passed else "worse")
        output = table_console()
        output.print(table)
        for note in found.notes:
            output.print(note, highlight=False)
    if not found.passed:
        raise typer.Exit(1)


def _verify(bundle: Path, inputs: list[Path]) -> Verification:
    from edgecloud.partitioner import extra_installed

    remark = remarks(progress_console())
    if bundle_kind(bundle) == "graph":
        with extra_installed():
            from edgecloud.partitioner.graph_verification import verify_graph_bundle

        return verify_graph_bundle(bundle, inputs, remark=remark)
    if inputs:
        raise ConfigError(
            f"--inputs {inputs[0]} is for graph bundles; {bundle} is for text and has prompts of its own, leave it out"
        )
    remark("loading torch and transformers")
    with extra_installed():
        from edgecloud.partitioner.verification import verify_bundle

    return verify_bundle(bundle, remark=remark)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
