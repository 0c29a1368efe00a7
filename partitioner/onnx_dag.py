"""An ONNX graph as the DAG that is cut: nodes that ONNX Runtime fuses are one, constants are nobody's, subgraphs see outer names.

A tensor that does not survive the runtime's own fusions is not cut at: a cut there would change what is computed, and its time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import networkx as nx
import onnx

from edgecloud.errors import ConfigError
from edgecloud.partitioner.dag import Dag, Flow, Side, Weight
from edgecloud.partitioner.onnx_model import OnnxModel
from edgecloud.partitioner.tensor_facts import TensorFact

RANDOM_OPS = frozenset({"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"})


@dataclass(frozen=True, slots=True)
class Structure:
    """What depends on what. Node indices are those of the model's graph."""

    needs: tuple[frozenset[str], ...]  # [node] names that it reads, those of its subgraphs' outer scope too
    producers: Mapping[str, int]  # of every tensor that a node makes
    constants: frozenset[int]  # nodes that depend on no input; each side has its own
    live: tuple[int, ...]  # the other nodes that an output depends on, in order
    groups: tuple[tuple[int, ...], ...]  # of the live nodes, in an order in which they can be computed


def analyse(model: OnnxModel, survivors: Collection[str]) -> Structure:
    """Group the nodes. `survivors`: tensors that still exist after the runtime's fusions."""
    graph = model.proto.graph
    needs = tuple(_reads(node) for node in graph.node)
    producers = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
    outputs = {tensor.name for tensor in model.outputs}
    inputs = {tensor.name for tensor in model.inputs}
    constants: set[int] = set()
    for index, node in enumerate(graph.node):
        fed = any(name in inputs or (producers.get(name, index) not in constants and name in producers) for name in needs[index])
        if not fed and node.op_type not in RANDOM_OPS and not outputs & set(node.output):
            constants.add(index)
    reached: set[int] = set()
    waiting = [producers[name] for name in outputs]
    while waiting:
        if (index := waiting.pop()) not in reached:
            reached.add(index)
            waiting += [producers[name] for name in needs[index] if name in producers]
    live = tuple(sorted(reached - constants))
    groups = _groups(model.proto.graph, needs, producers, live, set(survivors) | outputs)
    return Structure(needs, producers, frozenset(constants), live, groups)


def build_dag(
    model: OnnxModel, structure: Structure, facts: Mapping[str, TensorFact], pins: Mapping[str, Side] | None = None
) -> Dag:
    """The DAG of the groups. `facts`: of every tensor that `crossing_names` gives; `pins`: by name of a node or of its output.

    Raises:
        ConfigError: a pin names nothing that is computed, or both sides for one.
    """
    group_of = {node: index for index, nodes in enumerate(structure.groups) for node in nodes}
    outputs = {tensor.name for tensor in model.outputs}
    flows = []
    for name, consumers in crossing_names(model, structure).items():
        fact = facts[name]
        producer = group_of[structure.producers[name]] if name in structure.producers else None
        flows.append(Flow(name, producer, consumers, fact.num_bytes, name in outputs, fact.can_travel))
    return Dag(len(structure.groups), tuple(flows), _weights(model, structure), _pins(model, structure, group_of, pins or {}))


def crossing_names(model: OnnxModel, structure: Structure) -> dict[str, frozenset[int]]:
    """Tensors that can be cut at, or are an output: name -> the groups other than its own that read it. Inputs come first."""
    group_of = {node: index for index, nodes in enumerate(structure.groups) for node in nodes}
    readers: dict[str, set[int]] = defaultdict(set)
    for node in structure.live:
        for name in structure.needs[node]:
            readers[name].add(group_of[node])
    found = {tensor.name: frozenset(readers[tensor.name]) for tensor in model.inputs}
    outputs = {tensor.name for tensor in model.outputs}
    for node in structure.live:
        for name in model.proto.graph.node[node].output:
            consumers = frozenset(readers[name] - {group_of[node]})
            if name and (consumers or name in outputs):
                found[name] = consumers
    return found


