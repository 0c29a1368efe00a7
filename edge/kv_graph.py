"""An ONNX graph with attention caches, as the device runs it: the buffers are bound once and never copied.

The graph is onnxruntime-genai's: GroupQueryAttention with past and present in the same buffer. How far the caches count
is the length of the attention mask, so cropping is only a shorter mask.
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


class KvGraph:
    """One token sequence at a time. Its one output besides the caches is bound by whoever runs it.

    Raises whatever ONNX Runtime raises for a file that is no such graph; its exceptions share no base class of their own.
    """

    def __init__(self, path: Path, max_tokens: int, max_rows: int, num_threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        caches = {i.name: i.shape for i in self._session.get_inputs() if i.name.startswith("past_key_values.")}
        if not caches:
            raise ValueError("it has no past_key_values")
        self.output_shapes = {o.name: o.shape for o in self._session.get_outputs() if not o.name.startswith("present.")}
        self.ids = np.empty((1, max_rows), np.int64)
        self.mask = np.ones((1, max_tokens), np.int64)
        self.caches = {
            name: _lazy_zeros((1, kv_heads, max_tokens, head_dim)) for name, (_, kv_heads, _, head_dim) in caches.items()
        }
        self._binding = self._session.io_binding()
        for name, cache in self.caches.items():
            present = name.replace("past_key_values.", "present.")
            self._binding.bind_input(name, "cpu", 0, np.float32, cache.shape, cache.ctypes.data)
            self._binding.bind_output(present, "cpu", 0, np.float32, cache.shape, cache.ctypes.data)

    def bind_output(self, name: str, buffer: npt.NDArray[np.float32], shape: tuple[int, ...]) -> None:
        """Where the following runs write what they yield: `shape`, which must be that of the run, at the start of `buffer`."""
        self._binding.bind_output(name, "cpu", 0, np.float32, shape, buffer.ctypes.data)

    def run(self, token_ids: Sequence[int], start: int) -> None:
        """Compute the tokens at positions from `start` on; the caches hold those before, and these afterwards."""
        num_tokens = len(token_ids)
        self.ids[0, :num_tokens] = token_ids
        self._binding.bind_input("input_ids", "cpu", 0, np.int64, (1, num_tokens), self.ids.ctypes.data)
        self._binding.bind_input("attention_mask", "cpu", 0, np.int64, (1, start + num_tokens), self.mask.ctypes.data)
        self._session.run_with_iobinding(self._binding)


def _lazy_zeros(shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Zeros that take memory page by page as they are written.

    np.zeros asks for huge pages, and then the first token of every head would take 2 MB, however short the sequence.
    """
    memory = mmap.mmap(-1, 4 * math.prod(shape), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.float32).reshape(shape)
