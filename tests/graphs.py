"""Small ONNX graphs: random ones, and a convolutional one with what real ones have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgecloud.partitioner.onnx_model import OnnxModel, load_model
from edgecloud.partitioner.samples import Sample

WIDTH = 4
OPSET = 17


def save(path: Path, nodes: list[onnx.NodeProto], inputs: list[str], outputs: list[str], weights: dict[str, np.ndarray]) -> Path:
    """A model over float32 tensors of [rows, WIDTH]."""
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", WIDTH]) for name in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", WIDTH]) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9), path)
    return path


def branch(name: str, reads: str) -> onnx.GraphProto:
    """A branch of an If: it has no inputs and reads a name of the outer graph."""
    node = helper.make_node("Neg" if name.endswith("then") else "Abs", [reads], [name])
    return helper.make_graph([node], name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)])


@st.composite
def random_graphs(draw: st.DrawFn) -> tuple[list[onnx.NodeProto], list[str], list[str]]:
    """Nodes, inputs and outputs: skips, several inputs and outputs, shared weights and constants, an If that reads outer names."""
    inputs = [f"in{index}" for index in range(draw(st.integers(1, 2)))]
    nodes = [helper.make_node("Identity", ["w0"], ["shared"])]  # a constant that several nodes read
    known = list(inputs)
    for index in range(draw(st.integers(2, 7))):
        first, second = draw(st.sampled_from(known)), draw(st.sampled_from([*known, "shared", "w1"]))
        kind = draw(st.sampled_from(["Add", "Mul", "MatMul", "Relu", "If", "Split", "Constant"]))
        out = f"t{index}"
        if kind == "MatMul":
            nodes.append(helper.make_node(kind, [first, draw(st.sampled_from(["w0", "shared"]))], [out], name=f"node{index}"))
        elif kind == "Relu":
            nodes.append(helper.make_node(kind, [first], [out], name=f"node{index}"))
        elif kind == "Split":
            nodes.append(helper.make_node(kind, [first], [f"{out}a", f"{out}b"], name=f"node{index}", axis=1))
            nodes.append(helper.make_node("Concat", [f"{out}b", f"{out}a"], [out], axis=1))
        elif kind == "If":
            nodes.append(helper.make_node("ReduceSum", [second], [f"{out}sum"], keepdims=0))
            nodes.append(helper.make_node("Greater", [f"{out}sum", "zero"], [f"{out}test"]))
            then, other = branch(f"{out}then", first), branch(f"{out}else", draw(st.sampled_from(known)))
            nodes.append(helper.make_node("If", [f"{out}test"], [out], then_branch=then, else_branch=other))
        elif kind == "Constant":
            value = numpy_helper.from_array(np.full((1, WIDTH), index, np.float32))
            nodes.append(helper.make_node("Constant", [], [f"{out}c"], value=value))
            nodes.append(helper.make_node("Sub", [first, f"{out}c"], [out]))
        else:
            nodes.append(helper.make_node(kind, [first, second], [out], name=f"node{index}"))
        known.append(out)
    made = known[len(inputs) :]
    outputs = sorted({made[-1], *draw(st.lists(st.sampled_from(made), max_size=2))})
    return nodes, inputs, outputs


def load_random(path: Path, drawn: tuple[list[onnx.NodeProto], list[str], list[str]]) -> tuple[OnnxModel, Sample]:
    """As a file, and read back, with a sample."""
    nodes, inputs, outputs = drawn
    generator = np.random.default_rng(0)
    weights = {
        "w0": generator.standard_normal((WIDTH, WIDTH)).astype(np.float32),
        "w1": generator.standard_normal((1, WIDTH)).astype(np.float32),
        "zero": np.zeros((), np.float32),
    }
    for index, node in enumerate(nodes):  # rows of a weight are not those of the sample
        if node.op_type in ("Add", "Mul") and "shared" in node.input:
            nodes[index].input[:] = [name if name != "shared" else "w1" for name in node.input]
    model = load_model(save(path, nodes, inputs, outputs, weights))
    return model, {name: generator.standard_normal((3, WIDTH)).astype(np.float32) for name in inputs}


def small_network(path: Path, *, fixed: bool = False) -> Path:
    """Convolutions that shrink the picture, a skip, and a head: worth a cut in the middle on a slow link."""
    generator = np.random.default_rng(1)
    weights, nodes, last, channels = {}, [], "image", 3
    for index, (width, stride) in enumerate([(16, 2), (32, 2), (32, 1), (64, 2), (64, 2)]):
        weights[f"k{index}"] = (generator.standard_normal((width, channels, 3, 3)) / np.sqrt(9 * channels)).astype(np.float32)
        nodes.append(
            helper.make_node("Conv", [last, f"k{index}"], [f"c{index}"], name=f"conv{index}", pads=[1] * 4, strides=[stride] * 2)
        )
        nodes.append(helper.make_node("Relu", [f"c{index}"], [f"r{index}"], name=f"relu{index}"))
        last, channels = f"r{index}", width
        if index == 2:
            nodes.append(helper.make_node("Add", ["r1", "r2"], ["skip"], name="add"))
            last = "skip"
    nodes.append(helper.make_node("GlobalAveragePool", [last], ["pooled"]))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["flat"]))
    weights["head"] = generator.standard_normal((channels, 10)).astype(np.float32)
    nodes.append(helper.make_node("MatMul", ["flat", "head"], ["scores"], name="classify"))
    shape = [1, 3, 64, 64] if fixed else ["batch", 3, "height", "width"]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [shape[0], 10])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9), path)
    return path


def picture(path: Path, size: int = 64) -> Path:
    """A sample for the network."""
    np.savez(path, image=np.random.default_rng(2).random((1, 3, size, size)).astype(np.float32))
    return path
