"""The graph controller: at every call it picks the cut that its estimates promise to be fastest.

A pure function of what was observed and of what it chose last, so that it runs in virtual time.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from edgecloud.edge.graph_estimates import GraphEstimates
from edgecloud.graph_bundle import CutInfo

OTHER_CUT = 0.93  # of the present cut's promise: what another must promise to be switched to
USUAL_RTT_MS = 50.0  # before anything was seen
AGED_S, LONGEST_AGED_S = 10.0, 160.0  # a cloud not asked for longer may have become faster, and so may the way to it
NOBODY: Mapping[str, float] = MappingProxyType({})
WORTH = 0.9  # of what the device takes alone: what the cloud must promise on its best day to be tried again


@dataclass(frozen=True, slots=True)
class Price:
    """What a run is expected to take, part by part."""

    cut: str
    edge_ms: float
    link_ms: float  # round trip and transfers
    queue_ms: float
    cloud_ms: float

    @property
    def total_ms(self) -> float:
        """All of it."""
        return self.edge_ms + self.link_ms + self.queue_ms + self.cloud_ms


@dataclass(frozen=True, slots=True)
class Choice:
    """A cut, what it promises, and whether it is chosen only to see if things have become better."""

    price: Price
    is_trial: bool = False


class GraphController:
    """Chooses among the cuts of a bundle. Whoever may leave at an exit of some of them says what share does: `leaving`, by cut.

    Args:
        cuts: of the bundle.
        chosen: the one that the bundle was planned for; what it starts with unless another promises clearly more.
        estimates: fed by others, with what runs took.
    """

    def __init__(self, cuts: Sequence[CutInfo], chosen: str, estimates: GraphEstimates) -> None:
        self._needs_cloud = {cut.name: cut.cloud is not None for cut in cuts}
        self._estimates = estimates
        self._present = chosen
        self._is_first = True
        self._aged_s = {True: AGED_S, False: AGED_S}  # by whether it is the cloud that is to be tried again

    def choose(self, now_s: float, size: float, allowed: Collection[str], leaving: Mapping[str, float] = NOBODY) -> Choice:
        """The cut for inputs of this size, out of `allowed`, which must not be empty."""
        prices = [self.price(name, size, now_s, leaving) for name in allowed]
        best = min(prices, key=lambda price: price.total_ms)
        present = next((price for price in prices if price.cut == self._present), None)
        if present is not None and best.total_ms > OTHER_CUT * present.total_ms:
            best = present
        trial = None if self._is_first else self._trial(best, now_s, size, allowed, leaving)
        self._is_first = False
        if trial is not None:
            return Choice(trial, is_trial=True)
        self._present = best.cut
        return Choice(best)

    def _trial(
        self, best: Price, now_s: float, size: float, allowed: Collection[str], leaving: Mapping[str, float]
    ) -> Price | None:
        """While the device does it all the cloud may have become faster, and the other way round."""
        cloud_idle = not self._needs_cloud[best.cut]
        seen_s = self._estimates.asked_s if cloud_idle else self._estimates.alone_s
        if now_s - seen_s <= self._aged_s[cloud_idle]:
            return None
        others = [name for name in allowed if self._needs_cloud[name] is cloud_idle]
        hopeful = [self.price(name, size, now_s, leaving, hopeful=True) for name in others]
        worth_it = [price for price in hopeful if price.total_ms < WORTH * best.total_ms]
        # the one that sends least: if the link is bad after all, it costs least to learn it, and the others' prices follow
        return min(worth_it, key=lambda price: self._estimates.uplink_bytes[price.cut], default=None)

    def tried(self, choice: Choice, elapsed_ms: float, size: float, now_s: float) -> None:
        """A trial took this long: the next one comes soon if it was worth it, later if not."""
        if not choice.is_trial:
            return
        of_cloud = self._needs_cloud[choice.price.cut]
        others = [self.price(name, size, now_s).total_ms for name, needs in self._needs_cloud.items() if needs is not of_cloud]
        failed = bool(others) and elapsed_ms > min(others)
        self._aged_s[of_cloud] = min(LONGEST_AGED_S, 2 * self._aged_s[of_cloud]) if failed else AGED_S

    def price(self, name: str, size: float, now_s: float, leaving: Mapping[str, float] = NOBODY, *, hopeful: bool = False) -> Price:
        """What a run with this cut is expected to take; `hopeful`: with everything as on its best day."""
        known = self._estimates
        edge_ms = known.edge.ms(name, hopeful=hopeful) * size
        if not self._needs_cloud[name]:
            return Price(name, edge_ms, 0.0, 0.0, 0.0)
        up_ms = known.up.ms(known.uplink_bytes[name] * size, hopeful=hopeful)
        down_ms = known.down.ms(known.downlink_bytes[name] * size, hopeful=hopeful)
        queue_ms = 0.0 if hopeful else known.queue.mean or 0.0
        cloud_ms = known.cloud.ms(name, hopeful=hopeful) * size
        link_ms = self._rtt_ms(now_s, hopeful) + up_ms + down_ms
        goes_on = 1.0 - leaving.get(name, 0.0)
        return Price(name, edge_ms, goes_on * link_ms, goes_on * queue_ms, goes_on * cloud_ms)

    def _rtt_ms(self, now_s: float, hopeful: bool) -> float:
        link = self._estimates.link
        if link.rtt_ms is None or link.least_rtt_ms is None:
            return USUAL_RTT_MS
        return link.least_rtt_ms if hopeful or now_s - link.observed_s > AGED_S else link.rtt_ms
