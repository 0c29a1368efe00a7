"""The front of a split target: its embedding and first layers, on the device. Rows of the residual stream come out.

A row must be the same bits however the tokens came in, because the boundary codec's rounding makes much of a last bit. ONNX
Runtime's CPU kernels give that for runs of two rows and more, not for one: products of one row, and attention of one row or
with one row left over from a tile, sum in another order. So no run here is shorter or longer than the kernels bear.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgecloud.edge.kv_graph import KvGraph
from edgecloud.errors import BundleError, ContextLengthError

OUTPUT = "boundary"  # the graph's: [1, rows, width]
MIN_RUN_TOKENS = 2  # a single token is computed together with the one before it, once more
MAX_RUN_TOKENS = 64  # no more than a tile of attention, so that no tile is left with one row

Rows = npt.NDArray[np.float32]  # [number of tokens, width]


class FrontModel:
    """One token sequence at a time.

    Raises:
        BundleError: the file is no graph of the form that edge/kv_graph.py runs, with rows as its output.
    """

    def __init__(self, path: Path, max_tokens: int, num_threads: int) -> None:
        try:
            self._graph = KvGraph(path, max(max_tokens, MIN_RUN_TOKENS), MAX_RUN_TOKENS, num_threads)
            self.width = int(self._graph.output_shapes[OUTPUT][-1])
        except Exception as error:  # onnxruntime's exceptions share no base class of their own
            raise BundleError(f"{path} is no front that this version can run: {error}") from error
        self.max_tokens = max_tokens
        self._rows = np.empty((MAX_RUN_TOKENS, self.width), np.float32)
        self._tokens: list[int] = []  # whose keys and values are in the buffers

    @property
    def num_cached(self) -> int:
        """Tokens whose keys and values count."""
        return len(self._tokens)

    def extend(self, token_ids: Sequence[int]) -> Rows:
        """Append tokens.  -> [len(token_ids), width], the caller's own

        Raises:
            ContextLengthError: more tokens than the buffers hold; nothing is appended.
        """
        if (total := len(self._tokens) + len(token_ids)) > self.max_tokens:
            raise ContextLengthError(f"{total} tokens do not fit the front's window of {self.max_tokens}")
        rows = np.empty((len(token_ids), self.width), np.float32)
        for start in range(0, len(token_ids), MAX_RUN_TOKENS):
            chunk = list(token_ids[start : start + MAX_RUN_TOKENS])
            rows[start : start + len(chunk)] = self._run(chunk)
        return rows

    def crop_to(self, length: int) -> None:
        """Forget the tokens past `length`."""
        del self._tokens[length:]

    def _run(self, chunk: list[int]) -> Rows:
        start = len(self._tokens)
        missing = max(0, MIN_RUN_TOKENS - len(chunk))
        again = min(missing, start)  # tokens before, whose keys and values are written again as they were
        padding = missing - again  # tokens after, which nobody before them sees, and which the next run overwrites
        run = [*self._tokens[start - again :], *chunk, *[0] * padding]
        self._graph.bind_output(OUTPUT, self._rows, (1, len(run), self.width))
        self._graph.run(run, start - again)
        self._tokens += chunk
        rows: Rows = self._rows[again : again + len(chunk)]
        return rows
