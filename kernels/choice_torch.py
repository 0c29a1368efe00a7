"""Coupled choice in torch, many rows at once, each with its own settings. See choice.py for the definition.

Runs on any device; integer work in int64 (products wrap as in uint64, so the low words are exact), the rest in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgecloud.kernels.choice import PHILOX_M, round_keys
from edgecloud.sampling import SamplingSettings

MASK = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class ChoiceRow:
    """Row i of the logits: the tokens it follows (their number is the position) and how to choose."""

    tokens: Sequence[int]  # all tokens before the one to choose
    sampling: SamplingSettings


def gumbel(seed: int, position: int, vocab_size: int, device: torch.device) -> Tensor:
    """G(seed, position, v) for every v.  -> [vocab_size] float64"""
    c0 = torch.arange((vocab_size + 3) // 4, dtype=torch.int64, device=device)
    c1 = torch.full_like(c0, position)
    c2 = torch.zeros_like(c0)
    c3 = torch.zeros_like(c0)
    for k0, k1 in round_keys(seed):
        p0, p1 = c0 * PHILOX_M[0], c2 * PHILOX_M[1]
        c0, c1, c2, c3 = ((p1 >> 32) & MASK) ^ c1 ^ k0, p1 & MASK, ((p0 >> 32) & MASK) ^ c3 ^ k1, p0 & MASK
    bits = torch.stack([c0, c1, c2, c3], dim=1).reshape(-1)[:vocab_size]
    u = (bits.to(torch.float64) + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-u))


def process(logits: Tensor, row: ChoiceRow) -> Tensor:
    """Repetition penalty, temperature, top-k, top-p, in Hugging Face's order. logits: [vocab] -> [vocab] float64."""
    sampling = row.sampling
    z = logits.to(torch.float64)
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({t for t in row.tokens if t < len(z)}), dtype=torch.int64, device=z.device)
        penalty = sampling.repetition_penalty
        z = z.index_copy(0, seen, torch.where(z[seen] < 0, z[seen] * penalty, z[seen] / penalty))
    if sampling.greedy:
        return z
    z = z / sampling.temperature
    if 0 < sampling.top_k < len(z):
        kth = torch.topk(z, sampling.top_k).values[-1]
        z = z.masked_fill(z < kth, -torch.inf)
    if sampling.top_p < 1.0:
        ordered, order = torch.sort(z, descending=True, stable=True)
        p = torch.softmax(ordered, dim=0)
        dropped = order[(torch.cumsum(p, dim=0) - p) >= sampling.top_p]
        z = z.index_fill(0, dropped, -torch.inf)
    return z


def choose(logits: Tensor, rows: Sequence[ChoiceRow]) -> list[int]:
    """The next token of every row. logits: [rows, vocab], on any device -> one id a row.

    Greedy rows cost one argmax over all of them; a sampled row costs its own noise.
    """
    choices = logits.argmax(dim=1)
    for i, row in enumerate(rows):
        if row.sampling.greedy and row.sampling.repetition_penalty == 1.0:
            continue
        z = process(logits[i], row)
        if not row.sampling.greedy:
            z = z + gumbel(row.sampling.seed, len(row.tokens), len(z), z.device)
        choices[i] = z.argmax()
    ids: list[int] = choices.tolist()
    return ids
