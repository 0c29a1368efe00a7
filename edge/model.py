"""The draft model on the device: an ONNX graph whose key-value buffers are bound once and never copied.

The graph is onnxruntime-genai's: GroupQueryAttention with past and present in the same buffer, logits of the last
position only. How far the cache counts is the length of the attention mask, so cropping is only a shorter mask.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from edgecloud.errors import BundleError, ContextLengthError
from edgecloud.tokens import common_prefix

PREFILL_CHUNK_TOKENS = 128


class DraftModel:
    """One token sequence at a time.

    Raises:
        BundleError: the file is no graph of the form above.
    """

    def __init__(self, path: Path, max_context_tokens: int, num_threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            inputs = {i.name: i for i in self._session.get_inputs()}
            self.vocab_size = int(self._session.get_outputs()[0].shape[-1])
            caches = {name: i.shape for name, i in inputs.items() if name.startswith("past_key_values.")}
            self._logits = np.empty((1, 1, self.vocab_size), np.float32)
            self._ids = np.empty((1, PREFILL_CHUNK_TOKENS), np.int64)
            self._mask = np.ones((1, max_context_tokens), np.int64)
            self._caches = {
                name: _lazy_zeros((1, kv_heads, max_context_tokens, head_dim))
                for name, (_, kv_heads, _, head_dim) in caches.items()
            }
            self._binding = self._bind()
        except Exception as error:  # onnxruntime's exceptions share no base class of their own
            raise BundleError(f"{path} is no draft model that this version can run: {error}") from error
        self.max_context_tokens = max_context_tokens
        self._tokens: list[int] = []  # whose keys and values are in the buffers

    @property
    def num_cached(self) -> int:
        """Tokens whose keys and values count."""
        return len(self._tokens)

    def extend_to(self, tokens: list[int]) -> npt.NDArray[np.float32]:
        """Logits after the last of `tokens`, computing only what the cache lacks.  -> [vocab]

        The array is the output buffer itself: valid until the next call.

        Raises:
            ContextLengthError: more tokens than the buffers hold.
        """
        if len(tokens) > self.max_context_tokens:
            raise ContextLengthError(f"{len(tokens)} tokens do not fit the draft model's window of {self.max_context_tokens}")
        self.crop_to(min(common_prefix(self._tokens, tokens), len(tokens) - 1))
        while (start := len(self._tokens)) < len(tokens):
            chunk = tokens[start : start + PREFILL_CHUNK_TOKENS]
            self._run(chunk, start + len(chunk))
            self._tokens += chunk
        row: npt.NDArray[np.float32] = self._logits[0, 0]
        return row

    def crop_to(self, length: int) -> None:
        """Forget the tokens past `length`."""
        del self._tokens[length:]

    def _run(self, chunk: Sequence[int], total: int) -> None:
        num_tokens = len(chunk)
        ids = self._ids[0, :num_tokens]
        ids[:] = chunk
        ids[ids >= self.vocab_size] = 0  # a target padded beyond the draft's embedding may choose such an id
        binding = self._binding
        binding.bind_input("input_ids", "cpu", 0, np.int64, (1, num_tokens), self._ids.ctypes.data)
        binding.bind_input("attention_mask", "cpu", 0, np.int64, (1, total), self._mask.ctypes.data)
        self._session.run_with_iobinding(binding)

    def _bind(self) -> ort.IOBinding:
        binding = self._session.io_binding()
        binding.bind_output("logits", "cpu", 0, np.float32, self._logits.shape, self._logits.ctypes.data)
        for name, cache in self._caches.items():
            present = name.replace("past_key_values.", "present.")
            binding.bind_input(name, "cpu", 0, np.float32, cache.shape, cache.ctypes.data)
            binding.bind_output(present, "cpu", 0, np.float32, cache.shape, cache.ctypes.data)
        return binding


def _lazy_zeros(shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Zeros that take memory page by page as they are written.

    np.zeros asks for huge pages, and then the first token of every head would take 2 MB, however short the sequence.
    """
    memory = mmap.mmap(-1, 4 * math.prod(shape), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.float32).reshape(shape)
