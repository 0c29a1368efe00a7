"""The search for a cut against all cuts there are, on random DAGs of up to 12 nodes."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecloud.partitioner.cut_search import Objective, Problem, Stages, _Search, best_cut, smallest_ram_bytes
from edgecloud.partitioner.dag import Dag, Edge, Flow, Weight, ram_bytes
from edgecloud.partitioner.min_cut import Costs, minimum_cut, total

NS = st.integers(0, 50)


@st.composite
def dags(draw: st.DrawFn) -> Dag:
    """Several inputs and outputs, skips, shared weights, nodes that cannot move, tensors that cannot travel."""
    num_nodes = draw(st.integers(1, 12))
    flows = []
    for index in range(draw(st.integers(1, 3))):
        consumers = draw(st.frozensets(st.integers(0, num_nodes - 1), max_size=3))
        flows.append(Flow(f"input {index}", None, consumers, draw(NS)))
    for node in range(num_nodes):
        for index in range(draw(st.integers(1, 2))):
            later = (
                st.frozensets(st.integers(node + 1, num_nodes - 1), max_size=3) if node + 1 < num_nodes else st.just(frozenset())
            )
            consumers = draw(later)
            is_output = not consumers or draw(st.booleans())
            can_cross = draw(st.integers(0, 9)) > 0
            flows.append(Flow(f"{node}.{index}", node, consumers, draw(NS), is_output, can_cross))
    users = st.frozensets(st.integers(0, num_nodes - 1), min_size=1, max_size=3)
    weights = tuple(Weight(draw(st.integers(0, 200)), draw(users)) for _ in range(draw(st.integers(0, 6))))
    pins = draw(st.dictionaries(st.integers(0, num_nodes - 1), st.booleans(), max_size=2))
    return Dag(num_nodes, tuple(flows), weights, pins)


@st.composite
def problems(draw: st.DrawFn, objective: Objective, *, with_ram: bool) -> Problem:
    dag = draw(dags())
    nodes = st.lists(NS, min_size=dag.num_nodes, max_size=dag.num_nodes).map(tuple)
    flows = st.lists(NS, min_size=len(dag.flows), max_size=len(dag.flows)).map(tuple)
    no_node, no_flow = (0,) * dag.num_nodes, (0,) * len(dag.flows)
    stages = Stages(
        device=Costs(draw(nodes), no_node, draw(flows), no_flow),
        up=Costs(no_node, no_node, draw(flows), no_flow),
        cloud=Costs(no_node, draw(nodes), draw(flows), no_flow),
        down=Costs(no_node, no_node, no_flow, draw(flows)),
        round_trip=draw(NS),
    )
    forbidden = draw(st.frozensets(st.sampled_from(cuts), max_size=4)) if (cuts := all_cuts(dag)) else frozenset()
    return Problem(dag, stages, objective, draw(st.integers(50, 700)) if with_ram else None, forbidden)


def all_cuts(dag: Dag) -> list[Edge]:
    every = (frozenset(itertools.compress(range(dag.num_nodes), bits)) for bits in itertools.product([0, 1], repeat=dag.num_nodes))
    return [edge for edge in every if dag.is_cut(edge)]


def check_against_all(problem: Problem) -> None:
    allowed = [problem.cost(edge) for edge in all_cuts(problem.dag) if problem.allows(edge)]
    found = best_cut(problem, max_minimum_cuts=100_000)
    if not allowed:
        assert found is None
        return
    assert found is not None
    assert problem.allows(found.edge)
    assert found.cost == problem.cost(found.edge) == min(allowed)
    assert found.exact


@settings(max_examples=50)
@given(problems("latency", with_ram=False))
def test_the_cut_of_least_latency_is_that_of_all_cuts(problem: Problem) -> None:
    check_against_all(problem)


@settings(max_examples=40)
@given(problems("latency", with_ram=True))
def test_the_cut_of_least_latency_that_fits_the_memory_is_that_of_all_cuts(problem: Problem) -> None:
    check_against_all(problem)


@settings(max_examples=40)
@given(problems("throughput", with_ram=False))
def test_the_cut_of_highest_throughput_is_that_of_all_cuts(problem: Problem) -> None:
    check_against_all(problem)


@settings(max_examples=25)
@given(problems("throughput", with_ram=True))
def test_the_cut_of_highest_throughput_that_fits_the_memory_is_that_of_all_cuts(problem: Problem) -> None:
    check_against_all(problem)


@settings(max_examples=40)
@given(problems("latency", with_ram=False), st.data())
def test_a_minimum_cut_pays_for_shared_weights_once(problem: Problem, data: st.DataObject) -> None:
    dag = problem.dag
    keep = tuple(data.draw(NS) for _ in dag.weights)
    costs = replace(problem.stages.device, cloud=problem.stages.cloud.cloud, back=problem.stages.down.back, keep=keep)
    fixed = data.draw(st.dictionaries(st.integers(0, dag.num_nodes - 1), st.booleans(), max_size=2))
    allowed = [edge for edge in all_cuts(dag) if all((node in edge) == side for node, side in fixed.items())]
    found = minimum_cut(dag, costs, fixed)
    if not allowed:
        assert found is None
        return
    assert found in allowed
    assert total(dag, costs, found) == min(total(dag, costs, edge) for edge in allowed)


@settings(max_examples=40)
@given(problems("latency", with_ram=True))
def test_a_search_that_is_cut_short_says_how_far_off_it_may_be(problem: Problem) -> None:
    allowed = [problem.cost(edge) for edge in all_cuts(problem.dag) if problem.allows(edge)]
    found = best_cut(problem, max_minimum_cuts=1)
    if found is not None:
        assert found.bound <= min(allowed) <= found.cost


@settings(max_examples=50)
@given(dags())
def test_memory_is_what_a_slow_count_says(dag: Dag) -> None:
    """Node by node: which tensors are there while it runs."""
    for edge in all_cuts(dag)[:8]:
        peak = 0
        for now in range(-1, dag.num_nodes):
            if now != -1 and now not in edge:
                continue
            live = 0
            for flow in dag.flows:
                if flow.producer is None:
                    live += flow.num_bytes
                elif flow.producer in edge and flow.producer <= now:
                    kept = flow.is_output or not flow.consumers <= edge or flow.producer == now
                    live += flow.num_bytes if kept or max(flow.consumers) >= now else 0
            peak = max(peak, live)
        assert ram_bytes(dag, edge) == peak + sum(w.num_bytes for w in dag.weights if w.users & edge)


@settings(max_examples=50)
@given(dags())
def test_the_smallest_memory_is_enough_for_a_cut(dag: Dag) -> None:
    cuts = all_cuts(dag)
    smallest = smallest_ram_bytes(dag)
    assert (smallest is None) == (not cuts)
    if smallest is not None:
        assert any(ram_bytes(dag, edge) <= smallest for edge in cuts)


def test_a_flow_that_runs_backwards_is_refused() -> None:
    with pytest.raises(ValueError, match="do not come after"):
        Dag(2, (Flow("x", 1, frozenset({0}), 1),))


@settings(max_examples=150)
@given(st.sampled_from(["latency", "throughput"]).flatmap(lambda objective: problems(objective, with_ram=True)))
def test_no_allowed_cut_costs_less_than_a_bound(problem: Problem) -> None:
    """Of the relaxation itself: a search over so few nodes is mostly right even with a wrong one."""
    allowed = [problem.cost(edge) for edge in all_cuts(problem.dag) if problem.allows(edge) and edge != problem.dag.whole]
    relaxed = _Search(problem, 100)._relax(problem.dag.pins)
    if relaxed is not None and allowed:
        assert relaxed.bound <= min(allowed)
