"""The same search over many links: where in the plane of round trip and bandwidth which plan wins, and what a cut costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgecloud.errors import NoPlanError
from edgecloud.partitioner.candidate import Connection
from edgecloud.partitioner.prediction import Predictor
from edgecloud.partitioner.search import Constraints, Judged, PlanObjective, Search, search_over

FEW_RTT_MS, FEW_MBPS = (5.0, 20.0, 75.0, 200.0), (1.0, 10.0, 100.0)  # of the table in --json
RTT_MS = (1.0, 2.0, 4.0, 7.0, 12.0, 20.0, 35.0, 60.0, 100.0, 170.0, 300.0)  # of the drawing
MBPS = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 300.0)


@dataclass(frozen=True, slots=True)
class Place:
    """A link and the plan that wins there."""

    rtt_ms: float
    up_mbps: float
    best: Judged | None  # None: no plan keeps to the constraints


def over_links(
    predictor: Predictor, objective: PlanObjective, constraints: Constraints, rtt_ms: Sequence[float], mbps: Sequence[float]
) -> list[Place]:
    """The plan at every point of the grid, by bandwidth, then by round trip."""
    places = []
    for up_mbps in mbps:
        for trip_ms in rtt_ms:
            link = Connection(f"{trip_ms:g}ms, {up_mbps:g}mbit", trip_ms, up_mbps)
            try:
                best = search_over(predictor, link, objective, constraints).best
            except NoPlanError:
                best = None
            places.append(Place(trip_ms, up_mbps, best))
    return places


def best_by_cut(search: Search) -> dict[int, Judged]:
    """For every cut the split that comes out best, whether or not it may be: the front's bits, the codec and K chosen freely."""
    best: dict[int, Judged] = {}
    for judged in search.judged:  # what may be comes first
        if judged.candidate.mode == "split":
            best.setdefault(judged.candidate.cut, judged)
    return dict(sorted(best.items()))
