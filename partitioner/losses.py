"""What quantizing a front and its boundary does to the text: measured agreement with the full target, by cut and bits."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Loss:
    """One measurement."""

    cut: int
    front: str  # format of the front's weights
    codec: str  # of the boundary
    loss: float  # share of tokens that are not the full target's
    kl: float | None = None  # nats a token

    def __post_init__(self) -> None:
        if not 0 <= self.loss <= 1:
            raise ValueError(f"loss is {self.loss}; it is a share from 0 to 1")


@dataclass(frozen=True, slots=True)
class Losses:
    """All measurements of a target."""

    measured: tuple[Loss, ...] = ()

    @classmethod
    def of(cls, measured: Iterable[Loss]) -> Losses:
        """Sorted by cut."""
        return cls(tuple(sorted(measured, key=lambda one: one.cut)))

    def loss(self, cut: int, front: str, codec: str) -> float | None:
        """As measured, or on the straight line between the cuts around; None: neither is there."""
        known = [one for one in self.measured if (one.front, one.codec) == (front, codec)]
        at = bisect_left([one.cut for one in known], cut)
        if at < len(known) and known[at].cut == cut:
            return known[at].loss
        if not 0 < at < len(known):
            return None
        below, above = known[at - 1], known[at]
        share = (cut - below.cut) / (above.cut - below.cut)
        return below.loss + share * (above.loss - below.loss)
