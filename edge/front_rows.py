"""Boundary rows of a token log, encoded as they travel, each computed once and kept.

The device owns the log, and here what stands for it on the wire: whatever a service has forgotten can be sent again, the
same bytes, without computing anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from edgecloud.errors import ContextLengthError
from edgecloud.tokens import common_prefix

Encoded = npt.NDArray[np.uint8]  # [number of tokens, row_bytes]


class Front(Protocol):
    """What computes rows: edge/front.py."""

    max_tokens: int
    width: int

    def extend(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Append tokens.  -> [len(token_ids), width]"""

    def crop_to(self, length: int) -> None:
        """Forget the tokens past `length`."""


class FrontRows:
    """The encoded rows of one token sequence at a time.

    `encode` maps rows [n, width] to bytes [n, row_bytes], each row by itself: kernels/codec.py.
    """

    def __init__(self, front: Front, encode: Callable[[npt.NDArray[np.float32]], Encoded]) -> None:
        self._front = front
        self._encode = encode
        row_bytes = encode(np.zeros((1, front.width), np.float32)).shape[1]
        self._rows: Encoded = np.empty((front.max_tokens, row_bytes), np.uint8)  # memory comes as it is written
        self._tokens: list[int] = []  # whose rows these are; the front's caches hold the same

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return int(self._rows.shape[1])

    def rows(self, tokens: Sequence[int], start: int = 0) -> Encoded:
        """Rows of tokens[start:], computing only what is new.  -> [len(tokens) - start, row_bytes]

        A view, valid until a call with other tokens.

        Raises:
            ContextLengthError: more tokens than the front's window.
        """
        for _ in self.chunks(tokens, start, max(1, len(tokens))):
            pass
        return self._rows[start : len(tokens)]

    def chunks(self, tokens: Sequence[int], start: int, chunk_tokens: int) -> Iterator[Encoded]:
        """The same, piece by piece, each as soon as it is computed: to be sent while the next one is.

        What is known already comes first, in one piece. Raises as `rows`, before anything is yielded.
        """
        if len(tokens) > self._front.max_tokens:
            raise ContextLengthError(f"{len(tokens)} tokens do not fit the front's window of {self._front.max_tokens}")
        known = self._keep(tokens)
        if known < start:
            self._compute(tokens[known:start])
        elif known > start:
            yield self._rows[start:known]
        for begin in range(max(known, start), len(tokens), chunk_tokens):
            piece = tokens[begin : begin + chunk_tokens]
            self._compute(piece)
            yield self._rows[begin : begin + len(piece)]

    def _keep(self, tokens: Sequence[int]) -> int:
        """Forget what `tokens` contradict; what merely goes on after them stays.  -> how many of their rows are known"""
        known = common_prefix(self._tokens, tokens)
        if known < len(tokens):
            del self._tokens[known:]
            self._front.crop_to(known)
        return known

    def _compute(self, piece: Sequence[int]) -> None:
        start = len(self._tokens)
        rows = self._encode(self._front.extend(piece))
        self._rows[start : start + len(piece)] = rows
        self._tokens += piece
