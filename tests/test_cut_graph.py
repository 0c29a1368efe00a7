"""Front and tail of every cut of random small ONNX graphs, against the whole."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import load_random, random_graphs, save, small_network
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper

from edgecloud.errors import ConfigError
from edgecloud.partitioner.boundary import Accuracy, encoded_bytes, run_halves, same_bits, through
from edgecloud.partitioner.cut_graph import cut_model
from edgecloud.partitioner.dag import Dag, Edge
from edgecloud.partitioner.node_profile import surviving_tensors
from edgecloud.partitioner.onnx_dag import Structure, analyse, build_dag, crossing_names
from edgecloud.partitioner.onnx_model import OnnxModel, load_model
from edgecloud.partitioner.ort_session import NONE, Session
from edgecloud.partitioner.samples import Sample
from edgecloud.partitioner.tensor_facts import TensorFact, measure_tensors

ALL_NAMES = settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])


def structure_of(model: OnnxModel, sample: Sample, *, fused: bool) -> tuple[Structure, Dag, dict[str, TensorFact]]:
    every = {name for node in model.proto.graph.node for name in node.output}
    structure = analyse(model, surviving_tensors(model, 1) if fused else every)
    facts = measure_tensors(model, crossing_names(model, structure), sample, 1)
    return structure, build_dag(model, structure, facts), facts


def cuts(dag: Dag, most: int) -> list[Edge]:
    every = (frozenset(itertools.compress(range(dag.num_nodes), bits)) for bits in itertools.product([0, 1], repeat=dag.num_nodes))
    return [edge for edge in itertools.islice(every, 1 << 12) if dag.is_cut(edge)][:most]


@ALL_NAMES
@given(drawn=random_graphs())
def test_front_then_tail_gives_the_bits_of_the_whole_for_every_cut(tmp_path: Path, drawn: tuple) -> None:
    model, sample = load_random(tmp_path / "model.onnx", drawn)
    structure, dag, facts = structure_of(model, sample, fused=False)
    whole = Session(model.proto, 1, level=NONE).run(sample)
    for edge in cuts(dag, 24):
        halves = cut_model(model, structure, dag, facts, edge)
        for half in (halves.edge, halves.cloud):
            if half is not None:
                onnx.checker.check_model(half)
        front = None if halves.edge is None else Session(halves.edge, 1, level=NONE)
        tail = None if halves.cloud is None else Session(halves.cloud, 1, level=NONE)
        found = run_halves(halves, front, tail, sample, {})
        assert found.keys() == whole.keys()
        assert all(same_bits(whole[name], found[name]) for name in whole)


@ALL_NAMES
@given(drawn=random_graphs())
def test_cuts_between_what_the_runtime_fuses_lose_nothing_either(tmp_path: Path, drawn: tuple) -> None:
    model, sample = load_random(tmp_path / "model.onnx", drawn)
    structure, dag, facts = structure_of(model, sample, fused=True)
    accuracy = Accuracy(model, [sample], "relative", 1)
    for edge in cuts(dag, 8):
        halves = cut_model(model, structure, dag, facts, edge)
        accuracy.require_same_nodes(halves)
        assert accuracy.measure(halves, {}).loss < 1e-6


@given(drawn=random_graphs())
@ALL_NAMES
def test_bytes_of_the_dag_are_those_that_travel(tmp_path: Path, drawn: tuple) -> None:
    model, sample = load_random(tmp_path / "model.onnx", drawn)
    structure, dag, facts = structure_of(model, sample, fused=False)
    for edge in cuts(dag, 6):
        halves = cut_model(model, structure, dag, facts, edge)
        assert sorted(halves.boundary) == sorted(dag.flows[index].name for index in dag.crossing(edge))
        assert sorted([*halves.edge_outputs, *halves.cloud_outputs]) == sorted(tensor.name for tensor in model.outputs)
        if halves.edge is not None and halves.cloud is not None:
            made = Session(halves.edge, 1).run(sample)
            sent = {**sample, **made}
            assert all(sent[name].nbytes == facts[name].num_bytes for name in halves.boundary)


def test_a_weight_that_two_nodes_share_counts_once_and_is_in_both_halves(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["a"]), helper.make_node("MatMul", ["a", "w"], ["b"])]
    model = load_model(save(tmp_path / "m.onnx", nodes, ["x"], ["b"], {"w": np.eye(4, dtype=np.float32)}))
    structure, dag, facts = structure_of(model, {"x": np.ones((2, 4), np.float32)}, fused=False)
    [weight] = dag.weights
    assert weight.num_bytes == 64
    assert weight.users == {0, 1}
    halves = cut_model(model, structure, dag, facts, frozenset({0}))
    assert halves.edge is not None
    assert halves.cloud is not None
    assert [len(half.graph.initializer) for half in (halves.edge, halves.cloud)] == [1, 1]


def test_an_output_on_the_device_that_the_cloud_also_needs(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Neg", ["a"], ["b"])]
    model = load_model(save(tmp_path / "m.onnx", nodes, ["x"], ["a", "b"], {}))
    structure, dag, facts = structure_of(model, {"x": np.ones((2, 4), np.float32)}, fused=False)
    halves = cut_model(model, structure, dag, facts, frozenset({0}))
    assert (halves.boundary, halves.edge_outputs, halves.cloud_outputs) == (["a"], ["a"], ["b"])
    assert halves.edge is not None
    assert [value.name for value in halves.edge.graph.output] == ["a"]


def test_what_the_runtime_fuses_stays_together(tmp_path: Path) -> None:
    model = load_model(small_network(tmp_path / "network.onnx"))
    structure, dag, _ = structure_of(model, {"image": np.zeros((1, 3, 64, 64), np.float32)}, fused=True)
    together = [{model.proto.graph.node[node].name for node in group} for group in structure.groups]
    assert {"conv0", "relu0"} in together
    assert not any(flow.name == "c0" for flow in dag.flows)


def test_a_pin_that_names_nothing_is_an_error(tmp_path: Path) -> None:
    model = load_model(small_network(tmp_path / "network.onnx"))
    sample = {"image": np.zeros((1, 3, 64, 64), np.float32)}
    structure, _, facts = structure_of(model, sample, fused=True)
    with pytest.raises(ConfigError, match="nowhere"):
        build_dag(model, structure, facts, {"nowhere": True})
    with pytest.raises(ConfigError, match="fused"):
        build_dag(model, structure, facts, {"conv0": True, "relu0": False})
    dag = build_dag(model, structure, facts, {"r1": True})
    assert list(dag.pins.values()) == [True]


@given(st.integers(1, 9), st.integers(1, 200), st.sampled_from(["float16", "int8", "int4"]))
@settings(max_examples=20)
def test_encoded_bytes_are_those_of_the_codec(num_rows: int, width: int, codec: str) -> None:
    from edgecloud.kernels import codec as kernel

    array = np.random.default_rng(0).standard_normal((2, num_rows, width)).astype(np.float32)
    fact = TensorFact("float32", array.shape, [2, num_rows, width])
    assert encoded_bytes(fact, codec) == kernel.encode(array.reshape(-1, width), codec).nbytes
    assert through(array, codec).shape == array.shape
