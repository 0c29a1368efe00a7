"""What quantizing a front and its boundary does to the text: measured agreement with the full target, by cut and bits."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgecloud.errors import ConfigError
from edgecloud.partitioner.strict import from_mapping

if TYPE_CHECKING:
    from edgecloud.partitioner.front_check import FrontQuality

EXACT = "float32"  # codec and front that change nothing


@dataclass(frozen=True, slots=True)
class Loss:
    """One measurement: a front and a codec at a cut against the full target."""

    cut: int
    codec: str  # of the boundary
    agreement: float  # share of tokens that are the full target's
    front: str = EXACT  # format of the front's weights; by itself: the target's own
    kl_nats: float | None = None  # mean over positions
    max_kl_nats: float | None = None
    bytes_per_position: int | None = None
    num_positions: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.agreement <= 1:
            raise ValueError(f"agreement is {self.agreement}; it is a share from 0 to 1")


@dataclass(frozen=True, slots=True)
class Losses:
    """All measurements of a target."""

    measured: tuple[Loss, ...] = ()  # a survey: what lies between two of its cuts is read off it
    tried: tuple[Loss, ...] = ()  # exported fronts, each for its own cut only

    @property
    def known(self) -> tuple[Loss, ...]:
        """Of either kind."""
        return *self.measured, *self.tried

    def loss(self, cut: int, front: str, codec: str) -> float | None:
        """Share of tokens that differ: measured together, else front and boundary each by itself, added; None: not measured.

        Between the survey's cuts on a straight line, never beyond them.
        """
        for one in self.tried:
            if (one.cut, one.front, one.codec) == (cut, front, codec):
                return 1 - one.agreement
        together = self._at(cut, front, codec)
        if together is not None:
            return together
        alone = self._at(cut, front, EXACT), self._at(cut, EXACT, codec)
        return None if alone[0] is None or alone[1] is None else min(1.0, alone[0] + alone[1])

    def _at(self, cut: int, front: str, codec: str) -> float | None:
        known = sorted((one.cut, 1 - one.agreement) for one in self.measured if (one.front, one.codec) == (front, codec))
        at = bisect_left(known, (cut, -1.0))
        if at < len(known) and known[at][0] == cut:
            return known[at][1]
        if not 0 < at < len(known):
            return None
        (below, low), (above, high) = known[at - 1], known[at]
        return low + (cut - below) / (above - below) * (high - low)


def read_losses(path: Path) -> Losses:
    """A JSON list of objects such as {"cut": 10, "codec": "int8", "front": "int8", "agreement": 0.98, "kl_nats": 0.002}.

    Raises:
        ConfigError: unreadable, or an entry that cannot be.
    """
    try:
        content: Any = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"--damage {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"--damage {path} is no JSON: {error}") from error
    if not isinstance(content, list):
        raise ConfigError(f"--damage {path} holds a {type(content).__name__}; it takes a list of measurements")
    return losses_of(content, f"--damage {path}")


def losses_of(entries: Sequence[Any] | Iterable[Any], where: str) -> Losses:
    """From objects as in a file or a bundle. Raises ConfigError that says where."""
    try:
        return Losses(tuple(from_mapping(Loss, entry, f"[{at}]") for at, entry in enumerate(entries)))
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def losses_of_front(cut: int, front: str, qualities: Mapping[str, FrontQuality]) -> list[Loss]:
    """One for each boundary."""
    return [
        Loss(
            cut, codec, one.agreement, front, one.kl_nats,
            bytes_per_position=one.bytes_per_position, num_positions=one.num_positions,
        )
        for codec, one in qualities.items()
    ]  # fmt: skip
