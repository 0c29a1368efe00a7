"""`edgecloud adapter`: the steps of a federated round that need the model, each a process that reads and writes files.

Whoever moves the files and averages them (examples/federated, with Flower) need not be able to import edgecloud.
"""

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
from edgecloud.cli.output import JsonFlag, print_json

OutputOption = Annotated[Path, typer.Option("-o", "--output", help="Where to write.", show_default=False)]
AdapterArgument = Annotated[Path, typer.Argument(help="An adapter of this draft, as safetensors.", show_default=False)]

adapter = typer.Typer(help="Adapters of a draft, for rounds in which several devices learn together.", no_args_is_help=True)
app.add_typer(adapter, name="adapter")


@adapter.command()
def begin(
    draft: DraftArgument,
    output: OutputOption,
    rank: Annotated[int, typer.Option(help="Of the adapter.")] = 8,
    seed: SeedOption = 0,
    json: JsonFlag = False,
) -> None:
    """Write the adapter that all devices begin with; it changes nothing yet."""
    from edgecloud.partitioner import extra_installed

    with extra_installed("learn"):
        from edgecloud.partitioner.learn import begin_adapter

    info = begin_adapter(draft, output, rank, seed)
    _say(json, output, asdict(info))


@adapter.command()
def train(
    draft: DraftArgument,
    adapter: AdapterArgument,
    log: LogOption,
    output: OutputOption,
    epochs: EpochsOption = 1,
    learning_rate: LearningRateOption = 1e-3,
    anchor: AnchorOption = 0.5,
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    any_draft: AnyDraftFlag = False,
    json: JsonFlag = False,
) -> None:
    """Train an adapter on this device's log. What is written holds no text and no ids."""
    from edgecloud.partitioner import extra_installed

    with extra_installed("learn"):
        from edgecloud.partitioner.learn import train_adapter
        from edgecloud.partitioner.learning import LearningSettings

    settings = LearningSettings(epochs, learning_rate, anchor, seed)
    learned = train_adapter(draft, adapter, log, output, settings, any_draft=any_draft, device=device, seen=epoch_remarks())
    _say(json, output, asdict(learned))


@adapter.command()
def merge(
    draft: DraftArgument,
    adapter: AdapterArgument,
    output: OutputOption,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that is there.")] = False,
    json: JsonFlag = False,
) -> None:
    """Add an adapter to the draft's weights, and write a draft for `partition --draft`."""
    from edgecloud.partitioner import extra_installed

    with extra_installed("learn"):
        from edgecloud.partitioner.learn import merge_adapter

    merge_adapter(draft, adapter, output, overwrite=overwrite)
    _say(json, output, {})


def _say(json: bool, output: Path, found: dict[str, object]) -> None:
    if json:
        print_json({"output": str(output), **found})
    else:
        typer.echo(output)
