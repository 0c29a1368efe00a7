"""The front of a split target: its embedding and first layers as an ONNX graph whose output is the residual stream.

The graph is the model builder's, of one layer more than the front has: in it the stream that enters that layer has a name.
Cutting there leaves nothing of the layers behind, no weight and no cache.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx_ir as ir

from edgecloud.errors import ModelError
from edgecloud.partitioner.export import GRAPH_FILES, run_builder
from edgecloud.partitioner.graph import BOUNDARY
from edgecloud.partitioner.model_folder import ModelFolder


def export_front(model: ModelFolder, cut: int, folder: Path) -> Path:
    """Write the front of the layers before `cut`, in fp32.  -> the graph

    Raises:
        ModelError: the builder cannot export this model, or its graph has not the form of a front.
        BundleError: there is no room for the graph.
    """
    whole = run_builder(model, folder / "layers", "fp32", ["exclude_lm_head=true", f"num_hidden_layers={cut + 1}"])
    graph = folder / GRAPH_FILES[0]
    cut_graph(whole, cut, graph)
    shutil.rmtree(whole.parent)
    return graph


def cut_graph(whole: Path, cut: int, front: Path) -> None:
    """Keep what the stream entering layer `cut` is made of, and its caches. Raises ModelError."""
    model = ir.load(whole)
    graph = model.graph
    caches = [f"{layer}.{part}" for layer in range(cut) for part in ("key", "value")]
    inputs = ["input_ids", "attention_mask", *(f"past_key_values.{name}" for name in caches)]
    stream = _stream_entering(graph, cut)
    try:
        kept = ir.convenience.extract(graph, inputs, [stream.name or "", *(f"present.{name}" for name in caches)])
    except ValueError as error:
        raise ModelError(
            f"the first {cut} layers of this model are no front: {error}; "
            "it takes token ids, one key-value cache a layer, and one residual stream"
        ) from error
    ir.save(ir.Model(kept, ir_version=model.ir_version), front, external_data=GRAPH_FILES[1], size_threshold_bytes=0)


def _stream_entering(graph: ir.Graph, layer: int) -> ir.Value:
    """The sum that the layer's norm makes on its way, by a node of its own: the norm's weight is the cloud's."""
    norm = ir.convenience.create_value_mapping(graph).get(f"/model/layers.{layer}/input_layernorm/output_3")
    producer = None if norm is None else norm.producer()
    if norm is None or producer is None:
        raise ModelError(f"the exported graph names no residual stream that enters layer {layer}; this model cannot be cut")
    stream = ir.Value(name=BOUNDARY, shape=norm.shape, type=ir.TensorType(ir.DataType.FLOAT))
    graph.append(ir.Node("", "Add", list(producer.inputs[:2]), outputs=[stream], name="/boundary/Add"))
    return stream
