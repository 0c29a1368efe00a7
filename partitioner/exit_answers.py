"""What an exit head learns from: prompts, built in or from a file, and the target's own greedy answers to them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from edgecloud.errors import ConfigError
from edgecloud.prompts import PROMPTS, read_prompts

BUILT_IN = "built-in"
MAX_ANSWER_TOKENS = 128  # of one answer that is generated for this
HELD_OUT = 8  # one prompt in so many is kept out of the training
MIN_PROMPTS = 4  # different ones
T = TypeVar("T")


class Answer(NamedTuple):
    """A prompt's tokens, and the target's greedy continuation."""

    prompt_ids: list[int]
    answer_ids: list[int]


@dataclass(frozen=True, slots=True)
class ExitSource:
    """Prompts to be answered, or answers; never both."""

    prompts: tuple[str, ...] = ()
    answers: tuple[Answer, ...] = ()

    @property
    def digest(self) -> str:
        """Of all of it."""
        return hashlib.sha256(json.dumps([self.prompts, self.answers]).encode()).hexdigest()


def read_exit_source(name: str, vocab_size: int) -> ExitSource:
    """Of a file, or the built-in prompts.

    The file holds a prompt a line; or is a .jsonl of prompts, or of answers with `prompt_ids` and `answer_ids`, of which those
    at temperature 0 are taken.

    Raises:
        ConfigError: the file holds something else, ids that the target lacks, or too few.
    """
    if name == BUILT_IN:
        return ExitSource(prompts=PROMPTS)
    file = Path(name)
    answers = _read_answers(file, vocab_size) if _holds_answers(file) else []
    prompts = [] if answers else list(dict.fromkeys(read_prompts(file)))
    num = len(answers) or len(prompts)
    if num < MIN_PROMPTS:
        raise ConfigError(f"--exit-head {name} holds {num} different prompts; give {MIN_PROMPTS} or more, hundreds are of use")
    return ExitSource(tuple(prompts), tuple(answers))


def divide(answers: Sequence[T]) -> tuple[list[T], list[T]]:
    """-> to learn from, to examine by: every so many, for files go by topic"""
    held_out = set(range(HELD_OUT // 2, len(answers), HELD_OUT)) or {0}
    return [a for n, a in enumerate(answers) if n not in held_out], [a for n, a in enumerate(answers) if n in held_out]


def frequent_ids(sequences: Iterable[Sequence[int]], num_kept: int, num_tokens: int, always: Collection[int]) -> list[int]:
    """The most frequent ids, those of `always` among them, rising.

    Ids that never occur come in the order of their numbers: tokenizers made by merging number the frequent ones first.
    """
    counts = Counter(token for sequence in sequences for token in sequence)
    ranked = sorted(range(num_tokens), key=lambda token: (token not in always, -counts[token], token))
    return sorted(ranked[: max(num_kept, len(always))])


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
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            content = json.loads(line)
            prompt, answer = content["prompt_ids"], content["answer_ids"]
            greedy = content.get("temperature", 0.0) == 0.0
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"--exit-head {file}, line {number} is no answer ({error}); collect the answers again") from error
        for part in (prompt, answer):
            if not isinstance(part, list) or not part or not all(type(token) is int and 0 <= token < vocab_size for token in part):
                raise ConfigError(
                    f"--exit-head {file}, line {number} holds no ids of this target, which are 0 to {vocab_size - 1}; "
                    "collect the answers of this target"
                )
        if greedy:
            found.setdefault(tuple(prompt), Answer(prompt, answer))
    return list(found.values())
