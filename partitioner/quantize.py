"""Weights of an exported fp32 front in fewer bits: products block-wise by ONNX Runtime's own quantizer, and the embedding.

int8 and int4 compute with activations in int8 (accuracy level 4), as the draft does. fp16 is a matter of files only: on a CPU
ONNX Runtime widens such weights when it loads them, and computes in fp32. Run as a module: the quantizer talks, and takes room.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgecloud.errors import BundleError, ModelError
from edgecloud.partitioner.child import ChildError, run_module
from edgecloud.partitioner.export import FrontPrecision

BITS = {"int4": 4, "int8": 8}
BLOCK = 32  # weights that share a scale
ACCURACY_LEVEL = 4  # activations in int8; 1 would unpack every weight for a run of several rows, at ten times the time
DOMAIN = "com.microsoft"


def quantize_front(graph: Path, folder: Path, precision: FrontPrecision) -> Path:
    """Write the front in `graph` (fp32), or its exit head, to `folder` under the same name.  -> its graph there

    Raises:
        ModelError: it cannot be quantized; carries the last lines of what was said.
        BundleError: there is no room for it.
    """
    target = folder / graph.name
    if precision == "fp32":
        for name in (graph.name, f"{graph.name}.data"):
            shutil.copyfile(graph.with_name(name), folder / name)
        return target
    try:
        run_module(__name__, [str(graph), str(target), precision])
    except ChildError as error:
        if error.out_of_space:
            raise BundleError(f"no room for the front in {folder}; free some space and run it again") from error
        raise ModelError(f"the front cannot be written as {precision}: {error}; take another --front-precision") from error
    return target


def _in_blocks(graph: Path, bits: int) -> ir.Model:
    """Products in `bits`, the embedding in 8: it is read row by row, so its bits cost no time."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer  # importing it sets up logging for everybody

    quantizer = MatMulNBitsQuantizer(
        model=onnx.load(graph), bits=bits, block_size=BLOCK, is_symmetric=True, accuracy_level=ACCURACY_LEVEL,
        op_types_to_quantize=("MatMul",),
    )  # fmt: skip
    quantizer.process()
    model: ir.Model = ir.from_proto(quantizer.model.model)
    for node, embedding in _users_of_matrices(model.graph, "Gather"):
        codes, scales = _blocks_of_rows(_array(embedding))
        inputs = [
            _initializer(model.graph, f"{embedding.name}_Q8", codes),
            node.inputs[1],
            _initializer(model.graph, f"{embedding.name}_scales", scales),
        ]
        attributes = {"bits": 8, "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 1}
        _insert_instead(
            model.graph, node, ir.node("GatherBlockQuantized", inputs, attributes, domain=DOMAIN, name=f"{node.name}_Q8")
        )
    RemoveUnusedNodesPass()(model)
    return model


def _narrow(graph: Path) -> ir.Model:
    """Matrices as fp16, each widened where it is used: of the embedding only the rows that are read."""
    model = ir.load(graph)
    for node, matrix in _users_of_matrices(model.graph, "MatMul"):
        cast = _widen(_initializer(model.graph, f"{matrix.name}_fp16", _array(matrix).astype(np.float16)))
        model.graph.insert_before(node, cast)
        node.replace_input_with(1, cast.outputs[0])
    for node, matrix in _users_of_matrices(model.graph, "Gather"):
        half = _initializer(model.graph, f"{matrix.name}_fp16", _array(matrix).astype(np.float16))
        rows = ir.node("Gather", [half, node.inputs[1]], name=f"{node.name}_fp16")
        model.graph.insert_before(node, rows)
        _insert_instead(model.graph, node, _widen(rows.outputs[0]))
    RemoveUnusedNodesPass()(model)
    return model


def _blocks_of_rows(weights: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """[vocab, width] -> codes with 128 for zero, of the same shape, and scales [vocab, blocks]"""
    vocab, width = weights.shape
    num_blocks = -(-width // BLOCK)
    blocks = np.pad(weights, ((0, 0), (0, num_blocks * BLOCK - width))).reshape(vocab, num_blocks, BLOCK)
    scales = np.abs(blocks).max(axis=2) / np.float32(127)
    steps = np.where(scales == 0, np.float32(1), scales)[:, :, None]
    codes = (np.rint(blocks / steps) + 128).astype(np.uint8).reshape(vocab, -1)[:, :width]
    return np.ascontiguousarray(codes), scales


def _users_of_matrices(graph: ir.Graph, op_type: str) -> list[tuple[ir.Node, ir.Value]]:
    """Nodes of this type with the matrix, an initializer, that they multiply by or gather from."""
    place = 1 if op_type == "MatMul" else 0
    found = [(node, node.inputs[place]) for node in graph if node.op_type == op_type]
    return [(node, value) for node, value in found if value is not None and value.is_initializer() and len(value.shape or ()) == 2]


def _array(value: ir.Value) -> npt.NDArray[np.float32]:
    assert value.const_value is not None
    array: npt.NDArray[np.float32] = value.const_value.numpy()
    return array


def _initializer(graph: ir.Graph, name: str, array: npt.NDArray[Any]) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    graph.register_initializer(value)
    return value


def _widen(value: ir.Value) -> ir.Node:
    return ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, name=f"{value.name}_widened")


def _insert_instead(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    ir.convenience.replace_nodes_and_values(graph, old, [old], [new], old.outputs, new.outputs)


def _main(graph: Path, target: Path, precision: str) -> None:
    model = _narrow(graph) if precision == "fp16" else _in_blocks(graph, BITS[precision])
    ir.save(model, target, external_data=f"{target.name}.data", size_threshold_bytes=0)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
