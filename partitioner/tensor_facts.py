"""What every tensor between two nodes is in a run with the user's sample; exact also where shapes depend on data."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from edgecloud.graph_bundle import DTYPES, TensorInfo
from edgecloud.partitioner.onnx_model import OnnxModel, numpy_dtype, symbolic_shape
from edgecloud.partitioner.ort_session import NONE, Session
from edgecloud.partitioner.samples import Sample

OUTPUTS_A_RUN = 48  # intermediate tensors that are kept at a time


@dataclass(frozen=True, slots=True)
class TensorFact:
    """A tensor of a run. One that cannot travel (a sequence, text, bfloat16) counts no bytes."""

    dtype: str
    shape: tuple[int, ...]
    symbolic: list[int | str | None]  # its shape as far as the model alone tells it

    @property
    def can_travel(self) -> bool:
        """Whether NumPy and the wire know its elements."""
        return self.dtype in DTYPES

    @property
    def num_bytes(self) -> int:
        """Of its elements."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize if self.can_travel else 0

    def info(self, name: str) -> TensorInfo:
        """As a bundle says it."""
        return TensorInfo(name, self.dtype, self.symbolic)


def measure_tensors(model: OnnxModel, names: Collection[str], sample: Sample, num_threads: int) -> dict[str, TensorFact]:
    """Run the model with these tensors as outputs, a few at a time. Raises ModelError if it does not run."""
    inferred = infer_types(model)
    facts = {t.name: TensorFact(t.dtype, sample[t.name].shape, t.shape) for t in model.inputs}
    wanted = []
    for name in names:
        if name in facts:
            continue
        known = inferred.get(name)
        travels = known is None or (
            known.type.HasField("tensor_type") and numpy_dtype(known.type.tensor_type.elem_type) is not None
        )
        if travels:
            wanted.append(name)
        else:
            facts[name] = TensorFact("", (), [])
    for begin in range(0, len(wanted), OUTPUTS_A_RUN):
        chosen = wanted[begin : begin + OUTPUTS_A_RUN]
        session = Session(with_outputs(model.proto, chosen), num_threads, level=NONE)
        for name, value in session.run(sample, chosen).items():
            facts[name] = _fact(value, inferred.get(name))
    return facts


def infer_types(model: OnnxModel) -> Mapping[str, onnx.ValueInfoProto]:
    """Types of tensors as far as ONNX's shape inference finds them; operators that it does not know are left out."""
    light = onnx.ModelProto()
    light.CopyFrom(model.proto)
    try:
        inferred = onnx.shape_inference.infer_shapes(light)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        inferred = light
    return {value.name: value for value in (*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output)}


def with_outputs(proto: onnx.ModelProto, names: Collection[str]) -> onnx.ModelProto:
    """A copy whose outputs are these tensors, whatever their type."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    typed = {value.name: value for value in proto.graph.output}
    del copy.graph.output[:]
    copy.graph.output.extend(typed.get(name, onnx.ValueInfoProto(name=name)) for name in names)
    return copy


def _fact(value: object, inferred: onnx.ValueInfoProto | None) -> TensorFact:
    if not isinstance(value, np.ndarray) or value.dtype.name not in DTYPES:
        return TensorFact("", (), [])
    symbolic: list[int | str | None] = [None] * value.ndim
    if inferred is not None and inferred.type.tensor_type.HasField("shape"):
        found = symbolic_shape(inferred)
        fits = len(found) == value.ndim and all(not isinstance(f, int) or f == s for f, s in zip(found, value.shape, strict=True))
        symbolic = found if fits else symbolic
    return TensorFact(value.dtype.name, value.shape, symbolic)
