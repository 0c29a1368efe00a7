"""An exported graph at work: the plain ONNX Runtime loop that checks and measurements run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from edgecloud.draft_vocab import DraftVocab
from edgecloud.errors import ModelError

BOUNDARY = "boundary"  # a front's output: [1, rows, width] float32


class CachedGraph:
    """One sequence on fixed KV buffers: past and present are the same memory, a shorter mask forgets.

    Raises:
        ModelError: ONNX Runtime cannot load the file.
    """

    def __init__(self, path: Path, max_tokens: int, num_threads: int, options: ort.SessionOptions | None = None) -> None:
        options = options or ort.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.log_severity_level = 3
        try:
            self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's own exceptions have no common base
            raise ModelError(f"{path} cannot be loaded by ONNX Runtime: {error}") from error
        self.path = path
        self.length = 0
        self.max_tokens = max_tokens
        self._output_shapes = {output.name: output.shape for output in self._session.get_outputs()}
        self._mask = np.ones((1, max_tokens), np.int64)
        self._binding = self._session.io_binding()
        for cache in self._session.get_inputs():
            if cache.name.startswith("past_key_values"):
                _, heads, _, head_size = cache.shape
                buffer = ort.OrtValue.ortvalue_from_numpy(np.zeros((1, heads, max_tokens, head_size), np.float32))
                self._binding.bind_ortvalue_input(cache.name, buffer)
                self._binding.bind_ortvalue_output(cache.name.replace("past_key_values", "present"), buffer)

    def crop_to(self, length: int) -> None:
        """Forget the tokens from `length` on."""
        self.length = length

    def end_profiling(self) -> str:
        """The file in which ONNX Runtime has noted every node's time, where the options asked for it."""
        return str(self._session.end_profiling())

    def _append(self, token_ids: Sequence[int], output: str, rows: npt.NDArray[np.float32]) -> None:
        """Run over `token_ids` and write what comes out under this name to `rows`."""
        ids = np.asarray([token_ids], np.int64)
        total = self.length + ids.shape[1]
        if total > self.max_tokens:
            raise ValueError(f"{total} tokens do not fit buffers for {self.max_tokens}")
        self._binding.bind_output(output, "cpu", 0, np.float32, rows.shape, rows.ctypes.data)
        self._binding.bind_input("input_ids", "cpu", 0, np.int64, ids.shape, ids.ctypes.data)
        self._binding.bind_input("attention_mask", "cpu", 0, np.int64, (1, total), self._mask.ctypes.data)
        self._session.run_with_iobinding(self._binding)
        self.length = total


class DraftGraph(CachedGraph):
    """A draft: logits of the last position, of all tokens or those of `vocab`.

    Raises ModelError, also where the logits are those of all positions or of another number of tokens.
    """

    def __init__(
        self,
        path: Path,
        max_tokens: int,
        num_threads: int,
        options: ort.SessionOptions | None = None,
        vocab: DraftVocab | None = None,
    ) -> None:
        super().__init__(path, max_tokens, num_threads, options)
        shape = self._output_shapes["logits"]
        if shape[1] != 1:
            raise ModelError(f"{path} yields logits of shape {shape}; export it with prune_lm_head=true")
        if vocab is not None and shape[2] != len(vocab):
            raise ModelError(f"{path} yields logits of {shape[2]} tokens, its list has {len(vocab)}; export it again")
        self.kept = None if vocab is None else np.array(vocab.token_ids)  # whose logits they are; None: of all tokens
        self._logits = np.zeros((1, 1, shape[2]), np.float32)

    def extend(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Append tokens.  -> logits [vocab] or [kept] after the last; overwritten by the next call."""
        self._append(token_ids, "logits", self._logits)
        last: npt.NDArray[np.float32] = self._logits[0, 0]
        return last


class FrontGraph(CachedGraph):
    """A front: a row of the residual stream for every token."""

    def __init__(self, path: Path, max_tokens: int, num_threads: int) -> None:
        super().__init__(path, max_tokens, num_threads)
        self.width = int(self._output_shapes[BOUNDARY][2])

    def extend(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Append tokens.  -> [len(token_ids), width]"""
        rows = np.empty((1, len(token_ids), self.width), np.float32)
        self._append(token_ids, BOUNDARY, rows)
        found: npt.NDArray[np.float32] = rows[0]
        return found
