"""Heads inside an ONNX graph: pooling, two matrices, an output each for the answer and the features. The rest stays as it was."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgecloud.exits import RULES, Answers, ExitCurve, ExitInfo
from edgecloud.partitioner.classifier_heads import Head
from edgecloud.partitioner.classifier_places import Place
from edgecloud.partitioner.onnx_model import OnnxModel

AXES_ARE_INPUTS = 18  # from this opset on
PREFIX = "edgecloud/"  # of every name that is added


def with_pooled(model: OnnxModel, places: Sequence[Place]) -> tuple[onnx.ModelProto, list[str]]:
    """The model with what the heads will see as outputs.  -> it; the names of those, each [1, 2 * channels]"""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    names = [_add_pooling(proto.graph, model.opset, place, f"{PREFIX}exit-{n + 1}") for n, place in enumerate(places)]
    for name in names:
        proto.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, None]))
    return proto, names


def with_heads(
    model: OnnxModel, places: Sequence[Place], heads: Sequence[Head], answers: Answers
) -> tuple[onnx.ModelProto, list[ExitInfo]]:
    """The model with the heads.  -> it, without metadata; the exits, without curves' points"""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    graph = proto.graph
    for name, value in (("classifier", heads[0].classifier), ("bias", heads[0].bias)):
        graph.initializer.append(numpy_helper.from_array(value, PREFIX + name))
    infos = []
    for number, (place, head) in enumerate(zip(places, heads, strict=True), start=1):
        name = f"exit-{number}"
        prefix = PREFIX + name
        pooled = _add_pooling(graph, model.opset, place, prefix)
        graph.initializer.append(numpy_helper.from_array(head.adapter, f"{prefix}/adapter"))
        graph.initializer.append(numpy_helper.from_array(head.shift, f"{prefix}/shift"))
        info = ExitInfo(name, place.tensor, f"{prefix}/answer", f"{prefix}/features", head.num_parameters, _no_curves())
        scores = f"{prefix}/scores" if answers == "probabilities" else info.answer
        graph.node.extend(
            [
                _node("Gemm", [pooled, f"{prefix}/adapter", f"{prefix}/shift"], f"{prefix}/adapted"),
                _node("Relu", [f"{prefix}/adapted"], info.features),
                _node("Gemm", [info.features, f"{PREFIX}classifier", f"{PREFIX}bias"], scores),
            ]
        )
        if answers == "probabilities":
            graph.node.append(_node("Softmax", [scores], info.answer, axis=1))
        for made, width in ((info.answer, len(head.bias)), (info.features, len(head.shift))):
            graph.output.append(helper.make_tensor_value_info(made, TensorProto.FLOAT, [model.outputs[0].shape[0], width]))
        infos.append(info)
    onnx.checker.check_model(proto)
    return proto, infos


def _no_curves() -> list[ExitCurve]:
    return [ExitCurve(rule, []) for rule in RULES]


def _add_pooling(graph: onnx.GraphProto, opset: int, place: Place, prefix: str) -> str:
    """Mean and largest of every channel.  -> the name of a tensor [batch, 2 * channels]"""
    tensor = place.tensor
    if place.dtype != "float32":
        graph.node.append(_node("Cast", [tensor], f"{prefix}/cast", to=TensorProto.FLOAT))
        tensor = f"{prefix}/cast"
    if not place.pooled_axes:
        return tensor
    axes = list(place.pooled_axes)
    for kind in ("Mean", "Max"):
        if opset >= AXES_ARE_INPUTS:
            if kind == "Mean":
                graph.initializer.append(numpy_helper.from_array(np.array(axes, np.int64), f"{prefix}/axes"))
            graph.node.append(_node(f"Reduce{kind}", [tensor, f"{prefix}/axes"], f"{prefix}/{kind}", keepdims=0))
        else:
            graph.node.append(_node(f"Reduce{kind}", [tensor], f"{prefix}/{kind}", axes=axes, keepdims=0))
    graph.node.append(_node("Concat", [f"{prefix}/Mean", f"{prefix}/Max"], f"{prefix}/pooled", axis=1))
    return f"{prefix}/pooled"


def _node(kind: str, reads: Sequence[str], makes: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(kind, list(reads), [makes], name=f"{makes}:{kind}", **attributes)
