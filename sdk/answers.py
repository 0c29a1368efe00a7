"""The target's own answers, which a draft learns from: a JSON object a line, so that a collection broken off goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from edgecloud.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Question:
    """What the target is asked.

    With `closing_ids` the prompt is only the opening of a chat: the target first goes on with it itself, at temperature 1, to its
    own stop token, and answers after these.
    """

    key: str
    prompt_ids: list[int]
    temperature: float = 0.0
    seed: int = 0
    closing_ids: list[int] | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """A prompt's tokens, what the target says next, and how that was chosen. `key` names the prompt and the settings."""

    key: str
    prompt_ids: list[int]
    answer_ids: list[int]
    temperature: float

    @property
    def ids(self) -> list[int]:
        """Prompt and answer."""
        return self.prompt_ids + self.answer_ids


class AnswerFile:
    """Answers on disk. One process appends; a line torn by a crash is cut off when the file is opened for that."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[Answer]:
        """Every whole answer. Raises ConfigError: a line in the middle is something else; names it."""
        for number, line in enumerate(self._whole_lines(), 1):
            yield _read(line, f"{self.path}, line {number}")

    def append_to(self) -> Appender:
        """Open it to add answers."""
        return Appender(self.path, sum(len(line) for line in self._whole_lines()))

    def _whole_lines(self) -> list[bytes]:
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().splitlines(keepends=True)
        return lines if not lines or lines[-1].endswith(b"\n") else lines[:-1]


class Appender:
    """A context manager over the open file; an answer is on disk, as far as this process goes, when `add` returns."""

    def __init__(self, path: Path, num_bytes: int) -> None:
        self._path, self._num_bytes = path, num_bytes

    def __enter__(self) -> Appender:
        """Cut off what was torn."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("ab")
        self._file.truncate(self._num_bytes)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close it."""
        self._file.close()

    def add(self, answer: Answer) -> None:
        """Append one."""
        self._file.write(json.dumps(asdict(answer), separators=(",", ":")).encode() + b"\n")
        self._file.flush()


def _read(line: bytes, where: str) -> Answer:
    try:
        content: Any = json.loads(line)
        answer = Answer(**content)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{where} is no answer ({error}); collect the answers again") from error
    ids = answer.prompt_ids, answer.answer_ids
    if not all(isinstance(part, list) and part and all(isinstance(token, int) and token >= 0 for token in part) for part in ids):
        raise ConfigError(f"{where} holds no token ids, or none at all; collect the answers again")
    return answer
