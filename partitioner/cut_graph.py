"""The two halves of a cut as models of their own: nodes as they were, each half with the constants it reads, subgraphs included."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from edgecloud.partitioner.dag import Dag, Edge
from edgecloud.partitioner.onnx_dag import Structure, constant_sources
from edgecloud.partitioner.onnx_model import OnnxModel
from edgecloud.partitioner.tensor_facts import TensorFact


@dataclass(frozen=True, slots=True)
class Halves:
    """A cut, carried out. The names of tensors are the model's."""

    edge: onnx.ModelProto | None  # None: the cloud computes everything
    cloud: onnx.ModelProto | None  # None: the device does
    boundary: list[str]  # what travels up: inputs of the model, or outputs of `edge`
    edge_outputs: list[str]  # outputs of the model
    cloud_outputs: list[str]


def cut_model(model: OnnxModel, structure: Structure, dag: Dag, facts: Mapping[str, TensorFact], edge: Edge) -> Halves:
    """Divide the model. A half that is everything is the model itself."""
    outputs = [tensor.name for tensor in model.outputs]
    cloud_outputs = {dag.flows[index].name for index in dag.returning(edge)}
    edge_outputs = [name for name in outputs if name not in cloud_outputs]
    ordered = [name for name in outputs if name in cloud_outputs]
    if edge == dag.whole:
        return Halves(model.proto, None, [], outputs, [])
    boundary = [dag.flows[index].name for index in dag.crossing(edge)]
    on_device = [node for group in sorted(edge) for node in structure.groups[group]]
    if not on_device and len(boundary) == len(model.inputs):
        return Halves(None, model.proto, boundary, edge_outputs, ordered)
    in_cloud = [node for group in sorted(dag.whole - edge) for node in structure.groups[group]]
    made = [name for name in boundary if name in structure.producers and name not in edge_outputs]
    read = {name for node in on_device for name in structure.needs[node]}
    inputs = [tensor.name for tensor in model.inputs if tensor.name in read]
    front = _extract(model, structure, facts, on_device, inputs, [*edge_outputs, *made]) if on_device else None
    tail = _extract(model, structure, facts, in_cloud, boundary, ordered)
    return Halves(front, tail, boundary, edge_outputs, ordered)


def _extract(
    model: OnnxModel,
    structure: Structure,
    facts: Mapping[str, TensorFact],
    nodes: Sequence[int],
    inputs: Collection[str],
    outputs: Collection[str],
) -> onnx.ModelProto:
    graph = model.proto.graph
    roots, constants = constant_sources(structure, {name for node in nodes for name in structure.needs[node]})
    part = onnx.ModelProto(ir_version=model.proto.ir_version, producer_name="edgecloud", domain=model.proto.domain)
    part.opset_import.extend(model.proto.opset_import)
    part.metadata_props.extend(model.proto.metadata_props)
    part.graph.name = graph.name
    part.graph.node.extend(graph.node[index] for index in sorted({*nodes, *constants}))
    part.graph.initializer.extend(initializer for initializer in graph.initializer if initializer.name in roots)
    part.graph.sparse_initializer.extend(sparse for sparse in graph.sparse_initializer if sparse.values.name in roots)
    typed = {value.name: value for value in (*graph.input, *graph.output)}
    inside = {name for node in part.graph.node for name in node.output}.difference(outputs)
    part.graph.value_info.extend(value for value in graph.value_info if value.name in inside)  # fusions may depend on shapes
    part.graph.input.extend(_value(name, typed, facts) for name in inputs)
    part.graph.output.extend(_value(name, typed, facts) for name in outputs)
    return part


def _value(name: str, typed: Mapping[str, onnx.ValueInfoProto], facts: Mapping[str, TensorFact]) -> onnx.ValueInfoProto:
    if name in typed:
        return typed[name]
    fact = facts[name]
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(fact.dtype)), fact.symbolic)
