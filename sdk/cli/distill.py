"""`edgecloud distill`: a small draft, made for its target."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from edgecloud.answers import AnswerFile
from edgecloud.cli.app import app
from edgecloud.cli.output import JsonFlag, print_json, progress_console, remarks, table_console
from edgecloud.cli.progress import generations
from edgecloud.errors import BundleError, ConfigError
from edgecloud.prompts import read_prompts

if TYPE_CHECKING:
    from rich.console import Console

    from edgecloud.partitioner.distill import CurvePoint
    from edgecloud.partitioner.draft_maker import DraftReport
    from edgecloud.partitioner.model_folder import ModelFolder

CACHE_BYTES = 4 << 30  # of keys and values while the target answers


@app.command()
def distill(  # typer fills them by name
    target: Annotated[str, typer.Argument(help="A Hugging Face folder, or the name of a fetched model.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the draft.", show_default=False)],
    prompts: Annotated[
        list[Path] | None, typer.Option(help="A prompt a line, or .jsonl; may be given several times.", show_default=False)
    ] = None,
    answers: Annotated[
        Path | None, typer.Option(help="Answers that were collected before (.jsonl); nothing is asked.", show_default=False)
    ] = None,
    num_samples: Annotated[int, typer.Option("--samples", help="Further answers to each prompt, at temperature 0.8.")] = 0,
    num_own: Annotated[int, typer.Option("--own-prompts", help="Prompts that the target makes up itself.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer.")] = 160,
    max_prompt_tokens: Annotated[int, typer.Option(help="Longer prompts are left out.")] = 1600,
    layers: Annotated[
        str | None, typer.Option(help="Layers of the target to begin with, such as 0,1,2,3,28,29.", show_default=False)
    ] = None,
    num_layers: Annotated[int, typer.Option(help="Without --layers: so many, the first two thirds from the beginning.")] = 6,
    num_kept: Annotated[int, typer.Option("--draft-vocab", help="Tokens that the draft may propose.")] = 16384,
    steps: Annotated[int, typer.Option(help="Of training.")] = 1000,
    tokens_a_step: Annotated[int, typer.Option(help="Padding included.")] = 8192,
    rate: Annotated[float, typer.Option(help="Of learning; of norms half of it. Less for a draft that keeps most layers.")] = 2e-3,
    own_share: Annotated[float, typer.Option(help="Share of the steps that learn from the draft's own samples.")] = 0.0,
    patience: Annotated[int, typer.Option(help="Examinations without a better one before it stops.")] = 8,
    evaluate_every: Annotated[int, typer.Option(help="Steps between examinations and checkpoints.")] = 50,
    for_int4: Annotated[bool, typer.Option("--for-int4/--for-fp32", help="Learn with the weights as int4 keeps them.")] = True,
    packed: Annotated[
        bool,
        typer.Option("--packed", help="Write only what the target does not have, its layers, in int4."),
    ] = False,
    seed: Annotated[int, typer.Option(help="Of everything drawn.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    work: Annotated[
        Path | None, typer.Option(help="Answers and checkpoints, gone on with; default: the draft's name with .work.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a draft that is there.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Make a draft for a target: a few of its layers, taught its distribution on its own answers to your prompts.

    Every twentieth prompt is kept out and examines the draft. A run that was broken off goes on where it was.
    The folder is for `edgecloud partition TARGET --draft FOLDER`.
    """
    from edgecloud.partitioner import extra_installed

    with extra_installed():
        from edgecloud.partitioner.distill import DistillSettings
        from edgecloud.partitioner.draft_maker import make_draft
        from edgecloud.partitioner.model_folder import ModelFolder
        from edgecloud.partitioner.student import default_layers

    folder = ModelFolder.open(target)
    if output.exists() and not overwrite:
        raise BundleError(f"{output} is there; give --overwrite to replace it, or another name")
    if packed and not for_int4:
        raise ConfigError("--packed keeps int4, and --for-fp32 learns without it; leave one of them out")
    chosen = default_layers(folder.num_layers, num_layers) if layers is None else _numbers(layers)
    examined = {"evaluate_every": evaluate_every, "patience": patience}
    settings = DistillSettings(
        tuple(chosen),
        num_kept,
        steps,
        tokens_a_step,
        matrix_rate=rate,
        vector_rate=rate / 2,
        own_share=own_share,
        rounded=for_int4,
        seed=seed,
        **examined,
    )
    place = work or output.with_name(f"{output.name}.work")
    console = progress_console()
    if answers is None:
        words = [prompt for file in prompts or [] for prompt in read_prompts(file)]
        if not words and not num_own:
            raise ConfigError("there is nothing to ask; give --prompts, --own-prompts or --answers")
        file = AnswerFile(place / "answers.jsonl")
        asked = _Asked(words, num_samples, num_own, max_new_tokens, max_prompt_tokens, seed)
        _collect(folder, asked, file, device, console)
    else:
        file = AnswerFile(answers)
    with generations(console, remarks(console)) as read:
        report = make_draft(
            folder,
            list(file),
            settings,
            output,
            place,
            device=device,
            packed=packed,
            remark=remarks(console),
            read=read,
            learnt=_tell(console),
        )
    if as_json:
        print_json(report.to_dict())
    else:
        table_console().print(_table(report))


