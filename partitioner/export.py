"""A Hugging Face folder as an ONNX graph for the device, by onnxruntime-genai's model builder.

`prune_lm_head` is required: the graph then yields logits of the last position only, which is all a drafter reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import onnx

from edgecloud.draft_vocab import DRAFT_VOCAB, DraftVocab
from edgecloud.errors import BundleError, ModelError
from edgecloud.fingerprint import read_json
from edgecloud.partitioner.child import ChildError, run_module
from edgecloud.partitioner.download import NO_SPACE
from edgecloud.partitioner.model_folder import ModelFolder
from edgecloud.partitioner.trimmed_head import trim_head

Precision = Literal["int4", "fp32"]  # of a draft
FrontPrecision = Literal["int4", "int8", "fp16", "fp32"]
BUILDER = "onnxruntime_genai.models.builder"
GRAPH_FILES = ("model.onnx", "model.onnx.data")


def export_graph(model: ModelFolder, folder: Path, precision: Precision, vocab: DraftVocab | None = None) -> Path:
    """Write model.onnx and model.onnx.data to `folder`; with `vocab` it yields logits of these tokens only.  -> the graph

    Raises:
        ModelError: the builder cannot export this model; carries its last lines. Or its head cannot be trimmed.
        BundleError: there is no room for the graph.
    """
    tied = bool(model.config.get("tie_word_embeddings"))
    options = ["prune_lm_head=true", f"shared_embeddings={'true' if tied else 'false'}"]
    if precision == "int4":
        options.append("accuracy_level=4")  # activations in int8
    if vocab is None:
        return run_builder(model, folder, precision, options)
    if precision == "int4" and not tied:
        options.append("op_types_to_quantize=MatMul/Gather")  # who trims a head wants small files: the embedding in int4, too
    graph = run_builder(model, folder, precision, options)
    try:
        trim_head(graph, vocab, model.vocab_size)
    except OSError as error:
        if error.errno in NO_SPACE:
            raise BundleError(f"no room for the exported graph in {folder.parent}; free some space and run it again") from error
        raise
    except ModelError as error:
        raise ModelError(f"{model.path} has a {DRAFT_VOCAB}, but {error}") from error
    return graph


def run_builder(model: ModelFolder, folder: Path, precision: Precision, options: Sequence[str]) -> Path:
    """The builder with these of its extra options. As `export_graph`."""
    try:
        run_module(
            BUILDER,
            ["-i", str(model.path), "-o", str(folder), "-p", precision, "-e", "cpu", "-c", str(folder / "cache"),
             "--extra_options", *options],
        )  # fmt: skip
    except ChildError as error:
        if error.out_of_space:
            raise BundleError(f"no room for the exported graph in {folder.parent}; free some space and run it again") from error
        raise ModelError(f"{model.path} cannot be exported as {precision} ONNX: {error}") from error
    graph = folder / GRAPH_FILES[0]
    if not graph.is_file():
        raise ModelError(f"{model.path} cannot be exported as {precision} ONNX: the builder wrote no {graph.name}")
    _pin_head_size(graph)
    return graph


def _pin_head_size(graph: Path) -> None:
    """Write the KV caches' last dimension into the graph, where the builder leaves a name."""
    head_size = read_json(graph.with_name("genai_config.json"))["model"]["decoder"]["head_size"]
    content = onnx.load(graph, load_external_data=False)
    for value in [*content.graph.input, *content.graph.output]:
        if value.name.startswith(("past_key_values.", "present.")):
            value.type.tensor_type.shape.dim[3].dim_value = head_size
    onnx.save(content, graph)
