"""Coupled choice in Triton: noise, filters and argmax in one pass over the logits. See choice.py for the definition.

Has run only in Triton's interpreter and been compiled for CUDA; it has never been run on a GPU.

A program scores one chunk of one row and keeps the best; torch takes the best of a row's chunks. Torch also finds where the
filters of a row end: comparing logits with that border is exact, and scores are float64, so the choice is the reference's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from edgecloud.kernels.choice_torch import ChoiceRow, nucleus_border, penalized
from edgecloud.sampling import SamplingSettings

CHUNK = 1024  # ids that a program scores


def choose(logits: Tensor, rows: Sequence[ChoiceRow]) -> list[int]:
    """The next token of every row. logits: [rows, vocab] -> one id a row."""
    if any(row.sampling.repetition_penalty != 1.0 for row in rows):
        logits = torch.stack([penalized(logits[i], row) for i, row in enumerate(rows)])
    num_rows, vocab_size = logits.shape
    borders = [_border(logits[i], row.sampling) for i, row in enumerate(rows)]
    seeds = np.array([row.sampling.seed for row in rows], np.uint64).view(np.int64).tolist()
    integers = [(seed, row.position, last) for seed, row, (_, last) in zip(seeds, rows, borders, strict=True)]
    reals = [(row.sampling.temperature, lowest) for row, (lowest, _) in zip(rows, borders, strict=True)]
    num_chunks = triton.cdiv(vocab_size, CHUNK)
    scores = logits.new_empty(num_rows, num_chunks, dtype=torch.float64)
    ids = logits.new_empty(num_rows, num_chunks, dtype=torch.int64)
    with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call]  # Triton launches on the current device
        _best_of_chunk[(num_rows, num_chunks)](
            logits,
            torch.tensor(integers, dtype=torch.int64, device=logits.device),
            torch.tensor(reals, dtype=torch.float64, device=logits.device),
            scores,
            ids,
            vocab_size,
            *logits.stride(),
            CHUNK=CHUNK,
        )
    chosen: list[int] = ids.gather(1, scores.argmax(dim=1, keepdim=True))[:, 0].tolist()
    return chosen


def _border(logits: Tensor, sampling: SamplingSettings) -> tuple[float, int]:
    """The lowest logit that the filters of a row keep, and the last id up to which its equals are kept."""
    lowest, last = -math.inf, len(logits) - 1
    if sampling.greedy:
        return lowest, last
    if 0 < sampling.top_k < len(logits):
        lowest = torch.topk(logits, sampling.top_k).values[-1].item()
    if sampling.top_p < 1.0:
        border, num_equal = nucleus_border(logits[logits >= lowest].to(torch.float64), sampling.temperature, sampling.top_p)
        lowest, last = border.item(), int((logits == border).nonzero()[num_equal - 1])
    return lowest, last


@triton.jit
def _best_of_chunk(
    logits: tl.tensor,
    integers: tl.tensor,
    reals: tl.tensor,
    scores: tl.tensor,
    ids: tl.tensor,
    vocab_size: tl.tensor,
    row_stride: tl.tensor,
    stride: tl.tensor,
    CHUNK: tl.constexpr,
) -> None:
    """The highest score of a chunk and its id; of equals the first."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * CHUNK
    seed = tl.load(integers + 3 * row)
    position = tl.load(integers + 3 * row + 1).to(tl.uint32)
    last = tl.load(integers + 3 * row + 2)
    temperature = tl.load(reals + 2 * row)
    lowest = tl.load(reals + 2 * row + 1)

    v = first + tl.arange(0, CHUNK)
    score = tl.load(logits + row * row_stride + v * stride, mask=v < vocab_size, other=float("-inf")).to(tl.float64)
    score = tl.where(score <= float("inf"), score, float("inf"))  # a NaN is the highest, as to NumPy and torch
    score = tl.where((score > lowest) | ((score == lowest) & (v <= last)), score, float("-inf"))
    if (temperature > 0) & (tl.max(score, 0) > float("-inf")):
        score = score / temperature + _gumbel(seed, position, first, CHUNK)
    highest, best = tl.max(score, 0, return_indices=True)
    at = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(scores + at, highest)
    tl.store(ids + at, (first + best).to(tl.int64))


@triton.jit
def _gumbel(seed: tl.tensor, position: tl.tensor, first: tl.tensor, CHUNK: tl.constexpr) -> tl.tensor:
    """G(seed, position, v) for the ids from `first` on, which is a multiple of four.  -> [CHUNK] float64"""
    lanes = tl.philox(seed, first // 4 + tl.arange(0, CHUNK // 4), position, 0, 0)
    bits = tl.interleave(tl.interleave(lanes[0], lanes[2]), tl.interleave(lanes[1], lanes[3]))
    u = (bits.to(tl.float64) + 0.5) * 2.0**-32
    return -tl.log(-tl.log(1 - u))  # 1 - u is exact in float64, so log rounds as log1p would
