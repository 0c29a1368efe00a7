"""What the device knows of running a cut graph, from the runs themselves. Times in ms, clocks in s.

Everything is a function of what was observed and when, so it runs in virtual time as well. Times and bytes count for inputs of the
size of the first call's, and grow in proportion with others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from edgecloud.edge.estimates import LinkEstimate, Smoothed

SHARED = 0.6  # of a change in one cut's time, in the exponent, that the others are taken to share
NEW_RATE = 0.5  # weight of the latest transfer: it is exact, and a link changes at once
SMALL_BYTES = 2048  # a message that takes no time on the line worth knowing
USUAL_MS_PER_BYTE = 8e-4  # 10 Mbit/s, before anything was seen


class CutTimes:
    """Times of one machine for its part of each cut: the bundle's figures, corrected by what was measured."""

    def __init__(self, stated_ms: Mapping[str, float]) -> None:
        self._stated_ms = dict(stated_ms)
        self._seen: dict[str, Smoothed] = {}
        self._least_ms: dict[str, float] = {}
        self.seen_s: dict[str, float] = {}  # when the part last ran

    def add(self, name: str, elapsed_ms: float, now_s: float) -> None:
        """A run took this long, for inputs of size 1. What made it slower or faster does the same to longer and shorter ones."""
        self.seen_s[name] = now_s
        self._least_ms[name] = min(elapsed_ms, self._least_ms.get(name, elapsed_ms))
        seen = self._seen.setdefault(name, Smoothed())
        before_ms = seen.mean
        seen.add(elapsed_ms)
        if before_ms and seen.mean:
            for other, known in self._seen.items():
                if known is not seen and known.mean is not None and self._stated_ms[other] > 0:
                    tells = min(1.0, self._stated_ms[name] / self._stated_ms[other])  # what is short tells little of what is long
                    known.mean *= (seen.mean / before_ms) ** (SHARED * tells)

    def ms(self, name: str, *, hopeful: bool = False) -> float:
        """The part of this cut: as seen; else as stated, times what the parts seen took over what was stated of them.

        `hopeful`: as on its best day.
        """
        if name not in self._seen:
            return self._stated_ms[name] * self._factor
        mean = self._seen[name].mean or 0.0
        return min(mean, self._least_ms[name]) if hopeful else mean

    @property
    def _factor(self) -> float:
        stated = {name: self._stated_ms[name] for name in self._seen if self._stated_ms[name] > 0}
        seen_ms = sum(self._seen[name].mean or 0.0 for name in stated)
        return seen_ms / sum(stated.values()) if seen_ms else 1.0


class Rate:
    """What a byte takes in one direction of the link."""

    def __init__(self) -> None:
        self._ms_per_byte: float | None = None
        self._least: float = USUAL_MS_PER_BYTE

    def add(self, elapsed_ms: float, num_bytes: int) -> None:
        """A transfer, without the round trip."""
        if num_bytes <= SMALL_BYTES:
            return
        value = max(0.0, elapsed_ms) / num_bytes
        known = self._ms_per_byte
        self._least = value if known is None else min(self._least, value)
        self._ms_per_byte = value if known is None else known + NEW_RATE * (value - known)

    def ms(self, num_bytes: float, *, hopeful: bool = False) -> float:
        """So many bytes; `hopeful`: as on the best day."""
        known = USUAL_MS_PER_BYTE if self._ms_per_byte is None else self._ms_per_byte
        return num_bytes * (min(known, self._least) if hopeful else known)


@dataclass(slots=True)
class GraphEstimates:
    """All of it, for one service. `link` is shared with whoever else measures it."""

    link: LinkEstimate
    edge: CutTimes  # the device's graph, and encoding
    cloud: CutTimes  # decoding, and the cloud's graph
    uplink_bytes: dict[str, float]  # by cut
    downlink_bytes: dict[str, float]
    up: Rate = field(default_factory=Rate)
    down: Rate = field(default_factory=Rate)
    queue: Smoothed = field(default_factory=Smoothed)
    asked_s: float = -math.inf  # when the cloud was last seen at work
    alone_s: float = -math.inf  # when the device last ran it all

    def served(self, cut: str, size: float, trip: Trip, now_s: float) -> None:
        """The service has answered."""
        self.asked_s = now_s
        self.link.heard(now_s)
        rtt_ms = self.link.rtt_ms or 0.0
        self.up.add(trip.uplink_ms - rtt_ms, trip.uplink_bytes)
        self.down.add(trip.downlink_ms, trip.downlink_bytes)
        self.queue.add(trip.queue_ms)
        self.cloud.add(cut, trip.cloud_ms / size, now_s)
        self.uplink_bytes[cut] = trip.uplink_bytes / size
        self.downlink_bytes[cut] = trip.downlink_bytes / size

    def unanswered(self, elapsed_ms: float, num_bytes: int, now_s: float) -> None:
        """The service had not even received the request after this time."""
        self.asked_s = now_s
        self.up.add(elapsed_ms - (self.link.rtt_ms or 0.0), num_bytes)


@dataclass(frozen=True, slots=True)
class Trip:
    """A call of the service, as both sides saw it."""

    uplink_ms: float  # until the device knew that the service had the request
    queue_ms: float
    cloud_ms: float
    downlink_ms: float
    uplink_bytes: int
    downlink_bytes: int
    num_batched: int
