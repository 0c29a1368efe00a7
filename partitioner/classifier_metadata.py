"""The exits of a classifier in the metadata of its ONNX file, so that whoever cuts the graph knows of them."""

from __future__ import annotations

import json

import onnx
from onnx import helper

from edgecloud.errors import ModelError
from edgecloud.exits import Exits
from edgecloud.partitioner.onnx_model import OnnxModel

METADATA = "edgecloud.exits"  # key of the model's metadata


def set_exits(proto: onnx.ModelProto, exits: Exits) -> None:
    """Write them into the model's metadata, where `read_exits` finds them."""
    kept = [(entry.key, entry.value) for entry in proto.metadata_props if entry.key != METADATA]
    helper.set_model_props(proto, {**dict(kept), METADATA: json.dumps(exits.to_dict(), allow_nan=False)})


def read_exits(model: OnnxModel) -> Exits | None:
    """Those that the model says it has.

    Raises:
        BundleCorruptError: they cannot be. ModelError: the graph does not have their outputs.
    """
    text = next((entry.value for entry in model.proto.metadata_props if entry.key == METADATA), None)
    if text is None:
        return None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"{model.path}: {METADATA} in its metadata is no JSON ({error}); make it with `edgecloud exits`"
        ) from error
    exits = Exits.from_dict(content, model.path)
    if missing := {exits.output, *exits.outputs} - {tensor.name for tensor in model.outputs}:
        raise ModelError(f"{model.path} has no output {min(missing)!r}, which its exits name; make it with `edgecloud exits`")
    return exits