def _reads(node: onnx.NodeProto) -> frozenset[str]:
    names = {name for name in node.input if name}
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            names |= _outer_names(graph)
    return frozenset(names)


def _outer_names(graph: onnx.GraphProto) -> set[str]:
    """What a subgraph reads and does not make itself."""
    own = {value.name for value in graph.input} | {initializer.name for initializer in graph.initializer}
    own |= {name for node in graph.node for name in node.output}
    read = {name for node in graph.node for name in _reads(node)} | {value.name for value in graph.output}
    return read - own


def _groups(
    graph: onnx.GraphProto,
    needs: tuple[frozenset[str], ...],
    producers: Mapping[str, int],
    live: tuple[int, ...],
    kept: set[str],
) -> tuple[tuple[int, ...], ...]:
    fused = nx.utils.UnionFind(live)
    flow = nx.DiGraph()
    flow.add_nodes_from(live)
    alive = set(live)
    for node in live:
        for name in needs[node]:
            if producers.get(name) in alive:
                flow.add_edge(producers[name], node)
                if name not in kept:
                    fused.union(producers[name], node)
    merged = nx.DiGraph()
    merged.add_nodes_from(fused[node] for node in live)
    merged.add_edges_from((fused[first], fused[second]) for first, second in flow.edges if fused[first] != fused[second])
    whole = nx.condensation(merged)  # a fused group that data leaves and enters again is one with what lies between
    members: dict[int, list[int]] = defaultdict(list)
    for node in live:
        members[whole.graph["mapping"][fused[node]]].append(node)
    order = nx.lexicographical_topological_sort(whole, key=lambda group: max(members[group]))
    return tuple(tuple(members[group]) for group in order)


def constant_sources(structure: Structure, names: Collection[str]) -> tuple[set[str], set[int]]:
    """What constants are made from: -> names that no node makes (initializers), and the constant nodes on the way"""
    roots: set[str] = set()
    nodes: set[int] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        index = structure.producers.get(name)
        if index is None:
            roots.add(name)
        elif index in structure.constants and index not in nodes:
            nodes.add(index)
            waiting += structure.needs[index]
    return roots, nodes


def _weights(model: OnnxModel, structure: Structure) -> tuple[Weight, ...]:
    graph = model.proto.graph
    sizes: dict[str | int, int] = {initializer.name: _num_bytes(initializer) for initializer in graph.initializer}
    sizes |= {sparse.values.name: _num_bytes(sparse.values) for sparse in graph.sparse_initializer}
    for index in structure.constants:
        if graph.node[index].op_type == "Constant":
            sizes[index] = sum(_num_bytes(attribute.t) for attribute in graph.node[index].attribute)
    users: dict[str | int, set[int]] = defaultdict(set)
    for group, nodes in enumerate(structure.groups):
        roots, made = constant_sources(structure, {name for node in nodes for name in structure.needs[node]})
        for source in (roots | made) & sizes.keys():
            users[source].add(group)
    return tuple(Weight(sizes[source], frozenset(groups)) for source, groups in users.items() if sizes[source])


def _num_bytes(tensor: onnx.TensorProto) -> int:
    if tensor.raw_data:
        return len(tensor.raw_data)
    count = 1
    for size in tensor.dims:
        count *= size
    try:
        return int(count * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
    except (KeyError, TypeError, ValueError):
        return int(count)


def _pins(model: OnnxModel, structure: Structure, group_of: Mapping[int, int], pins: Mapping[str, Side]) -> dict[int, Side]:
    found: dict[int, Side] = {}
    for pinned, side in pins.items():
        nodes = [i for i, node in enumerate(model.proto.graph.node) if i in group_of and pinned in (node.name, *node.output)]
        if not nodes or not pinned:
            raise ConfigError(f"--pin names {pinned!r}; no node or tensor that {model.path} computes has this name")
        for node in nodes:
            if found.setdefault(group_of[node], side) != side:
                raise ConfigError(f"--pin wants {pinned!r} on another side than what it is fused with; pin both to one")
    return found
