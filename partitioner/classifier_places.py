"""Where in a graph an exit can be: after which tensor, and how a row of features comes out of it.

A place is a tensor that the runtime's fusions leave and that alone leads on to the answer: what does not leave there goes on by
sending it. Any other tensor that leads to the answer can be named as well; then more than it crosses the cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import networkx as nx

from edgecloud.errors import ConfigError
from edgecloud.partitioner.graph_prepare import group_times
from edgecloud.partitioner.node_profile import profile_nodes, surviving_tensors
from edgecloud.partitioner.onnx_dag import Structure, analyse, crossing_names
from edgecloud.partitioner.onnx_model import OnnxModel
from edgecloud.partitioner.samples import Sample
from edgecloud.partitioner.tensor_facts import TensorFact, measure_tensors

CONVOLUTIONAL = frozenset(
    {"Conv", "MaxPool", "AveragePool", "BatchNormalization", "GlobalAveragePool", "GlobalMaxPool", "InstanceNormalization"}
)  # they keep channels in the second dimension
PROFILE_S = 0.5


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor that a head can read."""

    tensor: str
    dtype: str
    pooled_axes: tuple[int, ...]  # all but those of samples and channels
    when: float  # share of the computation that precedes it


class Places:
    """Of a model, as a sample runs through it. Raises ModelError: it does not run."""

    def __init__(self, model: OnnxModel, sample: Sample, num_threads: int) -> None:
        self._model, self._output = model, model.outputs[0].name
        self._structure = analyse(model, surviving_tensors(model, num_threads))
        names = crossing_names(model, self._structure)
        self._facts = measure_tensors(model, names, sample, num_threads)
        self._flow = _flow(model, self._structure)
        self._times = dict(
            zip(
                self._structure.groups,
                group_times(profile_nodes(model, sample, num_threads, PROFILE_S), model, self._structure),
                strict=True,
            )
        )
        made = [name for name in names if name in self._structure.producers and name != self._output]
        self.possible = {place.tensor: place for name in made if (place := self._place(name)) is not None}

    def named(self, names: Sequence[str]) -> list[Place]:
        """The places of these names: of a tensor, or of the node that makes it; in the order of the computation.

        Raises:
            ConfigError: there is no such node, it is the answer or comes after it, or its output is no place for an exit.
        """
        places = {place.tensor: place for place in map(self._find, names)}
        if len(places) < len(names):
            raise ConfigError(f"--at names {', '.join(names)}, which is {len(places)} places; name each once")
        return sorted(places.values(), key=lambda place: place.when)

    def spread(self, num_exits: int) -> list[Place]:
        """So many places at equal distances of computing time. Raises ConfigError: there are not so many."""
        single = sorted((place for place in self.possible.values() if self._leads_alone(place)), key=lambda place: place.when)
        if len(single) < num_exits:
            raise ConfigError(
                f"{self._model.path} has {len(single)} places for {num_exits} exits; take fewer --num-exits, or name them with --at"
            )
        found: list[Place] = []
        for number in range(1, num_exits + 1):
            rest = [place for place in single if not found or place.when > found[-1].when]
            rest = rest[: len(rest) - (num_exits - number)] or [place for place in single if place not in found][:1]
            found.append(min(rest, key=lambda place: abs(place.when - number / (num_exits + 1))))
        return sorted(found, key=lambda place: place.when)

    def _find(self, name: str) -> Place:
        nodes = self._model.proto.graph.node
        outputs = {node.name: node.output[0] for node in nodes if node.name}
        made = {output for node in nodes for output in node.output if output}
        tensor = name if name in made else outputs.get(name, name)
        if tensor in self.possible:
            return self.possible[tensor]
        if tensor not in made:
            near = get_close_matches(name, [*self.possible, *outputs], 1, 0.0)
            raise ConfigError(f"--at {name}: {self._model.path} has no such node or tensor; did you mean {near[0]}?")
        if tensor == self._output or self._structure.producers[tensor] not in self._structure.live:
            raise ConfigError(f"--at {name} comes after the output {self._output!r}, or is it; an exit has to come before it")
        known = ", ".join(list(self.possible)[:8]) or "none"
        raise ConfigError(f"--at {name}: its output is fused with what follows, or is no row of numbers; places are {known}")

    def _place(self, name: str) -> Place | None:
        fact: TensorFact = self._facts[name]
        if fact.dtype not in ("float32", "float16") or len(fact.shape) < 2 or fact.shape[0] != 1:
            return None
        nodes = self._model.proto.graph.node
        producer = self._structure.producers[name]
        around = [nodes[producer], *(node for node in nodes if name in node.input)]
        first = any(node.op_type in CONVOLUTIONAL for node in around) or len(fact.shape) > 3
        axis = 1 if first else len(fact.shape) - 1
        before = nx.ancestors(self._flow, producer) | {producer}
        total = sum(self._times.values()) or 1
        spent = sum(time for group, time in self._times.items() if before & set(group))
        return Place(name, fact.dtype, tuple(i for i in range(1, len(fact.shape)) if i != axis), spent / total)

    def _leads_alone(self, place: Place) -> bool:
        """Whether, once it is there, nothing made before it is needed any more."""
        producer = self._structure.producers[place.tensor]
        before = nx.ancestors(self._flow, producer) | {producer}
        live = set(self._structure.live)
        later = [self._structure.needs[node] for node in live - before]
        made = {name for node in before & live for name in self._model.proto.graph.node[node].output}
        made |= {tensor.name for tensor in self._model.inputs}
        return {name for needs in later for name in needs if name in made} == {place.tensor}


def _flow(model: OnnxModel, structure: Structure) -> nx.DiGraph:
    flow = nx.DiGraph()
    flow.add_nodes_from(range(len(model.proto.graph.node)))
    for node, needs in enumerate(structure.needs):
        flow.add_edges_from((structure.producers[name], node) for name in needs if name in structure.producers)
    return flow
