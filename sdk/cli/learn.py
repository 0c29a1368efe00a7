"""`edgecloud learn`: a draft that learns from what the target corrected, on one machine."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from edgecloud.cli.app import app
from edgecloud.cli.learning_options import (
    AnchorOption,
    AnyDraftFlag,
    DeviceOption,
    DraftArgument,
    EpochsOption,
    LearningRateOption,
    LogOption,
    SeedOption,
    epoch_remarks,
)
from edgecloud.cli.output import JsonFlag, print_json, progress_console, remarks


@app.command()
def learn(
    draft: DraftArgument,
    log: LogOption,
    output: Annotated[Path, typer.Option("-o", "--output", help="The new draft's folder.", show_default=False)],
    epochs: EpochsOption = 3,
    learning_rate: LearningRateOption = 1e-3,
    anchor: AnchorOption = 0.5,
    rank: Annotated[int, typer.Option(help="Of the adapter.")] = 8,
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    any_draft: AnyDraftFlag = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that is there.")] = False,
    json: JsonFlag = False,
) -> None:
    """Train a draft on its device's log of rejected guesses, and write it for `partition --draft`.

    Every eighth passage is held out; the epoch that agrees best with these is kept, and nothing is written if none agrees better
    than the draft as it is.
    """
    from edgecloud.partitioner import extra_installed

    remarks(progress_console())("loading torch, transformers and peft")
    with extra_installed("learn"):
        from edgecloud.partitioner.learn import learn as run
        from edgecloud.partitioner.learning import LearningSettings

    settings = LearningSettings(epochs, learning_rate, anchor, seed)
    learned = run(
        draft, log, output, settings, rank=rank, any_draft=any_draft, overwrite=overwrite, device=device, seen=epoch_remarks()
    )
    if json:
        print_json({"draft": str(output), **asdict(learned)})
    else:
        typer.echo(output)
