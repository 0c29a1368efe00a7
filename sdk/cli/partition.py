"""`edgecloud partition`: a model pair as a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from edgecloud.cli.app import app
from edgecloud.cli.output import JsonFlag, print_json, progress_console, table_console

if TYPE_CHECKING:
    from edgecloud.partitioner.inputs import Inputs


@app.command()
def partition(  # typer fills them by name
    model: Annotated[
        str,
        typer.Argument(help="The target: a Hugging Face folder, or the name of a fetched model.", show_default=False),
    ],
    bundle: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.", show_default=False)],
    draft: Annotated[
        str | None, typer.Option(help="Hugging Face folder of the draft model; default: the target itself, quantized.")
    ] = None,
    precision: Annotated[Literal["int4", "fp32"], typer.Option(help="Of the draft's weights.")] = "int4",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a bundle that is there.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the inputs, say what would be done, write nothing.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Export the draft for the device, pair it with the target, check both and report what the split costs.

    A file that ends in .onnx is any graph, which is cut in two: `edgecloud partition FILE.onnx --help`.
    """
    from edgecloud.partitioner import extra_installed

    with extra_installed():
        from edgecloud.partitioner.inputs import check_inputs

    inputs = check_inputs(model, bundle, draft=draft, precision=precision, overwrite=overwrite)
    if dry_run:
        plan = _plan(inputs)
        if as_json:
            print_json(plan)
        else:
            for key, value in plan.items():
                typer.echo(f"{key}: {value}")
        return
    console = progress_console()
    console.print("loading torch and transformers", style="dim", highlight=False)
    with extra_installed():
        from edgecloud.partitioner.partition import partition as run_partition
    report = run_partition(inputs, remark=lambda text: console.print(text, style="dim", highlight=False))
    if as_json:
        print_json(report.to_dict())
    else:
        table_console().print(report.to_table())


def _plan(inputs: Inputs) -> dict[str, Any]:
    return {
        "dry_run": True,
        "bundle": str(inputs.destination),
        "target": str(inputs.target.path),
        "target_bytes": inputs.target_bytes,
        "draft": str(inputs.draft.path),
        "draft_bytes_estimate": inputs.draft_bytes,
        "precision": inputs.precision,
        "num_tokenizer_tokens": inputs.num_tokens,
        "target_vocab_size": inputs.target.vocab_size,
        "draft_vocab_size": inputs.draft.vocab_size,
        "disk_needed_bytes": inputs.needed_bytes,
    }
