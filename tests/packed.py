"""Packed batches, as examples to hold the attention kernels against the reference."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import strategies as st

from edgecloud.kernels import attention, attention_torch
from edgecloud.kernels.attention import Segment

Floats32 = npt.NDArray[np.float32]
TOLERANCE = 2e-5  # of values near 1, in fp32


@dataclass(frozen=True)
class Case:
    """A packed batch: whose rows, on which slots, with which settings."""

    query: Floats32  # [rows, heads, head_dim]
    keys: Floats32  # [kv_heads, slots, head_dim]
    values: Floats32  # [kv_heads, slots, value_dim]
    segments: list[Segment]
    scaling: float

    def expected(self, **options: Any) -> npt.NDArray[np.float64]:
        """The reference's answer."""
        return attention.ragged_paged_attention(self.query, self.keys, self.values, self.segments, self.scaling, **options)

    def run(self, **options: Any) -> tuple[npt.NDArray[np.float64], Floats32]:
        """The reference's answer and torch's."""
        tensors = [torch.from_numpy(a) for a in (self.query, self.keys, self.values)]
        got = attention_torch.ragged_paged_attention(*tensors, self.segments, self.scaling, **options)
        return self.expected(**options), got.numpy()


@st.composite
def cases(draw: st.DrawFn, max_length: int = 40) -> Case:
    """Several sequences of unlike lengths: decode, verify, whole prompts and later chunks, in one run or in many."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    head_dim, value_dim = draw(st.sampled_from([(4, 4), (8, 8), (8, 5), (17, 20)]))
    page_size, scattered = draw(st.integers(1, 8)), draw(st.booleans())
    lengths = draw(st.lists(st.integers(1, max_length), min_size=1, max_size=4))
    num_pages = sum(-(-length // page_size) for length in lengths) + draw(st.integers(0, 3))
    free = list(rng.permutation(num_pages)) if scattered else list(range(num_pages))
    segments: list[Segment] = []
    start = 0
    for length in lengths:
        pages = [int(free.pop(0)) for _ in range(-(-length // page_size))]
        slots = [page * page_size + i for page in pages for i in range(page_size)][:length]
        num_rows = draw(st.one_of(st.just(1), st.just(length), st.integers(1, length)))
        segments.append(Segment(start, start + num_rows, length, runs_of(slots)))
        start += num_rows
    return Case(
        query=rng.standard_normal((start, kv_heads * group, head_dim), np.float32),
        keys=rng.standard_normal((kv_heads, num_pages * page_size, head_dim), np.float32),
        values=rng.standard_normal((kv_heads, num_pages * page_size, value_dim), np.float32),
        segments=segments,
        scaling=draw(st.sampled_from([head_dim**-0.5, 1.0, 0.05])),
    )


def runs_of(slots: list[int]) -> tuple[tuple[int, int], ...]:
    cuts = [i + 1 for i, (a, b) in enumerate(pairwise(slots)) if b != a + 1]
    return tuple((slots[a], slots[b - 1] + 1) for a, b in pairwise([0, *cuts, len(slots)]))
