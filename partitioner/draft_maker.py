"""`edgecloud distill`, from answers to a folder: a Hugging Face model that `edgecloud partition --draft` takes."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from edgecloud.answers import Answer
from edgecloud.draft_vocab import DRAFT_VOCAB
from edgecloud.errors import ConfigError
from edgecloud.partitioner import check, tokenizer_match
from edgecloud.partitioner.atomic import atomic_folder
from edgecloud.partitioner.distill import CurvePoint, Distillation, DistillSettings
from edgecloud.partitioner.frequent_tokens import frequent_tokens
from edgecloud.partitioner.lessons import Lessons
from edgecloud.partitioner.model_folder import CLOUD_FILES, ModelFolder
from edgecloud.partitioner.report import Remark
from edgecloud.partitioner.student import Student

RECORD = "distillation.json"  # beside the weights: how they were made
OWN_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json")  # of the draft, not copied


@dataclass(frozen=True, slots=True)
class DraftReport:
    """What was made."""

    draft: str
    target_fingerprint: str
    settings: dict[str, Any]
    num_parameters: int
    num_answers: int
    num_answer_tokens: int
    answers_sha256: str  # of all their tokens, in order
    coverage: float  # of the answers' tokens, by those that the draft may propose
    agreement: float  # on held-out prompts, of the weights that were kept
    curve: list[dict[str, float]]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def make_draft(
    target: ModelFolder,
    answers: Sequence[Answer],
    settings: DistillSettings,
    destination: Path,
    work: Path,
    *,
    device: str = "cpu",
    packed: bool = False,
    remark: Remark = lambda _: None,
    read: Callable[[int, int], None] = lambda _, __: None,
    learnt: Callable[[CurvePoint], None] = lambda _: None,
) -> DraftReport:
    """Train, and write the draft. What is in `work` is gone on with; the draft appears whole or not at all.

    `packed`: as packed_draft.py describes, and for int4 only; else a Hugging Face folder. `read` hears how many answers of how
    many the target has read, `learnt` every point of the curve.

    Raises:
        ConfigError: too few answers, or tokens that the target does not have; `work` is of another run.
        ModelError: the target cannot be distilled.
    """
    check_answers(answers, target)
    torch.manual_seed(settings.seed)
    model = _load(target, device)
    fingerprint = target.fingerprint()
    lessons = Lessons(answers, work / "states", fingerprint)
    remark(f"the target reads {lessons.num_positions} positions of {len(answers)} answers; what it has read before is kept")
    lessons.prepare(model, read)
    always = tokenizer_match.eos_token_ids(target)
    kept = frequent_tokens((answer.ids for answer in answers), settings.num_kept, target.vocab_size, always)
    student = Student(model, settings.layers, torch.tensor(kept.token_ids, device=model.device), rounded=settings.rounded)
    distillation = Distillation(model, student, lessons, settings, work)
    remark(f"learning from {distillation.num_training} answers, examined by {distillation.num_examined} of other prompts")
    curve = distillation.run(learnt)
    if settings.rounded:
        student.round()
    report = DraftReport(
        draft=str(destination),
        target_fingerprint=fingerprint,
        settings=asdict(settings),
        num_parameters=student.model.num_parameters(),
        num_answers=len(answers),
        num_answer_tokens=sum(len(answer.answer_ids) for answer in answers),
        answers_sha256=_digest(answers),
        coverage=round(_coverage(answers, set(kept.token_ids)), 4),
        agreement=max(point.agreement for point in curve),
        curve=[asdict(point) for point in curve],
    )
    with atomic_folder(destination) as folder:
        if packed:
            student.save_packed(folder, fingerprint)
        else:
            student.save(folder)
            for name in CLOUD_FILES:
                if name not in OWN_FILES and (target.path / name).is_file():
                    shutil.copyfile(target.path / name, folder / name)
        (folder / DRAFT_VOCAB).write_text(kept.to_json(), "utf-8")
        (folder / RECORD).write_text(json.dumps(report.to_dict() | {"draft": destination.name}, indent=1) + "\n", "utf-8")
    return report


def check_answers(answers: Sequence[Answer], target: ModelFolder) -> None:
    """Raises ConfigError: there is none, or one holds a token that the target lacks or is longer than its window."""
    if not answers:
        raise ConfigError("there is no answer to learn from; give prompts, 200 or more are of use")
    for answer in answers:
        if max(answer.ids) >= target.vocab_size:
            raise ConfigError(
                f"answer {answer.key} holds token {max(answer.ids)}, {target.name} has {target.vocab_size}: "
                "these answers are another model's; collect them again"
            )
        if len(answer.ids) > target.max_context_tokens:
            raise ConfigError(
                f"answer {answer.key} has {len(answer.ids)} tokens with its prompt, the window is {target.max_context_tokens}"
            )


def _load(target: ModelFolder, device: str) -> PreTrainedModel:
    model = check.load_torch(target, fp32=True)
    try:
        model = model.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:  # torch raises either, by the kind of device
        raise ConfigError(f"device is {device!r}, which torch cannot use here: {error}") from error
    return model.requires_grad_(False)


def _coverage(answers: Sequence[Answer], kept: set[int]) -> float:
    tokens = [token for answer in answers for token in answer.answer_ids]
    return sum(token in kept for token in tokens) / len(tokens)


def _digest(answers: Sequence[Answer]) -> str:
    digest = hashlib.sha256()
    for answer in answers:
        digest.update(json.dumps([answer.prompt_ids, answer.answer_ids], separators=(",", ":")).encode())
    return digest.hexdigest()
