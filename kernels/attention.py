"""Ragged paged attention: the plan all versions share, and the NumPy float64 reference.

Packed queries of several sessions attend to their own contexts in one pool of key and value slots. A context is a list of
runs of consecutive slots, so a version can read each run as a view: no cache entry is ever copied to be read.
(Kwon et al., "Efficient memory management for LLM serving with PagedAttention", SOSP 2023.)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Segment:
    """The rows of one session in a packed batch: its last `stop - start` tokens, attending to all `length` tokens."""

    start: int  # first row of the packed queries
    stop: int  # one past the last row
    length: int  # context length, these rows included; row i stands at position length - (stop - start) + i
    runs: tuple[tuple[int, int], ...]  # slots [first, one past last) of the context, in order; lengths add up to `length`

    @property
    def num_rows(self) -> int:
        """Rows of this segment."""
        return self.stop - self.start


class Segments(tuple[Segment, ...]):
    """The segments of a pass, and what a version works out once for all of its layers.

    `bitwise`: the bits of a row shall depend on nothing but the row and its context.
    """

    plans: dict[Any, Any]
    bitwise: bool

    def __new__(cls, segments: Iterable[Segment], *, bitwise: bool = True) -> Segments:
        """Of segments in the order of their rows."""
        self = super().__new__(cls, segments)
        self.plans = {}
        self.bitwise = bitwise
        return self


def ragged_paged_attention(
    query: npt.NDArray[np.floating],
    keys: npt.NDArray[np.floating],
    values: npt.NDArray[np.floating],
    segments: Sequence[Segment],
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Floats:
    """Causal attention of every row over its own context. `segments` cover the rows, in order.

    query: [rows, heads, head_dim]; keys: [kv_heads, slots, head_dim]; values: [kv_heads, slots, value_dim]
    -> [rows, heads, value_dim]. Query head h reads kv head h // (heads / kv_heads). `sliding_window` w: a row at position p
    sees positions p-w+1..p. `softcap` c: scores become c * tanh(scores / c).
    """
    heads, kv_heads = query.shape[1], keys.shape[0]
    out = np.zeros((query.shape[0], heads, values.shape[2]), np.float64)
    for segment in segments:
        slots = np.concatenate([np.arange(first, last) for first, last in segment.runs])
        key_positions = np.arange(segment.length)
        for i in range(segment.num_rows):
            position = segment.length - segment.num_rows + i
            seen = key_positions <= position
            if sliding_window is not None:
                seen &= key_positions > position - sliding_window
            for head in range(heads):
                kv_head = head // (heads // kv_heads)
                scores = keys[kv_head, slots[seen]].astype(np.float64) @ query[segment.start + i, head].astype(np.float64)
                scores *= scaling
                if softcap is not None:
                    scores = softcap * np.tanh(scores / softcap)
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                out[segment.start + i, head] = weights @ values[kv_head, slots[seen]].astype(np.float64)
    return out
