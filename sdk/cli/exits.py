"""`edgecloud exits`: early exits for a classifier in ONNX, so that what is easy never leaves the device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from edgecloud.cli.app import app
from edgecloud.cli.output import JsonFlag, print_json, progress_console, remarks, table_console
from edgecloud.errors import BundleError
from edgecloud.manifest import bundle_kind, is_bundle


@app.command()
def exits(
    model: Annotated[
        Path, typer.Argument(help="A classifier, a file that ends in .onnx; or a bundle whose exits are to be calibrated anew.")
    ],
    inputs: Annotated[
        Path,
        typer.Option(help="Samples, an .npz with an array for every input; its first dimension counts them.", show_default=False),
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File of the model with exits.", show_default=False)] = None,
    labels: Annotated[
        Path | None,
        typer.Option(help="Class of every sample, an .npy of whole numbers. Default: what the classifier itself says is right."),
    ] = None,
    at: Annotated[
        list[str] | None, typer.Option(help="Put an exit after this node or tensor; repeat for more. Default: --num-exits of them.")
    ] = None,
    num_exits: Annotated[int, typer.Option(help="As many exits, at equal distances of computing time.")] = 2,
    risk: Annotated[
        list[float] | None, typer.Option(help="Share of early answers that may be wrong; repeat for more. Default: 0.05.")
    ] = None,
    delta: Annotated[float, typer.Option(help="Chance that a stated risk is not kept after all.")] = 0.05,
    rule: Annotated[
        Literal["confidence", "entropy", "margin", "feature_delta"] | None,
        typer.Option(help="What makes an exit sure, unless a call says otherwise. Default: confidence, or what the bundle has."),
    ] = None,
    width: Annotated[int, typer.Option(help="Features of a head.")] = 32,
    seed: Annotated[int, typer.Option(help="Of weights, batches, and the division of the samples.")] = 0,
    threads: Annotated[int, typer.Option(help="Threads. 0: as many as this process may use.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Train early exits on your samples, put them into the graph, and calibrate when to leave at them.

    The model with exits goes to `edgecloud partition`; then `run --risk 0.05` leaves at an exit where that risk allows.
    """
    from edgecloud.partitioner import extra_installed

    with extra_installed():
        from edgecloud.partitioner.classifier_exits import ExitRequest, make_exits

    request = ExitRequest(
        model=model,
        inputs=inputs,
        labels=labels,
        output=output,
        at=tuple(at or ()),
        num_exits=num_exits,
        risks=tuple(risk or (0.05,)),
        delta=delta,
        rule=rule,
        width=width,
        seed=seed,
        num_threads=threads,
        overwrite=overwrite,
    )
    report = make_exits(request, remarks(progress_console()))
    if as_json:
        print_json(report.to_dict())
    else:
        table_console().print(report.to_table())


def is_for_exits(arguments: Sequence[str]) -> bool:
    """Whether a command line is `calibrate` of a graph bundle: a classifier's exits, not a draft's tokens, are meant."""
    if list(arguments[:1]) != ["calibrate"]:
        return False
    try:
        return any(is_bundle(word) and bundle_kind(word) == "graph" for word in arguments[1:])
    except BundleError:
        return False  # the command itself says what is wrong with it
