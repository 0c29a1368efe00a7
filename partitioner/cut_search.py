"""The best cut for an objective under limits, with a bound that says how good the best possible one could be.

Latency without a limit is one minimum cut. A limit of RAM, or the throughput of a pipeline (its slowest stage), is not: those are
found by branch and bound, each bound being a minimum cut of the costs weighed by multipliers (Lagrangian relaxation).
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from edgecloud.partitioner.dag import Dag, Edge, Side, ram_bytes, weight_bytes
from edgecloud.partitioner.min_cut import Costs, minimum_cut, total

Objective = Literal["latency", "throughput"]
Fixed = Mapping[int, Side]

MAX_MINIMUM_CUTS = 600  # of one search; about 20 ms each for 200 nodes
NUM_MULTIPLIERS = 6  # tried for a bound
SCALE = 1 << 10  # multipliers are integers over this, so that bounds are exact
MAX_PREFIXES = 300


@dataclass(frozen=True, slots=True)
class Stages:
    """What a request costs in nanoseconds, by who works; a round trip is added if the cloud does anything."""

    device: Costs
    up: Costs
    cloud: Costs
    down: Costs
    round_trip: int = 0

    def all(self) -> tuple[Costs, ...]:
        """In the order of a request."""
        return (self.device, self.up, self.cloud, self.down)


@dataclass(frozen=True, slots=True)
class Problem:
    """What to minimise, under which limit."""

    dag: Dag
    stages: Stages
    objective: Objective = "latency"
    max_ram_bytes: int | None = None
    forbidden: frozenset[Edge] = frozenset()  # cuts that are ruled out one by one

    def cost(self, edge: Edge) -> int:
        """Latency: the sum of the stages and the round trip. Throughput: the slowest stage."""
        costs = [total(self.dag, stage, edge) for stage in self.stages.all()]
        if self.objective == "throughput":
            return max(costs)
        return sum(costs) + (self.stages.round_trip if edge != self.dag.whole else 0)

    def allows(self, edge: Edge) -> bool:
        """Whether it is a cut, is not ruled out, and the device has the memory."""
        if edge in self.forbidden or not self.dag.is_cut(edge):
            return False
        return self.max_ram_bytes is None or ram_bytes(self.dag, edge) <= self.max_ram_bytes


@dataclass(frozen=True, slots=True)
class Found:
    """The best cut known."""

    edge: Edge
    cost: int  # nanoseconds
    bound: int  # no cut costs less

    @property
    def exact(self) -> bool:
        """Whether it is proven that no cut is better."""
        return self.bound >= self.cost


@dataclass(frozen=True, slots=True)
class Relaxed:
    """What the relaxation says of the cuts that respect some fixed nodes."""

    bound: int
    edges: tuple[Edge, ...]  # cuts met on the way, the last the one of the best bound


def best_cut(problem: Problem, max_minimum_cuts: int = MAX_MINIMUM_CUTS) -> Found | None:
    """The cut of least cost; None if pins, tensors that cannot cross and memory leave none.

    Exact unless the minimum cuts are used up; then `bound` still holds.
    """
    search = _Search(problem, max_minimum_cuts)
    for edge in [problem.dag.whole, *prefixes(problem.dag)]:
        search.offer(edge)
    return search.run()


def prefixes(dag: Dag) -> Iterator[Edge]:
    """Cuts that follow the order of the nodes, spread over it: from nothing on the device to everything."""
    step = max(1, dag.num_nodes // MAX_PREFIXES)
    must = dag.ancestors(node for node, side in dag.pins.items() if side)
    for length in [*range(0, dag.num_nodes, step), dag.num_nodes]:
        yield frozenset(range(length)) | must


def smallest_ram_bytes(dag: Dag) -> int | None:
    """The least memory of any cut met in a sweep: the least weights, and what comes first. None if there is no cut at all."""
    no_node, no_flow = (0,) * dag.num_nodes, (0,) * len(dag.flows)
    lightest = minimum_cut(dag, Costs(no_node, no_node, no_flow, no_flow, tuple(weight.num_bytes for weight in dag.weights)), {})
    swept = [edge for edge in prefixes(dag) if dag.is_cut(edge)]
    return min((ram_bytes(dag, edge) for edge in swept + [edge for edge in [lightest] if edge is not None]), default=None)


class _Search:
    def __init__(self, problem: Problem, max_minimum_cuts: int) -> None:
        self._problem = problem
        self._left = max_minimum_cuts
        self._best: Edge | None = None
        self._cost = math.inf
        dag = problem.dag
        self._keep = tuple(weight.num_bytes for weight in dag.weights)
        self._input_bytes = sum(flow.num_bytes for flow in dag.flows if flow.producer is None)  # they live throughout
        self._after: list[set[int]] = [set() for _ in range(dag.num_nodes)]
        for flow in dag.flows:
            if flow.producer is not None:
                self._after[flow.producer] |= flow.consumers

    def offer(self, edge: Edge) -> None:
        """Remember a cut if it is allowed and the best so far."""
        if edge == self._best or not self._problem.allows(edge):
            return
        if (cost := self._problem.cost(edge)) < self._cost:
            self._best, self._cost = edge, cost

    def run(self) -> Found | None:
        """Take the part of the cuts with the lowest bound, solve it or divide it in two."""
        order = itertools.count()
        root = self._closed(self._problem.dag.pins)
        relaxed = self._relax(root) if self._may_fit(root) else None
        heap = [] if relaxed is None else [(relaxed.bound, next(order), root, relaxed)]
        while heap and heap[0][0] < self._cost and self._left > 0:
            bound, _, fixed, relaxed = heapq.heappop(heap)
            node = self._branch_on(fixed, relaxed)
            if node is None:
                continue  # every node is fixed, and the one cut that is left has been offered
            for side in (True, False):
                part = self._closed({**fixed, node: side})
                same = all((other in relaxed.edges[-1]) == where for other, where in part.items())
                inner = None if not self._may_fit(part) else relaxed if same else self._relax(part)
                if inner is not None and max(bound, inner.bound) < self._cost:
                    heapq.heappush(heap, (max(bound, inner.bound), next(order), part, inner))
        if self._best is None:
            return None
        lowest = heap[0][0] if heap else self._cost
        return Found(self._best, int(self._cost), int(min(lowest, self._cost)))

    def _may_fit(self, fixed: Fixed) -> bool:
        if self._problem.max_ram_bytes is None:
            return True
        must = frozenset(node for node, side in fixed.items() if side)
        return ram_bytes(self._problem.dag, must, frozenset(fixed) - must) <= self._problem.max_ram_bytes

    def _relax(self, fixed: Fixed) -> Relaxed | None:
        met: list[Relaxed] = []
        for bound, edge in (
            self._bounds_of_slowest(fixed) if self._problem.objective == "throughput" else self._bounds_of_sum(fixed)
        ):
            self.offer(edge)
            met.append(Relaxed(bound, (edge,)))
        if not met:
            return None
        best = max(met, key=lambda relaxed: relaxed.bound)
        return Relaxed(best.bound, (*(relaxed.edges[0] for relaxed in met), best.edges[0]))

    def _bounds_of_sum(self, fixed: Fixed) -> Iterator[tuple[int, Edge]]:
        """Cheapest cuts at rising prices of memory: cost + price * (bytes of weights - budget) is at most the cost of what fits."""
        price, step, whole = 0, 0, self._problem.dag.whole
        for _ in range(NUM_MULTIPLIERS):
            costs = weigh(self._problem.stages.all(), (SCALE,) * 4)
            if price:
                costs = replace(costs, keep=tuple(price * num_bytes for num_bytes in self._keep))
            edge = self._minimum_cut(costs, fixed)
            if edge is None:
                return
            spare = 0 if self._problem.max_ram_bytes is None else self._problem.max_ram_bytes - self._input_bytes
            relaxed = total(self._problem.dag, costs, edge) - price * spare
            # Of cuts other than the whole, which was offered first.
            yield -(-relaxed // SCALE) + self._problem.stages.round_trip, edge
            if self._problem.max_ram_bytes is None or (price == 0 and self._problem.allows(edge) and edge != whole):
                return
            over = weight_bytes(self._problem.dag, edge) - spare
            if price == 0:
                if over <= 0:  # the weights fit, the activations do not: no price of weights helps
                    return
                price = step = max(1, SCALE * self._problem.cost(edge) // max(1, sum(self._keep)))
            else:
                step = max(1, step // 2) if over <= 0 or step < price else 2 * step
                price = max(1, price + (step if over > 0 else -step))

    def _bounds_of_slowest(self, fixed: Fixed) -> Iterator[tuple[int, Edge]]:
        """Cheapest cuts of the weighted mean of the stages, which is at most the slowest; more weight to what was slow."""
        shares = [0.25] * 4
        for _ in range(NUM_MULTIPLIERS):
            whole_shares = [max(1, round(SCALE * share)) for share in shares]
            edge = self._minimum_cut(weigh(self._problem.stages.all(), whole_shares), fixed)
            if edge is None:
                return
            costs = [total(self._problem.dag, stage, edge) for stage in self._problem.stages.all()]
            mean = sum(cost * share for cost, share in zip(costs, whole_shares, strict=True))
            yield -(-mean // sum(whole_shares)), edge
            slowest = max(1, *costs)
            shares = [share * math.exp(1.5 * cost / slowest) for share, cost in zip(shares, costs, strict=True)]
            shares = [share / sum(shares) for share in shares]

    def _minimum_cut(self, costs: Costs, fixed: Fixed) -> Edge | None:
        self._left -= 1
        return minimum_cut(self._problem.dag, costs, fixed)

    def _closed(self, fixed: Fixed) -> dict[int, Side]:
        """With what follows: before a node on the device all is there, after one in the cloud nothing is."""
        on_device = self._problem.dag.ancestors(node for node, side in fixed.items() if side)
        waiting = [node for node, side in fixed.items() if not side]
        in_cloud: set[int] = set()
        while waiting:
            if (node := waiting.pop()) not in in_cloud:
                in_cloud.add(node)
                waiting += self._after[node]
        return {**dict.fromkeys(on_device, True), **dict.fromkeys(in_cloud, False)}

    def _branch_on(self, fixed: Fixed, relaxed: Relaxed) -> int | None:
        free = [node for node in range(self._problem.dag.num_nodes) if node not in fixed]
        if not free:
            return None
        if self._problem.objective == "throughput":
            first, last = frozenset.intersection(*relaxed.edges), frozenset.union(*relaxed.edges)
            doubtful = [node for node in free if node in last and node not in first] or free
            device, cloud = self._problem.stages.device.edge, self._problem.stages.cloud.cloud
            return max(doubtful, key=lambda node: device[node] + cloud[node])
        doubtful = [node for node in free if node in relaxed.edges[-1]] or free
        return doubtful[len(doubtful) // 2]


def weigh(stages: Iterable[Costs], shares: Iterable[int]) -> Costs:
    """The sum of the stages, each times its share."""
    pairs = list(zip(stages, shares, strict=True))

    def add(name: str) -> tuple[int, ...]:
        return tuple(
            sum(values) for values in zip(*([share * value for value in getattr(c, name)] for c, share in pairs), strict=True)
        )

    return Costs(add("edge"), add("cloud"), add("send"), add("back"))
