"""An exit head as an ONNX graph for the device: rows [rows, width] in, logits [rows, tokens that it may propose] out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from edgecloud.partitioner.exit_head import EPSILON, ExitHead

OPSET = 21  # the front's
INPUT, OUTPUT = "rows", "logits"


def write_exit_head(model: ExitHead, head: Tensor, path: Path) -> None:
    """In fp32, weights beside it. head: [kept, width]"""
    width, num_kept = head.shape[1], len(head)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    weights |= {"ones": model.scale.detach().new_ones(width), "head": head.detach().T}
    norm = {"axis": -1, "epsilon": EPSILON, "stash_type": 1}
    nodes = [
        helper.make_node("SimplifiedLayerNormalization", [INPUT, "ones"], ["x"], "norm", **norm),
        *(helper.make_node("MatMul", ["x", name], [f"x_{name}"], name) for name in ("linear", "gate", "up")),
        helper.make_node("Sigmoid", ["x_gate"], ["sigmoid"]),
        helper.make_node("Mul", ["x_gate", "sigmoid"], ["silu"]),
        helper.make_node("Mul", ["silu", "x_up"], ["gated"]),
        helper.make_node("MatMul", ["gated", "down"], ["x_down"], "down"),
        helper.make_node("Add", ["x_linear", "x_down"], ["hidden"]),
        helper.make_node("SimplifiedLayerNormalization", ["hidden", "scale"], ["state"], "final_norm", **norm),
        helper.make_node("MatMul", ["state", "head"], [OUTPUT], "head"),
    ]
    graph = helper.make_graph(
        nodes,
        "exit_head",
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["num_rows", width])],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["num_rows", num_kept])],
        [numpy_helper.from_array(np.ascontiguousarray(w.float().cpu().numpy()), name) for name, w in weights.items()],
    )
    content = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    onnx.save(content, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=0)


def guesses(path: Path, rows: npt.NDArray[np.float32], kept_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """What a written head says first.  rows: [n, width] -> token ids [n]"""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    best = [session.run([OUTPUT], {INPUT: rows[at : at + 256]})[0].argmax(axis=1) for at in range(0, len(rows), 256)]
    found: npt.NDArray[np.int64] = kept_ids[np.concatenate(best)]
    return found
