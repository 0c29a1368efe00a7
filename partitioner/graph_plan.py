"""Which cuts a bundle keeps, and which of them is chosen: predicted first, then every half timed here, side by side."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from edgecloud.errors import ConfigError
from edgecloud.graph_bundle import BoundaryTensor, CutInfo
from edgecloud.partitioner.boundary import encoded_bytes
from edgecloud.partitioner.cut_planner import NS, Candidate, Choice
from edgecloud.partitioner.cut_search import smallest_ram_bytes
from edgecloud.partitioner.dag import ram_bytes
from edgecloud.partitioner.graph_prepare import Prepared, Remark
from edgecloud.partitioner.graph_report import Region
from edgecloud.partitioner.graph_request import GraphRequest
from edgecloud.partitioner.link_spec import LinkSpec
from edgecloud.partitioner.ort_session import Session
from edgecloud.partitioner.samples import Sample

MAX_CUTS = 6  # in a bundle, edge only and cloud only among them
SWEEP_MBPS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
SWEEP_RTT_MS = (5.0, 20.0, 50.0, 100.0, 200.0)
CLEARLY = 0.95  # of what the device takes alone: times are not known better, and a cloud can be away
MIN_ROUNDS, MAX_ROUNDS = 5, 30  # of timing all halves in turn


@dataclass(frozen=True, slots=True)
class Plan:
    """What goes into the bundle."""

    cuts: list[tuple[CutInfo, Candidate]]
    chosen: str  # name of the best for the stated link, by measured times
    proven: bool  # whether the search has shown that no cut has a better prediction
    bound_ms: float  # no cut is predicted to cost less
    regions: list[Region]
    lost_exits: list[str]  # those that no cut can be made at


def make_plan(prepared: Prepared, remark: Remark) -> Plan:
    """Search, check against the samples, time.

    Raises:
        ConfigError: nothing keeps to the limits; names the smallest memory that would do.
        ModelError: a half does not run or computes something else than the whole.
    """
    request, planner = prepared.request, prepared.planner
    remark(f"the best cut for {request.link}")
    first = planner.choose(request.link)
    if first is None:
        raise ConfigError(_why_nothing_fits(prepared))
    remark(f"the best cuts from {SWEEP_MBPS[0]:g} to {SWEEP_MBPS[-1]:g} Mbit/s")
    choices = [planner.choose(request.link.scaled(mbps, request.link.rtt_ms)) for mbps in SWEEP_MBPS]
    exits = {name: planner.at(edge, request.link) for name, edge in prepared.exit_edges().items()}
    kept = [candidate for candidate in exits.values() if candidate is not None]
    if not kept and all(
        choice is None or choice.candidate.edge in (frozenset(), prepared.dag.whole) for choice in [first, *choices]
    ):
        choices.append(planner.choose(request.link, divided=True))  # so that a cut is there when a machine slows down
    candidates = _select(prepared, first, [choice.candidate for choice in choices if choice is not None], kept)
    for name, candidate in candidates.items():
        remark(f"checking {name}")
        planner.accuracy.require_same_nodes(candidate.halves)
    remark(f"timing {len(candidates)} cuts")
    times = _time(prepared, candidates)
    infos = {name: _info(prepared, name, candidate, *times[name]) for name, candidate in candidates.items()}
    chosen = cheapest(list(infos.values()), request)
    if chosen not in ("edge", "cloud"):  # it lies where everyone looks first
        infos[chosen] = replace(infos[chosen], edge="edge/edge.onnx", cloud="cloud/cloud.onnx")
    cuts = [(infos[name], candidates[name]) for name in candidates]
    lost = [name for name, candidate in exits.items() if candidate is None]
    return Plan(cuts, chosen, first.proven, first.bound / NS, _regions(list(infos.values()), request), lost)


def cheapest(cuts: Sequence[CutInfo], request: GraphRequest, link: LinkSpec | None = None) -> str:
    """The name of the cut to take: the device alone, unless another one is clearly cheaper."""
    costs = {cut.name: cost_ms(cut, request, link) for cut in cuts}
    best = min(costs, key=costs.__getitem__)
    return "edge" if costs.get("edge", math.inf) * CLEARLY <= costs[best] else best


def cost_ms(cut: CutInfo, request: GraphRequest, link: LinkSpec | None = None) -> float:
    """Latency of a run, or the slowest stage of a pipeline, from what was measured."""
    link = link or request.link
    up_ms, down_ms = link.up_ms(cut.boundary_bytes), link.down_ms(cut.output_bytes)
    if request.objective == "throughput":
        return max(cut.edge_ms + cut.codec_ms, up_ms, cut.cloud_ms, down_ms)
    return cut.edge_ms + cut.codec_ms + up_ms + cut.cloud_ms + down_ms + (link.call_ms if cut.cloud is not None else 0.0)


def _select(prepared: Prepared, first: Choice, others: Sequence[Candidate], exits: Sequence[Candidate]) -> dict[str, Candidate]:
    """Edge only, cloud only, those at exits, the best for the stated link, and those that win on most other links."""
    planner, request = prepared.planner, prepared.request
    pool = list(dict.fromkeys([first.candidate, *others, *planner.good()]))
    arms: dict[str, Candidate] = {}
    for name, edge in (("edge", prepared.dag.whole), ("cloud", frozenset[int]())):
        if planner.problem(request.link, {}).allows(edge):
            pool.append(planner.try_cut(edge, {}))
        alike = [candidate for candidate in pool if candidate.edge == edge]  # of cloud only, also with coded inputs
        if alike:
            arms[name] = min(alike, key=lambda candidate: planner.cost(candidate, request.link))
    wins = dict.fromkeys(pool, 0)
    for mbps in SWEEP_MBPS:
        for rtt_ms in SWEEP_RTT_MS:
            wins[_cheapest(prepared, pool, request.link.scaled(mbps, rtt_ms))] += 1
    divided = [candidate for candidate in pool if candidate.edge not in (frozenset(), prepared.dag.whole)]
    ranked = sorted(dict.fromkeys(divided), key=lambda candidate: (candidate != first.candidate, -wins[candidate]))
    useful = [candidate for candidate in ranked if wins[candidate] or candidate == first.candidate]
    places = max(1, MAX_CUTS - len(arms) - len(exits))
    for candidate in dict.fromkeys([*exits, *(useful or ranked[:1])[:places]]):
        arms[f"cut-{1 + sum(name.startswith('cut-') for name in arms)}"] = candidate
    return arms


def _cheapest(prepared: Prepared, pool: Sequence[Candidate], link: LinkSpec) -> Candidate:
    return min(pool, key=lambda candidate: prepared.planner.cost(candidate, link))


def _time(prepared: Prepared, candidates: dict[str, Candidate]) -> dict[str, tuple[float, float]]:
    """Milliseconds of both halves of every cut: medians over rounds in which each has its turn on the same machine."""
    sample, scale = prepared.samples[0], 1.0
    runs: dict[tuple[str, str], Callable[[], object]] = {}
    for name, candidate in candidates.items():
        held: Sample = dict(sample)
        if candidate.halves.edge is not None:
            front = Session(candidate.halves.edge, prepared.num_threads)
            held |= front.run(sample)
            runs[name, "edge"] = _bound(front, sample)
        if candidate.halves.cloud is not None:
            runs[name, "cloud"] = _bound(Session(candidate.halves.cloud, prepared.num_threads), held)
    if prepared.request.device_profile is not None:  # of another device: what is timed here is scaled to it
        runs["", "whole"] = _bound(Session(prepared.model.proto, prepared.num_threads), sample)
    spent: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    end = time.monotonic() + prepared.request.timing_s
    for done in range(MAX_ROUNDS):
        for key, run in runs.items():
            begin = time.perf_counter()
            run()
            spent[key].append(1e3 * (time.perf_counter() - begin))
        if done + 1 >= MIN_ROUNDS and time.monotonic() > end:
            break
    medians = {key: statistics.median(times[1:]) for key, times in spent.items()}
    if ("", "whole") in medians:
        scale = prepared.device.total_ms / medians["", "whole"]
    return {
        name: (scale * medians.get((name, "edge"), 0.0), scale * prepared.cloud_share * medians.get((name, "cloud"), 0.0))
        for name in candidates
    }


def _bound(session: Session, values: Sample) -> Callable[[], object]:
    return lambda: session.run(values)


def _info(prepared: Prepared, name: str, candidate: Candidate, edge_ms: float, cloud_ms: float) -> CutInfo:
    halves, speeds = candidate.halves, prepared.planner.speeds
    facts = {tensor: prepared.facts[tensor] for tensor, _ in candidate.codecs}
    codec_ns = sum(facts[t].num_bytes // 4 * (speeds[codec].encode_ns + speeds[codec].decode_ns) for t, codec in candidate.codecs)
    return CutInfo(
        name=name,
        edge=None if halves.edge is None else "edge/whole.onnx" if name == "edge" else f"edge/cuts/{name}/edge.onnx",
        cloud=None if halves.cloud is None else "cloud/whole.onnx" if name == "cloud" else f"cloud/cuts/{name}/cloud.onnx",
        boundary=[BoundaryTensor(t, facts[t].dtype, facts[t].symbolic, codec) for t, codec in candidate.codecs],
        edge_outputs=halves.edge_outputs,
        cloud_outputs=halves.cloud_outputs,
        edge_ms=round(edge_ms, 4),
        cloud_ms=round(cloud_ms, 4),
        codec_ms=round(codec_ns / NS, 4),
        boundary_bytes=sum(encoded_bytes(facts[tensor], codec) for tensor, codec in candidate.codecs),
        output_bytes=sum(prepared.facts[tensor].num_bytes for tensor in halves.cloud_outputs),
        edge_ram_bytes=ram_bytes(prepared.dag, candidate.edge),
        max_error=candidate.damage.max_error,
        loss=candidate.damage.loss,
    )


def _regions(cuts: Sequence[CutInfo], request: GraphRequest) -> list[Region]:
    found = []
    for rtt_ms in SWEEP_RTT_MS:
        for mbps in SWEEP_MBPS:
            link = request.link.scaled(mbps, rtt_ms)
            best = cheapest(cuts, request, link)
            best_ms = cost_ms(next(cut for cut in cuts if cut.name == best), request, link)
            found.append(Region(link.up_mbps or 0.0, link.down_mbps or 0.0, rtt_ms, best, round(best_ms, 3)))
    return found


def _why_nothing_fits(prepared: Prepared) -> str:
    smallest, budget, model = smallest_ram_bytes(prepared.dag), prepared.request.max_ram_bytes, prepared.model.path
    if smallest is None:
        return f"no cut of {model} respects the pins {dict(prepared.request.pins)}; drop one of them"
    if budget is not None and smallest > budget:
        return f"--max-ram of {budget} bytes is too little for any cut of {model}; the smallest that would do is {smallest} bytes"
    return f"no cut of {model} was found within --max-ram and --max-loss {prepared.request.max_loss:g}; allow more of one of them"
