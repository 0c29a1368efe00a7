"""From a file to a DAG with times and sizes: everything that a search for cuts needs, measured or read."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from edgecloud.errors import ConfigError
from edgecloud.exits import Exits
from edgecloud.partitioner.boundary import LOSSY, Accuracy, measure_codecs
from edgecloud.partitioner.classifier_metadata import read_exits
from edgecloud.partitioner.cut_planner import NS, CutPlanner
from edgecloud.partitioner.dag import Dag, Edge
from edgecloud.partitioner.graph_request import GraphRequest
from edgecloud.partitioner.node_profile import NodeProfile, profile_nodes, read_profile, surviving_tensors
from edgecloud.partitioner.onnx_dag import Structure, analyse, build_dag, crossing_names
from edgecloud.partitioner.onnx_model import OnnxModel, load_model
from edgecloud.partitioner.samples import Sample, load_samples
from edgecloud.partitioner.tensor_facts import TensorFact, measure_tensors

Remark = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Prepared:
    """The model as the search sees it."""

    request: GraphRequest
    model: OnnxModel
    samples: list[Sample]
    structure: Structure
    facts: Mapping[str, TensorFact]
    dag: Dag
    device: NodeProfile
    cloud_share: float  # time of the cloud over that of the device, all nodes
    planner: CutPlanner
    num_threads: int
    exits: Exits | None  # of a classifier that has some

    def exit_edges(self) -> dict[str, Edge]:
        """By exit, the least that the device computes to leave there: that exit and those before it."""
        if self.exits is None:
            return {}
        group_of = {node: index for index, nodes in enumerate(self.structure.groups) for node in nodes}
        found: dict[str, Edge] = {}
        edge: Edge = frozenset()
        for head in self.exits.heads:
            made = [group_of[self.structure.producers[name]] for name in (head.answer, head.features)]
            edge = found[head.name] = edge | self.dag.ancestors(made)
        return found


def prepare(request: GraphRequest, remark: Remark) -> Prepared:
    """Load, check, run and time the model."""
    num_threads = request.num_threads or len(os.sched_getaffinity(0))
    remark("reading the model")
    model = load_model(request.model)
    exits = read_exits(model)
    samples = load_samples(request.inputs, model)
    if request.max_loss and not request.inputs:
        raise ConfigError(f"--max-loss {request.max_loss:g} is judged on samples of yours; give --inputs SAMPLE.npz")
    remark("the whole graph on the samples")
    accuracy = Accuracy(model, samples, request.loss_metric, num_threads)
    structure = analyse(model, surviving_tensors(model, num_threads))
    facts = measure_tensors(model, crossing_names(model, structure), samples[0], num_threads)
    dag = build_dag(model, structure, facts, request.pins)
    if request.device_profile is None:
        remark("times of the nodes")
        device = profile_nodes(model, samples[0], num_threads, request.timing_s)
    else:
        device = read_profile(request.device_profile, model, samples[0])
    if request.save_profile is not None:
        request.save_profile.write_text(device.to_json(), "utf-8")
    device_ns = group_times(device, model, structure)
    if request.cloud_profile is None:
        cloud_ns = tuple(round(value / request.cloud_speed) for value in device_ns)
    else:
        cloud_ns = group_times(read_profile(request.cloud_profile, model, samples[0]), model, structure)
    codecs = (request.codecs if request.codecs is not None else LOSSY) if request.max_loss else ()
    planner = CutPlanner(
        model, structure, dag, facts, device_ns, cloud_ns, measure_codecs(codecs), accuracy, request.max_loss,
        request.max_ram_bytes, request.objective,
    )  # fmt: skip
    share = sum(cloud_ns) / (sum(device_ns) or 1)
    return Prepared(request, model, samples, structure, facts, dag, device, share, planner, num_threads, exits)


def group_times(profile: NodeProfile, model: OnnxModel, structure: Structure) -> tuple[int, ...]:
    """Nanoseconds of every group of the DAG."""
    nodes = model.proto.graph.node
    return tuple(
        round(NS * sum(profile.tensor_ms.get(name, 0.0) for node in group for name in nodes[node].output))
        for group in structure.groups
    )
