"""Small random ONNX graphs, cut into bundles by hand: every prefix of the nodes can be the device's part."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from edgecloud.fingerprint import sha256_file
from edgecloud.graph_bundle import BoundaryTensor, CutInfo, GraphBundle, GraphInfo, TensorInfo
from edgecloud.manifest import MANIFEST, FileInfo
from edgecloud.tensors import num_bytes

Floats = npt.NDArray[np.float32]
WIDTH = 24
PARTS = {"edge": "edge", "cloud": "cloud"}


def random_model(seed: int, *, num_layers: int = 4, width: int = WIDTH, batch: str | int = "batch") -> onnx.ModelProto:
    """Layers with skip connections over random distances, a second input that enters late, a second output that leaves early."""
    random = np.random.default_rng(seed)
    nodes, weights, made = [], [], ["input"]
    for layer in range(num_layers):
        weights.append(numpy_helper.from_array(random.normal(0, 0.4, (width, width)).astype(np.float32), f"w{layer}"))
        nodes.append(helper.make_node("MatMul", [made[-1], f"w{layer}"], [f"m{layer}"], name=f"matmul{layer}"))
        nodes.append(helper.make_node("Tanh", [f"m{layer}"], [f"t{layer}"], name=f"tanh{layer}"))
        skip = "late" if layer == num_layers - 1 else made[random.integers(len(made))]
        nodes.append(helper.make_node("Add", [f"t{layer}", skip], [f"a{layer}"], name=f"add{layer}"))
        made.append(f"a{layer}")
    nodes.append(helper.make_node("Neg", ["a0"], ["early"], name="neg"))
    nodes.append(helper.make_node("Identity", [made[-1]], ["output"], name="out"))
    nodes.insert(3, nodes.pop(-2))  # right after the first layer
    shape = [batch, width]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("input", "late")]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("output", "early")]
    return model_of(nodes, inputs, outputs, weights)


def model_of(nodes: Sequence[Any], inputs: Sequence[Any], outputs: Sequence[Any], weights: Sequence[Any] = ()) -> onnx.ModelProto:
    """A checked model."""
    graph = helper.make_graph(list(nodes), "small", list(inputs), list(outputs), list(weights))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return model


def write_bundle(
    folder: Path,
    model: onnx.ModelProto,
    at: Sequence[int],
    *,
    codec: str = "",
    edge_ms: float = 1.0,
    cloud_ms: float = 1.0,
    chosen: str = "edge",
    drop: Sequence[str] = (),
) -> GraphBundle:
    """A bundle with the whole graph on either side, and a cut after so many nodes for each of `at`; `drop`: cuts left out."""
    nodes = list(model.graph.node)
    cuts = [("edge", len(nodes)), ("cloud", 0), *((f"cut-{number + 1}", n) for number, n in enumerate(at))]
    inferred = onnx.shape_inference.infer_shapes(model)
    infos = {v.name: v for v in [*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output]}
    made: list[CutInfo] = []
    for name, n in cuts:
        if name in drop:
            continue
        crossing, edge_outputs, cloud_outputs = _crossing(model, n)
        paths = {side: f"{side}/{name}.onnx" if (n if side == "edge" else n < len(nodes)) else None for side in PARTS}
        if paths["edge"]:
            gives = [c for c in crossing if c not in _names(model.graph.input)] + edge_outputs
            _save(folder / paths["edge"], model, nodes[:n], infos, gives, _names(model.graph.input))
        if paths["cloud"]:
            _save(folder / paths["cloud"], model, nodes[n:], infos, cloud_outputs, crossing)
        boundary = [BoundaryTensor(c, _dtype(infos[c]), _shape(infos[c]), codec) for c in crossing]
        if name == "edge":
            boundary = []
        sizes = [[size if isinstance(size, int) else 1 for size in tensor.shape] for tensor in boundary]
        made.append(
            CutInfo(
                name, paths["edge"], paths["cloud"], boundary, edge_outputs, cloud_outputs,
                edge_ms=edge_ms * n / len(nodes), cloud_ms=cloud_ms * (1 - n / len(nodes)), codec_ms=0.0,
                boundary_bytes=sum(num_bytes(t.dtype, s, t.codec) for t, s in zip(boundary, sizes, strict=True)),
                output_bytes=4 * WIDTH * len(cloud_outputs), edge_ram_bytes=1000 * n, max_error=0.0, loss=0.0,
            )
        )  # fmt: skip
    files = {
        str(path.relative_to(folder)): FileInfo(sha256_file(path), path.stat().st_size) for path in sorted(folder.rglob("*.onnx"))
    }
    tensors = [[TensorInfo(v.name, _dtype(v), _shape(v)) for v in values] for values in (model.graph.input, model.graph.output)]
    fingerprint = sha256_file(_write(folder.with_suffix(".onnx"), model))
    bundle = GraphBundle(folder, "test", None, GraphInfo("small", fingerprint, 17, *tensors), made, chosen, files)
    (folder / MANIFEST).write_text(bundle.to_json())
    json.loads(bundle.to_json())
    return GraphBundle.open(folder)


def whole(model: onnx.ModelProto, inputs: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    """What the graph as a whole gives, run by ONNX Runtime on one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))


def sample(seed: int, rows: int = 1) -> dict[str, Floats]:
    """Inputs of `random_model`."""
    random = np.random.default_rng(seed)
    return {name: random.normal(0, 1, (rows, WIDTH)).astype(np.float32) for name in ("input", "late")}


def same(got: Mapping[str, npt.NDArray[Any]], want: Mapping[str, npt.NDArray[Any]]) -> bool:
    """Bit by bit, NaN included."""
    return set(got) == set(want) and all(
        got[name].dtype == want[name].dtype and got[name].shape == want[name].shape and got[name].tobytes() == want[name].tobytes()
        for name in want
    )


def _crossing(model: onnx.ModelProto, n: int) -> tuple[list[str], list[str], list[str]]:
    """Tensors that nodes from number n on need of before; outputs of either side."""
    nodes = list(model.graph.node)
    weights = {w.name for w in model.graph.initializer}
    before = set(_names(model.graph.input)) | {o for node in nodes[:n] for o in node.output}
    needed = list(dict.fromkeys(i for node in nodes[n:] for i in node.input if i in before and i not in weights))
    outputs = _names(model.graph.output)
    return needed, [o for o in outputs if o in before], [o for o in outputs if o not in before]


def _save(
    path: Path,
    model: onnx.ModelProto,
    nodes: Sequence[Any],
    infos: Mapping[str, Any],
    outputs: Sequence[str],
    offered: Sequence[str],
) -> None:
    used = {i for node in nodes for i in node.input}
    weights = [w for w in model.graph.initializer if w.name in used]
    inputs = [infos[name] for name in offered if name in used]
    _write(path, model_of(nodes, inputs, [infos[name] for name in dict.fromkeys(outputs)], weights))


def _write(path: Path, model: onnx.ModelProto) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path


def _names(values: Any) -> list[str]:
    return [value.name for value in values]


def _dtype(value: Any) -> str:
    return str(helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))


def _shape(value: Any) -> list[int | str | None]:
    return [d.dim_param or (d.dim_value if d.HasField("dim_value") else None) for d in value.type.tensor_type.shape.dim]
