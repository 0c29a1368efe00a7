"""What a device may keep, if its user wants that, of the target's corrections to its draft: the log from which the draft learns.

A folder of JSON Lines. Every segment begins with what it was logged with (models and day); a line is a passage, token ids and the
guesses in it that the target refused. Nothing but the standard library: a device writes it, the offline tools read it.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgecloud.errors import ConfigError, RejectionLogError

VERSION = 1
LOCK = "lock"
NUM_SEGMENTS = 8  # what the cap is divided into: dropping the oldest loses an eighth
MIN_BYTES, DEFAULT_MAX_BYTES = 1 << 16, 4 << 20
CLEAR = "clear it with `edgecloud rejections FOLDER --clear`"


@dataclass(frozen=True, slots=True)
class Passage:
    """A stretch of one generation. `rejected` holds (position, the draft's id): the target's own id stands in `ids` there."""

    ids: tuple[int, ...]
    answer_start: int  # ids before it are prompt, or answer that an earlier passage holds; from it on the target chose each
    rejected: tuple[tuple[int, int], ...]
    temperature: float

    def __post_init__(self) -> None:
        if not all(_is_id(token) for token in self.ids):
            raise ValueError("ids are whole numbers from 0")
        if not 0 < self.answer_start <= len(self.ids):
            raise ValueError(f"answer_start is {self.answer_start!r}, it lies within the {len(self.ids)} ids")
        positions = [position for position, _ in self.rejected]
        rising = positions == sorted(set(positions)) and set(positions) <= set(range(self.answer_start, len(self.ids)))
        if not positions or not rising:
            raise ValueError(f"rejected positions are {positions}, they rise from answer_start to the last of the ids")
        if any(not _is_id(draft) or self.ids[position] == draft for position, draft in self.rejected):
            raise ValueError("a rejected guess is an id that differs from the target's")
        if isinstance(self.temperature, bool) or not isinstance(self.temperature, int | float) or not 0 <= self.temperature < 1e3:
            raise ValueError(f"temperature is {self.temperature!r}, it is a number from 0")


@dataclass(frozen=True, slots=True)
class Source:
    """What a segment was logged with: fingerprints of both models and of their tokenizer."""

    target: str
    draft: str
    tokenizer: str


@dataclass(frozen=True, slots=True)
class Segment:
    """A file of the log, read."""

    path: Path
    source: Source
    day: str
    passages: list[Passage]


class RejectionLog:
    """The log in `folder`. No file is read or written before the first use; several processes may write at once.

    Args:
        folder: made at the first `add`, readable by its owner only.
        max_bytes: of all segments together; the oldest goes when they would be more.

    Raises:
        ConfigError: `max_bytes` is too small.
    """

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < MIN_BYTES:
            raise ConfigError(f"max_bytes of the rejection log is {max_bytes!r}; it takes a whole number from {MIN_BYTES}")
        self.folder = Path(folder)
        self._max_bytes = max_bytes

    def prepare(self) -> None:
        """Make the folder. Raises ConfigError when it cannot be written to."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._alone():
                pass
        except OSError as error:
            raise ConfigError(f"{self.folder} cannot hold a rejection log: {error.strerror}; name another folder") from error

    def add(self, source: Source, passage: Passage) -> None:
        """Append a passage, in one write. A passage too long for a segment of its own is left out. Raises OSError."""
        line = _line(asdict(passage))
        head = _line({"version": VERSION, "day": datetime.now(UTC).date().isoformat(), **asdict(source)})
        most = self._max_bytes // NUM_SEGMENTS
        if len(head) + len(line) > most:
            return
        with self._alone():
            paths = self._paths()
            last = paths[-1] if paths else None
            if last is None or not _continues(last, head) or last.stat().st_size + len(line) > most:
                last = self.folder / f"{int(last.stem) + 1 if last else 1:08}.jsonl"
                line = head + line
                paths.append(last)
            sizes = {path: path.stat().st_size if path.exists() else 0 for path in paths}
            for path in paths[:-1]:
                if sum(sizes.values()) + len(line) <= self._max_bytes:
                    break
                path.unlink()
                del sizes[path]
            _append(last, line)

    def read(self) -> list[Segment]:
        """Every whole passage, oldest first. What a killed process left unfinished at a segment's end is skipped.

        Raises:
            RejectionLogError: there is no log, or a file in it is not one.
        """
        if not self.folder.is_dir():
            raise RejectionLogError(f"{self.folder} is no folder; a client writes a log there with learn_from, or --log-rejections")
        return [segment for path in self._paths() if (segment := _read(path)) is not None]

    def num_bytes(self) -> int:
        """Of all segments."""
        return sum(path.stat().st_size for path in self._paths())

    def clear(self) -> int:
        """Delete every segment.  -> how many there were"""
        if not self.folder.is_dir():
            return 0
        with self._alone():
            paths = self._paths()
            for path in paths:
                path.unlink()
        return len(paths)

    def _paths(self) -> list[Path]:
        return sorted((path for path in self.folder.glob("*.jsonl") if path.stem.isdecimal()), key=lambda path: int(path.stem))

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes and threads out. The kernel gives the lock back however this process ends."""
        lock = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _line(content: dict[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode() + b"\n"


def _continues(path: Path, head: bytes) -> bool:
    """Whether a segment has this head, and no process died at its last line."""
    with path.open("rb") as file:
        if file.read(len(head)) != head:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _append(path: Path, line: bytes) -> None:
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        rest = memoryview(line)
        while rest:
            rest = rest[os.write(file, rest) :]
    finally:
        os.close(file)


def _read(path: Path) -> Segment | None:
    lines = path.read_bytes().split(b"\n")[:-1]  # behind the last line feed stands nothing, or what was torn
    if not lines:
        return None
    try:
        source, day = _head(json.loads(lines[0]))
        return Segment(path, source, day, [_passage(json.loads(line)) for line in lines[1:]])
    except (ValueError, KeyError, TypeError) as error:
        raise RejectionLogError(f"{path} is no segment of a rejection log: {error}; delete it, or {CLEAR}") from error


def _head(content: dict[str, Any]) -> tuple[Source, str]:
    if not isinstance(content, dict) or content.pop("version", None) != VERSION:
        raise ValueError(f"its first line does not say version {VERSION}")
    if not all(isinstance(value, str) for value in content.values()):
        raise ValueError("a fingerprint is no string")
    day = content.pop("day")
    return Source(**content), day


def _passage(content: dict[str, Any]) -> Passage:
    if not isinstance(content, dict):
        raise TypeError("a line is no JSON object")
    rejected: Sequence[Sequence[int]] = content.pop("rejected")
    pairs = tuple((position, draft) for position, draft in rejected)
    return Passage(ids=tuple(content.pop("ids")), rejected=pairs, **content)
