"""A torch classifier as an ONNX graph, with the tracing exporter, which needs no package beside torch."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from edgecloud.errors import ModelError

if TYPE_CHECKING:
    import torch

INPUT, OUTPUT = "input", "scores"
OPSET = 17


def export_classifier(module: torch.nn.Module, example: torch.Tensor, path: Path, *, batch: bool = True) -> None:
    """Write the graph of a module in evaluation mode: `input` [batch, ...] in, `scores` [batch, classes] out.

    Args:
        module: takes one tensor and gives one, without control flow that depends on its values.
        example: an input, its first dimension that of samples.
        path: of the .onnx file.
        batch: whether the first dimension stays open.

    Raises:
        ModelError: it cannot be traced or written.
    """
    import torch

    was_training = module.training
    axes = {INPUT: {0: "batch"}, OUTPUT: {0: "batch"}} if batch else None
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of the tracing exporter's age
            torch.onnx.export(
                module.eval(), (example,), str(path), input_names=[INPUT], output_names=[OUTPUT], dynamic_axes=axes,
                opset_version=OPSET, dynamo=False,
            )  # fmt: skip
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise ModelError(f"the module cannot be exported to {path}: {str(error).strip().partition(chr(10))[0]}") from error
    finally:
        module.train(was_training)
