"""An ONNX file, looked at before anything is computed: is it one, can it run here, what goes in and what comes out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import external_data_helper, helper

from edgecloud.errors import ModelError
from edgecloud.fingerprint import sha256_file
from edgecloud.graph_bundle import DTYPES, TensorInfo

MIN_OPSET = 7  # the oldest that ONNX Runtime runs


@dataclass(frozen=True, slots=True)
class OnnxModel:
    """A model with its weights, that the checker accepts. Functions of its own are inlined."""

    path: Path
    proto: onnx.ModelProto
    fingerprint: str  # SHA-256 over the file, or over it and its external data
    opset: int
    inputs: list[TensorInfo]  # without those that have an initializer
    outputs: list[TensorInfo]

    @property
    def name(self) -> str:
        """The file's, without the ending."""
        return self.path.stem


def load_model(path: Path) -> OnnxModel:
    """Read, check and complete a model.

    Raises:
        ModelError: no file, no ONNX, an opset that nobody here knows, external data missing or outside the model's folder, or
            inputs and outputs that cannot travel.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}; give the path of an .onnx file") from error
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(raw)
    except DecodeError as error:
        raise ModelError(f"{path} is no ONNX model: {error}; export the model to ONNX") from error
    if not proto.ir_version or not proto.graph.node or not proto.graph.output:
        raise ModelError(f"{path} is no ONNX model: it has no graph; export the model to ONNX")
    opset = _check_opset(path, proto)
    external = _load_external_data(path, proto)
    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as error:
        raise ModelError(f"{path} is no valid ONNX model: {str(error).strip().partition(chr(10))[0]}") from error
    if proto.functions:
        proto = onnx.inliner.inline_local_functions(proto)
    _compute_constant_outputs(proto.graph)
    weights = {initializer.name for initializer in proto.graph.initializer}
    weights |= {sparse.values.name for sparse in proto.graph.sparse_initializer}
    inputs = [_tensor(path, value) for value in proto.graph.input if value.name not in weights]
    outputs = [_tensor(path, value) for value in proto.graph.output]
    if not inputs:
        raise ModelError(f"{path} has no inputs, so there is nothing to compute for a request")
    if both := {tensor.name for tensor in inputs} & {tensor.name for tensor in outputs}:
        raise ModelError(f"{path} gives its input {min(both)!r} back as an output; take it out of the outputs")
    return OnnxModel(path, proto, _fingerprint(path, external), opset, inputs, outputs)


def numpy_dtype(elem_type: int) -> str | None:
    """NumPy's name of an ONNX element type; None if its tensors cannot travel."""
    try:
        name = str(np.dtype(helper.tensor_dtype_to_np_dtype(elem_type)).name)
    except (KeyError, TypeError, ValueError):
        return None
    return name if name in DTYPES else None


def symbolic_shape(value: onnx.ValueInfoProto) -> list[int | str | None]:
    """The dimensions as the model names them; those without a size or name are None."""
    dims = value.type.tensor_type.shape.dim
    named = (dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in dims)
    return [None if isinstance(size, int) and size < 0 else size for size in named]


def _compute_constant_outputs(graph: onnx.GraphProto) -> None:
    """An output that is a weight gets a node that makes it, so that every output has a side."""
    outputs = {value.name for value in graph.output}
    for initializer in graph.initializer:
        if (name := initializer.name) in outputs:
            initializer.name = f"{name}/weight"
            graph.node.insert(0, helper.make_node("Identity", [initializer.name], [name], name=name))


def _check_opset(path: Path, proto: onnx.ModelProto) -> int:
    newest = onnx.defs.onnx_opset_version()
    for entry in proto.opset_import:
        if entry.domain in ("", "ai.onnx"):
            if MIN_OPSET <= entry.version <= newest:
                return int(entry.version)
            raise ModelError(f"{path} has opset {entry.version}; {MIN_OPSET} to {newest} are supported, export it with one of them")
    raise ModelError(f"{path} is no ONNX model: it names no opset; export the model to ONNX")


def _load_external_data(path: Path, proto: onnx.ModelProto) -> list[str]:
    """Put weights that lie in other files into the model. -> names of those files"""
    names: set[str] = set()
    num_bytes = path.stat().st_size
    for tensor in external_tensors(proto):
        info = external_data_helper.ExternalDataInfo(tensor)
        pure = PurePosixPath(info.location)
        if pure.is_absolute() or ".." in pure.parts or "\\" in info.location or not pure.parts:
            raise ModelError(
                f"{path}: the data of {tensor.name!r} lies in {info.location!r}, outside the model's folder; do not use it"
            )
        file = path.parent / info.location
        if not file.is_file():
            raise ModelError(f"{path}: the data of {tensor.name!r} is missing, {file} does not exist; copy it beside the model")
        if (info.offset or 0) + (info.length or 0) > file.stat().st_size:
            raise ModelError(f"{path}: the data of {tensor.name!r} goes beyond the end of {file}; copy that file again")
        num_bytes += 0 if info.location in names else file.stat().st_size
        if num_bytes > onnx.checker.MAXIMUM_PROTOBUF:
            raise ModelError(f"{path} has {num_bytes / 1e9:.1f} GB with its data; models of more than 2 GB cannot be cut")
        names.add(info.location)
        external_data_helper.load_external_data_for_tensor(tensor, str(path.parent))
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]
    return sorted(names)


def external_tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of a model, also of its subgraphs, whose data lies in another file."""
    graphs = [proto.graph]
    while graphs:
        graph = graphs.pop()
        tensors = list(graph.initializer)
        for node in graph.node:
            for attribute in node.attribute:
                tensors += [attribute.t, *attribute.tensors]
                graphs += [attribute.g, *attribute.graphs]
        yield from (tensor for tensor in tensors if external_data_helper.uses_external_data(tensor))


def _tensor(path: Path, value: onnx.ValueInfoProto) -> TensorInfo:
    if not value.type.HasField("tensor_type"):
        raise ModelError(f"{path}: {value.name!r} is a {value.type.WhichOneof('value')}; inputs and outputs must be tensors")
    dtype = numpy_dtype(value.type.tensor_type.elem_type)
    if dtype is None:
        kind = onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type)
        raise ModelError(f"{path}: {value.name!r} holds {kind}; inputs and outputs must hold one of {', '.join(sorted(DTYPES))}")
    return TensorInfo(value.name, dtype, symbolic_shape(value))


def _fingerprint(path: Path, external: list[str]) -> str:
    if not external:
        return sha256_file(path)
    digest = hashlib.sha256(sha256_file(path).encode())
    for name in external:
        digest.update(f"\n{name} {sha256_file(path.parent / name)}".encode())
    return digest.hexdigest()
