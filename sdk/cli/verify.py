"""`edgecloud verify`: is what a bundle says of itself still true here?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from edgecloud.cli.app import app
from edgecloud.cli.output import JsonFlag, print_json, progress_console, remarks, table_console


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="Folder written by `edgecloud partition`, with its target.", show_default=False)],
    json: JsonFlag = False,
) -> None:
    """Measure parity and agreement again, against the target in the bundle. Exit code 1 if something is worse than recorded."""
    from edgecloud.partitioner import extra_installed

    remark = remarks(progress_console())
    remark("loading torch and transformers")
    with extra_installed():
        from edgecloud.partitioner.verification import verify_bundle

    found = verify_bundle(bundle, remark=remark)
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


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
