"""The head of an exported draft, reduced to the tokens that it may propose; and its scales, halved on disk.

Where head and embedding are one matrix the file keeps it once: the head's rows are gathered from it by constants, which
ONNX Runtime works out once, when it loads the graph.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgecloud.draft_vocab import DraftVocab
from edgecloud.errors import ModelError

LOGITS = "logits"
HEADS = {"MatMul": ((1,), 1), "MatMulNBits": ((1, 2, 3), 0)}  # inputs with a row or column a token, and their axis
QUANTIZED = ("MatMulNBits", "GatherBlockQuantized")
SCALES = 2  # their place among the inputs of both
MAX_HALVING_ERROR = 2.0**-10  # of a scale; beyond lie those that are too small for fp16

Ids = npt.NDArray[np.int64]


def trim_head(path: Path, vocab: DraftVocab, vocab_size: int) -> None:
    """Rewrite a graph of `vocab_size` logits so that it yields those of `vocab`, in its order.

    Raises:
        ModelError: the graph does not end in a matrix product.
    """
    model = ir.load(path)
    graph = model.graph
    logits = next(value for value in graph.outputs if value.name == LOGITS)
    head = logits.producer()
    if head is None or head.op_type not in HEADS:
        found = "nothing" if head is None else head.op_type
        raise ModelError(f"its logits come from {found}, no plain product, so its head cannot be trimmed; leave out the list")
    ids = ir.Value(name="draft_vocab.token_ids", const_value=ir.tensor(np.array(vocab.token_ids, np.int64)))
    places, axis = HEADS[head.op_type]
    for place in places:
        weights = head.inputs[place] if place < len(head.inputs) else None
        if weights is not None:
            head.replace_input_with(place, _kept(graph, head, weights, ids, axis, vocab_size))
    if ids.uses():
        graph.register_initializer(ids)
    if "N" in head.attributes:
        head.attributes["N"] = ir.AttrInt64("N", len(vocab))
    assert logits.shape is not None
    logits.shape = ir.Shape([*logits.shape[:-1], len(vocab)])
    _halve_scales(graph)
    _replace(path, model)


def _kept(graph: ir.Graph, head: ir.Node, weights: ir.Value, ids: ir.Value, axis: int, vocab_size: int) -> ir.Value:
    """What is kept of a matrix: gathered when the graph is loaded if something else needs all of it, else now."""
    if weights.const_value is None or weights.shape is None or weights.shape[axis] != vocab_size:
        raise ModelError(f"its head has {weights.name} where {vocab_size} rows belong, so it cannot be trimmed; leave out the list")
    assert ids.const_value is not None
    if len(weights.uses()) > 1:
        gather = ir.node("Gather", [weights, ids], {"axis": axis}, name=f"{weights.name}_kept")
        graph.insert_before(head, gather)
        return gather.outputs[0]
    rows = np.ascontiguousarray(weights.const_value.numpy().take(ids.const_value.numpy(), axis))
    kept = ir.Value(name=f"{weights.name}_kept", const_value=ir.tensor(rows, name=f"{weights.name}_kept"))
    graph.register_initializer(kept)
    del graph.initializers[str(weights.name)]
    return kept


def _halve_scales(graph: ir.Graph) -> None:
    """Scales in fp16, widened by constants when the graph is loaded: a tenth of a file in int4, and no time."""
    users = [node for node in graph if node.op_type in QUANTIZED]
    used = [node.inputs[SCALES] for node in users]
    gathers = [None if scales is None else scales.producer() for scales in used]
    owned = {scales if gather is None else gather.inputs[0] for scales, gather in zip(used, gathers, strict=True)}
    for scales in sorted((value for value in owned if value is not None), key=lambda value: str(value.name)):
        if scales.const_value is None or scales.dtype != ir.DataType.FLOAT:
            continue
        exact = scales.const_value.numpy()
        half = exact.astype(np.float16)
        if (np.abs(half - exact) > MAX_HALVING_ERROR * np.abs(exact)).any():
            continue
        name = f"{scales.name}_fp16"
        stored = ir.Value(name=name, const_value=ir.tensor(half, name=name))
        graph.register_initializer(stored)
        cast = ir.node("Cast", [stored], {"to": ir.DataType.FLOAT}, name=f"{name}_widened")
        graph.insert_before(graph[0], cast)
        ir.convenience.replace_all_uses_with(scales, cast.outputs[0])
        del graph.initializers[str(scales.name)]


def _replace(path: Path, model: ir.Model) -> None:
    """Write beside the graph first: its weights are read from the old file while the new one is written."""
    data = f"{path.name}.data"
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        ir.save(model, Path(folder) / path.name, external_data=data)
        for name in (data, path.name):
            (Path(folder) / name).replace(path.with_name(name))
