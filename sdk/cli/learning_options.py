"""Options that `edgecloud learn` and `edgecloud adapter train` share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgecloud.cli.output import progress_console, remarks

if TYPE_CHECKING:
    from edgecloud.partitioner.learning import Epoch

DraftArgument = Annotated[
    Path, typer.Argument(help="The draft, a Hugging Face folder: the one that the device's bundle was made of.", show_default=False)
]
LogOption = Annotated[Path, typer.Option("--log", help="What the device logged with --log-rejections.", show_default=False)]
EpochsOption = Annotated[int, typer.Option(help="Times to go through the log.")]
LearningRateOption = Annotated[float, typer.Option(help="Of AdamW.")]
AnchorOption = Annotated[float, typer.Option(help="Weight of staying as it is where the target did not correct it.")]
SeedOption = Annotated[int, typer.Option(help="The same seed gives the same draft, on a CPU with as many threads.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, or cuda.")]
AnyDraftFlag = Annotated[bool, typer.Option("--any-draft", help="Take guesses of other drafts of the same target, too.")]


def epoch_remarks() -> Callable[[Epoch], None]:
    """-> what tells a person how far the training is"""
    remark = remarks(progress_console())

    def seen(epoch: Epoch) -> None:
        loss = "" if epoch.loss is None else f", loss {epoch.loss:.3f}"
        agreement = "" if epoch.agreement is None else f", agrees with {epoch.agreement:.3f} of the held-out tokens"
        remark(f"epoch {epoch.number}{loss}{agreement}")

    return seen
