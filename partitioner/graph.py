"""An exported graph at work: the plain ONNX Runtime loop that checks and measurements run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from edgecloud.errors import ModelError


class DraftGraph:
    """One sequence on fixed KV buffers: past and present are the same memory, a shorter mask forgets.

    Raises:
        ModelError: ONNX Runtime cannot load the file, or its logits are not those of the last position only.
    """

    def __init__(self, path: Path, max_tokens: int, num_threads: int, options: ort.SessionOptions | None = None) -> None:
        options = options or ort.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.log_severity_level = 3
        try:
            self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's own exceptions have no common base
            raise ModelError(f"{path} cannot be loaded by ONNX Runtime: {error}") from error
        logits_shape = next(output.shape for output in self._session.get_outputs() if output.name == "logits")
        if logits_shape[1] != 1:
            raise ModelError(f"{path} yields logits of shape {logits_shape}; export it with prune_lm_head=true")
        self.length = 0
        self.max_tokens = max_tokens
        self._logits = np.zeros((1, 1, logits_shape[2]), np.float32)
        self._mask = np.ones((1, max_tokens), np.int64)
        self._binding = self._session.io_binding()
        self._binding.bind_output("logits", "cpu", 0, np.float32, self._logits.shape, self._logits.ctypes.data)
        for cache in self._session.get_inputs():
            if cache.name.startswith("past_key_values"):
                _, heads, _, head_size = cache.shape
                buffer = ort.OrtValue.ortvalue_from_numpy(np.zeros((1, heads, max_tokens, head_size), np.float32))
                self._binding.bind_ortvalue_input(cache.name, buffer)
                self._binding.bind_ortvalue_output(cache.name.replace("past_key_values", "present"), buffer)

    def extend(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Append tokens.  -> logits [vocab] after the last; overwritten by the next call."""
        ids = np.asarray([token_ids], np.int64)
        total = self.length + ids.shape[1]
        if total > self.max_tokens:
            raise ValueError(f"{total} tokens do not fit buffers for {self.max_tokens}")
        self._binding.bind_input("input_ids", "cpu", 0, np.int64, ids.shape, ids.ctypes.data)
        self._binding.bind_input("attention_mask", "cpu", 0, np.int64, (1, total), self._mask.ctypes.data)
        self._session.run_with_iobinding(self._binding)
        self.length = total
        last: npt.NDArray[np.float32] = self._logits[0, 0]
        return last

    def crop_to(self, length: int) -> None:
        """Forget the tokens from `length` on."""
        self.length = length

    def end_profiling(self) -> str:
        """The file in which ONNX Runtime has noted every node's time, where the options asked for it."""
        return str(self._session.end_profiling())
