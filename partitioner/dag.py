"""A computation as a directed acyclic graph: what it passes on and what it keeps in memory. Nothing here knows ONNX."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

Side = bool  # True: on the device
Edge = frozenset[int]  # the nodes on the device; the others are in the cloud


@dataclass(frozen=True, slots=True)
class Flow:
    """A tensor that a node, or the user, hands to others."""

    name: str
    producer: int | None  # None: an input of the graph, it begins on the device
    consumers: frozenset[int]
    num_bytes: int
    is_output: bool = False  # of the graph: it must end on the device
    can_cross: bool = True


@dataclass(frozen=True, slots=True)
class Weight:
    """A constant. Each side that uses it has it, at the price of memory."""

    num_bytes: int
    users: frozenset[int]


@dataclass(frozen=True, slots=True)
class Dag:
    """Nodes are 0 .. num_nodes-1, in an order in which they can be computed."""

    num_nodes: int
    flows: tuple[Flow, ...]
    weights: tuple[Weight, ...] = ()
    pins: Mapping[int, Side] = field(default_factory=dict)  # nodes that cannot move

    def __post_init__(self) -> None:
        """Check the order."""
        for flow in self.flows:
            before = -1 if flow.producer is None else flow.producer
            if any(not before < node < self.num_nodes for node in flow.consumers) or before >= self.num_nodes:
                raise ValueError(f"{flow.name}: consumers {sorted(flow.consumers)} do not come after producer {flow.producer}")

    @property
    def whole(self) -> Edge:
        """All nodes."""
        return frozenset(range(self.num_nodes))

    def crossing(self, edge: Edge) -> list[int]:
        """Indices of the flows that travel up: from the device, with a consumer in the cloud."""
        return [
            index
            for index, flow in enumerate(self.flows)
            if (flow.producer is None or flow.producer in edge) and not flow.consumers <= edge
        ]

    def returning(self, edge: Edge) -> list[int]:
        """Indices of the outputs that travel down."""
        return [
            i for i, flow in enumerate(self.flows) if flow.is_output and flow.producer is not None and flow.producer not in edge
        ]

    def is_cut(self, edge: Edge) -> bool:
        """Whether data flows from the device to the cloud only, what must not cross does not, and pins hold."""
        if any((node in edge) != side for node, side in self.pins.items()):
            return False
        if any(flow.producer is not None and flow.producer not in edge and flow.consumers & edge for flow in self.flows):
            return False
        return all(self.flows[index].can_cross for index in self.crossing(edge))

    def ancestors(self, nodes: Iterable[int]) -> Edge:
        """The nodes and all that they need."""
        needs: dict[int, set[int]] = {node: set() for node in range(self.num_nodes)}
        for flow in self.flows:
            if flow.producer is not None:
                for consumer in flow.consumers:
                    needs[consumer].add(flow.producer)
        found: set[int] = set()
        waiting = list(nodes)
        while waiting:
            if (node := waiting.pop()) not in found:
                found.add(node)
                waiting += needs[node]
        return frozenset(found)


def weight_bytes(dag: Dag, edge: Edge) -> int:
    """Constants that the device keeps, each once."""
    return sum(weight.num_bytes for weight in dag.weights if weight.users & edge)


def ram_bytes(dag: Dag, edge: Edge, cloud: Edge | None = None) -> int:
    """Estimate of what the device keeps: its constants, and the largest sum of tensors that live at one time.

    Computed in the order of the nodes. A tensor lives from its producer to its last consumer on the device, to the end if it is
    sent or an output; inputs of the graph live throughout. A runtime's own memory and copies are not counted. `cloud`: nodes that
    are surely there (None: all others); then no cut with `edge` on the device and `cloud` in the cloud keeps less.
    """
    begins = [0] * (dag.num_nodes + 1)  # [node + 1] bytes that begin to live when it runs; [0]: before the first
    ends = [0] * (dag.num_nodes + 1)  # [node + 1] bytes that nobody needs after it
    for flow in dag.flows:
        if flow.producer is None:
            begins[0] += flow.num_bytes
        elif flow.producer in edge:
            begins[flow.producer + 1] += flow.num_bytes
            sent = not flow.consumers <= edge if cloud is None else bool(flow.consumers & cloud)
            if not (flow.is_output or sent):
                ends[max(flow.consumers & edge, default=flow.producer) + 1] += flow.num_bytes
    live = peak = 0
    for begin, end in zip(begins, ends, strict=True):
        live += begin
        peak = max(peak, live)
        live -= end
    return weight_bytes(dag, edge) + peak