class _Asked:
    def __init__(
        self, words: list[str], num_samples: int, num_own: int, max_new_tokens: int, max_prompt_tokens: int, seed: int
    ) -> None:
        self.words, self.num_samples, self.num_own = words, num_samples, num_own
        self.max_new_tokens, self.max_prompt_tokens, self.seed = max_new_tokens, max_prompt_tokens, seed


def _collect(target: ModelFolder, asked: _Asked, file: AnswerFile, device: str, console: Console) -> None:
    from edgecloud.partitioner import extra_installed
    from edgecloud.partitioner.questions import questions

    with extra_installed():
        from edgecloud.cloud.answering import Answerer
        from edgecloud.cloud.engine import Engine
        from edgecloud.cloud.model import TargetModel, eos_token_ids

    known = {answer.key for answer in file}
    wanted = questions(
        target.path,
        asked.words,
        num_samples=asked.num_samples,
        num_own=asked.num_own,
        max_prompt_tokens=min(asked.max_prompt_tokens, target.max_context_tokens - asked.max_new_tokens),
        seed=asked.seed,
    )
    missing = [question for question in wanted if question.key not in known]
    if not missing:
        return
    remark = remarks(console)
    remark(f"the target answers {len(missing)} prompts; {len(known)} answers are there")
    engine = Engine(TargetModel(target.path, "float32", device), cache_bytes=CACHE_BYTES, stretch=math.inf)
    answerer = Answerer(engine, eos_token_ids(target.path), asked.max_new_tokens)
    with file.append_to() as appender, generations(console, remark) as progress:
        for number, answer in enumerate(answerer.answers(missing), 1):
            appender.add(answer)
            progress(number, len(missing))


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise ConfigError(f"--layers is {text!r}; it takes numbers with commas between them, such as 0,1,28,29") from None


def _tell(console: Console) -> Callable[[CurvePoint], None]:
    remark = remarks(console)

    def tell(point: CurvePoint) -> None:
        remark(
            f"step {point.step}: {point.positions} positions, KL {point.kl:.3f}; held out: agreement {point.agreement:.3f}, "
            f"within three {point.top3:.3f}"
        )

    return tell


def _table(report: DraftReport) -> Table:
    table = Table(title=report.draft, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_row("layers", ", ".join(map(str, report.settings["layers"])))
    table.add_row("parameters", f"{report.num_parameters / 1e6:.1f} M")
    table.add_row("may propose", f"{report.settings['num_kept']} tokens, {report.coverage:.1%} of the answers'")
    table.add_row("learnt from", f"{report.num_answers} answers of {report.num_answer_tokens} tokens")
    table.add_row("agreement", f"{report.agreement:.3f} with the target's greedy answers to held-out prompts")
    table.add_row("next", f"edgecloud partition TARGET --draft {report.draft} -o BUNDLE")
    return table
