"""What an exit head learns from: prompts, built in or from a file, and the target's own greedy answers to them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from edgecloud.answers import Answer, AnswerFile
from edgecloud.errors import ConfigError
from edgecloud.prompts import PROMPTS, read_prompts

BUILT_IN = "built-in"
MAX_ANSWER_TOKENS = 128  # of one answer that is generated for this
HELD_OUT = 8  # one prompt in so many is kept out of the training
MIN_PROMPTS = 4  # different ones

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ExitSource:
    """Prompts to be answered, or answers; never both."""

    prompts: tuple[str, ...] = ()
    answers: tuple[Answer, ...] = ()

    @property
    def digest(self) -> str:
        """Of all of it."""
        return hashlib.sha256(json.dumps([self.prompts, [asdict(answer) for answer in self.answers]]).encode()).hexdigest()


def read_exit_source(name: str, vocab_size: int) -> ExitSource:
    """Of a file, or the built-in prompts.

    The file holds a prompt a line; or is a .jsonl of prompts, or of answers as `edgecloud distill` collects them, of which one at
    temperature 0 is taken for each prompt.

    Raises:
        ConfigError: the file holds something else, ids that the target lacks, or too few.
    """
    if name == BUILT_IN:
        return ExitSource(prompts=PROMPTS)
    file = Path(name)
    answers = _read_answers(file, vocab_size) if _holds_answers(file) else None
    prompts = list(dict.fromkeys(read_prompts(file, "--exit-head"))) if answers is None else []
    num = len(prompts) if answers is None else len(answers)
    if num < MIN_PROMPTS:
        what = "different prompts" if answers is None else "answers at temperature 0 to different prompts"
        raise ConfigError(f"--exit-head {name} holds {num} {what}; give {MIN_PROMPTS} or more, hundreds are of use")
    return ExitSource(tuple(prompts), tuple(answers or ()))


def divide(answers: Sequence[T]) -> tuple[list[T], list[T]]:
    """-> to learn from, to examine by: one in so many, for files go by topic"""
    held_out = set(range(HELD_OUT // 2, len(answers), HELD_OUT)) or {0}
    return [a for n, a in enumerate(answers) if n not in held_out], [a for n, a in enumerate(answers) if n in held_out]


def _holds_answers(file: Path) -> bool:
    """By its first line; what cannot be read is left to `read_prompts`, which says so."""
    if file.suffix != ".jsonl":
        return False
    try:
        with file.open("rb") as lines:
            first: Any = json.loads(lines.readline())
    except (OSError, ValueError):
        return False
    return isinstance(first, dict) and "prompt_ids" in first


def _read_answers(file: Path, vocab_size: int) -> list[Answer]:
    found: dict[tuple[int, ...], Answer] = {}
    for answer in AnswerFile(file):
        if (largest := max(answer.ids)) >= vocab_size:
            raise ConfigError(
                f"--exit-head {file}: {answer.key} holds id {largest}, the target has 0 to {vocab_size - 1}; "
                "collect the answers of this target"
            )
        if answer.temperature == 0:
            found.setdefault(tuple(answer.prompt_ids), answer)
    return list(found.values())
