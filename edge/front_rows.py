"""What the front makes of a token log, as it travels: every token's row of the boundary tensor, encoded, and what stands for it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from edgecloud.errors import ContextLengthError
from edgecloud.kernels.codec import decode, encode, row_bytes
from edgecloud.rpc.codec import row_keys
from edgecloud.tokens import common_prefix

CHUNK_TOKENS = 128


class Row(NamedTuple):
    """What the front makes of a token in its context."""

    data: bytes  # encoded, as it travels
    key: int  # what stands for it in the service's log


class Front(Protocol):
    """The target's first layers, with a cache: edge/front.py."""

    width: int  # of a row
    max_tokens: int

    def extend(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Append tokens.  -> [len(token_ids), width]"""
        ...

    def crop_to(self, length: int) -> None:
        """Forget the tokens from `length` on."""


class FrontRows:
    """Keeps the rows of the latest log, so that only new tokens go through the front and any row can be sent again.

    A courier and a drafter may ask at the same time; they take turns.

    Args:
        front: at the beginning.
        cut: its layers.
        codec: of kernels/codec.py.
    """

    def __init__(self, front: Front, cut: int, codec: str) -> None:
        self._front = front
        self.cut = cut
        self.codec = codec
        self.row_bytes = row_bytes(codec, front.width)
        self._tokens: list[int] = []
        self._rows: list[Row] = []
        self._turn = threading.Lock()

    def num_missing(self, tokens: Sequence[int]) -> int:
        """Tokens that would have to go through the front."""
        with self._turn:
            return len(tokens) - common_prefix(self._tokens, tokens)

    def rows(self, tokens: Sequence[int]) -> list[Row]:
        """A row for each of `tokens`. Raises ContextLengthError: more than the front's window; nothing is forgotten."""
        with self._turn:
            self._compute(tokens)
            return self._rows[: len(tokens)]

    def last_row(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """The row of the last of `tokens`, as the service decodes it.  -> [width]. Raises as `rows`."""
        with self._turn:
            self._compute(tokens)
            data = self._rows[len(tokens) - 1].data
        row: npt.NDArray[np.float32] = decode(np.frombuffer(data, np.uint8)[None], self.codec, self._front.width)[0]
        return row

    def _compute(self, tokens: Sequence[int]) -> None:
        if len(tokens) > self._front.max_tokens:
            raise ContextLengthError(f"{len(tokens)} tokens do not fit the front's window of {self._front.max_tokens}")
        start = common_prefix(self._tokens, tokens)
        if start < len(tokens):  # what merely goes on behind them stays
            del self._tokens[start:], self._rows[start:]
            self._front.crop_to(start)
        for at in range(start, len(tokens), CHUNK_TOKENS):
            chunk = tokens[at : at + CHUNK_TOKENS]
            data = encode(self._front.extend(chunk), self.codec).tobytes()
            keys = row_keys(data, self.row_bytes, self.cut, self.codec)
            self._rows += [Row(data[i * self.row_bytes : (i + 1) * self.row_bytes], key) for i, key in enumerate(keys)]
            self._tokens += chunk
