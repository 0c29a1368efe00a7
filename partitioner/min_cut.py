"""The cheapest cut of a DAG, exactly: a minimum s-t cut, with an auxiliary node for every tensor so that it is paid for once.

Costs are integers (nanoseconds), so that a flow network's arithmetic is exact. Constructed as by Hu et al. 2019 (DADS), with edges
of infinite capacity against a way back; a weight that several nodes share is paid for once by the same device turned round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import networkx as nx

from edgecloud.partitioner.dag import Dag, Edge, Side

SOURCE, SINK = "device", "cloud"


@dataclass(frozen=True, slots=True)
class Costs:
    """What a cut pays, one entry a node, flow or weight. All are 0 or more."""

    edge: tuple[int, ...]  # [node] if it is on the device
    cloud: tuple[int, ...]  # [node] if it is in the cloud
    send: tuple[int, ...]  # [flow] if it travels up
    back: tuple[int, ...]  # [flow] if it is an output that travels down
    keep: tuple[int, ...] = ()  # [weight] if the device has it; (): nothing


def total(dag: Dag, costs: Costs, edge: Edge) -> int:
    """The cost of a cut."""
    value = sum(costs.edge[node] if node in edge else costs.cloud[node] for node in range(dag.num_nodes))
    value += sum(costs.send[index] for index in dag.crossing(edge)) + sum(costs.back[index] for index in dag.returning(edge))
    return value + sum(price for price, weight in zip(costs.keep, dag.weights, strict=False) if weight.users & edge)


def minimum_cut(dag: Dag, costs: Costs, fixed: Mapping[int, Side]) -> Edge | None:
    """The nodes on the device in a cut of least cost that respects `fixed`; None if there is none.

    The source's side is the device's. A node pays its time in the cloud if it is cut off the source, its time on the device if it
    is cut off the sink; a flow is a node that a consumer in the cloud pulls there, so that its one edge from the producer is cut.
    """
    network = nx.DiGraph()
    network.add_nodes_from([SOURCE, SINK])
    away = list(costs.cloud)
    for index, flow in enumerate(dag.flows):
        if flow.is_output and flow.producer is not None:
            away[flow.producer] += costs.back[index]
    for node in range(dag.num_nodes):
        side = fixed.get(node, dag.pins.get(node))
        if node in dag.pins and dag.pins[node] != side:
            return None
        _connect(network, SOURCE, node, None if side is True else away[node])
        _connect(network, node, SINK, None if side is False else costs.edge[node])
    for index, flow in enumerate(dag.flows):
        origin = SOURCE if flow.producer is None else flow.producer
        _connect(network, origin, ("flow", index), costs.send[index] if flow.can_cross else None)
        for consumer in flow.consumers:
            network.add_edge(("flow", index), consumer)
            if flow.producer is not None:
                network.add_edge(consumer, flow.producer)
    for index, (price, weight) in enumerate(zip(costs.keep, dag.weights, strict=False)):
        _connect(network, ("weight", index), SINK, price)
        for user in weight.users:
            network.add_edge(user, ("weight", index))
    try:
        _, (near, _) = nx.minimum_cut(network, SOURCE, SINK, flow_func=nx.algorithms.flow.preflow_push)
    except nx.NetworkXUnbounded:
        return None
    return frozenset(node for node in near if isinstance(node, int))


def _connect(network: nx.DiGraph, tail: object, head: object, capacity: int | None) -> None:
    """None: infinite, which networkx means by no capacity."""
    if capacity is None:
        network.add_edge(tail, head)
    else:
        network.add_edge(tail, head, capacity=capacity)
