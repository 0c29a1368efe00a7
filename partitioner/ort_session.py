"""ONNX Runtime sessions of models in memory: the whole, or a part of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort

from edgecloud.errors import ModelError
from edgecloud.partitioner.samples import Array

ALL = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
PORTABLE = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED  # nothing that depends on this processor
NONE = ort.GraphOptimizationLevel.ORT_DISABLE_ALL


class Session:
    """A loaded model. Raises ModelError if ONNX Runtime does not take it, or not its inputs."""

    def __init__(
        self,
        model: onnx.ModelProto | bytes,
        num_threads: int,
        *,
        name: str = "the model",  # for errors
        level: Any = ALL,
        optimized: Path | None = None,  # write there what the runtime makes of it
        profile: Path | None = None,  # prefix of a file for times
    ) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.log_severity_level = 4
        options.graph_optimization_level = level
        if optimized is not None:
            options.optimized_model_filepath = str(optimized)
            options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{optimized.name}.data")
            options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        raw = model if isinstance(model, bytes) else model.SerializeToString()
        try:
            self._session = ort.InferenceSession(raw, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's own exceptions have no common base
            raise ModelError(f"ONNX Runtime cannot load {name}: {_first_line(error)}") from error
        self._name = name
        self.input_names = [value.name for value in self._session.get_inputs()]
        self.output_names = [value.name for value in self._session.get_outputs()]

    def run(self, values: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Any]:
        """Outputs by name. `values` may hold more than the inputs."""
        names = list(outputs) if outputs is not None else self.output_names
        try:
            found = self._session.run(names, {name: values[name] for name in self.input_names})
        except Exception as error:
            raise ModelError(f"{self._name} does not run on the samples: {_first_line(error)}") from error
        return dict(zip(names, found, strict=True))

    def end_profiling(self) -> Path:
        """-> the file of times"""
        return Path(self._session.end_profiling())


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
