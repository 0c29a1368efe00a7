"""Coupled choice in torch, many rows at once, each with its own settings. See choice.py for the definition.

Runs on any device; integer work in int64 (products wrap as in uint64, so the low words are exact), the rest in float64. Filters
keep few tokens, so the noise is drawn for those alone, and nothing of the size of the vocabulary is sorted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgecloud.kernels.choice import PHILOX_M, round_keys
from edgecloud.sampling import SamplingSettings

MASK = 0xFFFFFFFF
NUCLEUS_GUESS = 512  # tokens that nearly always hold top_p; when they do not, all are sorted


@dataclass(frozen=True, slots=True)
class ChoiceRow:
    """Row i of the logits: the tokens it follows and how to choose."""

    tokens: Sequence[int]  # all tokens before the one to choose; none where they are not known: then there is no penalty for them
    sampling: SamplingSettings
    num_unknown: int = 0  # tokens before it that are not known

    @property
    def position(self) -> int:
        """Of the token to choose."""
        return len(self.tokens) + self.num_unknown


def gumbel(seed: int, position: int, vocab_size: int, device: torch.device) -> Tensor:
    """G(seed, position, v) for every v.  -> [vocab_size] float64"""
    blocks = torch.arange((vocab_size + 3) // 4, dtype=torch.int64, device=device)
    return _to_gumbel(torch.stack(_philox(blocks, position, seed), dim=1).reshape(-1)[:vocab_size])


def gumbel_at(seed: int, position: int, ids: Tensor) -> Tensor:
    """G(seed, position, v) for each v of `ids`.  [n] int64 -> [n] float64"""
    lanes = torch.stack(_philox(ids // 4, position, seed), dim=1)
    return _to_gumbel(lanes.gather(1, (ids % 4)[:, None])[:, 0])


def choose(logits: Tensor, rows: Sequence[ChoiceRow]) -> list[int]:
    """The next token of every row. logits: [rows, vocab], on any device -> one id a row.

    Greedy rows cost one maximum over all of them; a sampled row costs its own noise.
    """
    choices = logits.max(dim=1).indices  # the first of the largest, as argmax, which is four times slower over bfloat16 on a CPU
    for i, row in enumerate(rows):
        if not row.sampling.greedy:
            choices[i] = _sample(logits[i], row)
        elif row.sampling.repetition_penalty != 1.0:
            choices[i] = penalized(logits[i], row).argmax()
    ids: list[int] = choices.tolist()
    return ids


def penalized(logits: Tensor, row: ChoiceRow) -> Tensor:
    """Logits of a row in float64, after the repetition penalty.  [vocab] -> [vocab]"""
    z = logits.to(torch.float64)
    penalty = row.sampling.repetition_penalty
    if penalty != 1.0:
        seen = torch.tensor(sorted({t for t in row.tokens if t < len(z)}), dtype=torch.int64, device=z.device)
        z = z.index_copy(0, seen, torch.where(z[seen] < 0, z[seen] * penalty, z[seen] / penalty))
    return z


def nucleus_border(logits: Tensor, temperature: float, top_p: float) -> tuple[Tensor, int]:
    """The lowest of the smallest set of the largest logits (float64) that reaches `top_p`, and how many of its equals belong."""
    log_total = torch.logsumexp(logits / temperature, dim=0)
    for size in (min(NUCLEUS_GUESS, len(logits)), len(logits)):
        largest = torch.topk(logits, size).values
        p = torch.exp(largest / temperature - log_total)
        num_kept = int(((torch.cumsum(p, dim=0) - p) < top_p).sum())
        if num_kept < size:
            break
    lowest = largest[num_kept - 1]
    return lowest, num_kept - int((logits > lowest).sum())


def _sample(logits: Tensor, row: ChoiceRow) -> Tensor:
    sampling = row.sampling
    logits = penalized(logits, row)
    position = row.position
    ids = None
    if 0 < sampling.top_k < len(logits):
        ids = (logits >= torch.topk(logits, sampling.top_k).values[-1]).nonzero()[:, 0]
    if sampling.top_p < 1.0:
        kept = _nucleus(logits if ids is None else logits[ids], sampling.temperature, sampling.top_p)
        ids = kept if ids is None else ids[kept]
    if ids is None:
        return (logits / sampling.temperature + gumbel(sampling.seed, position, len(logits), logits.device)).argmax()
    return ids[(logits[ids] / sampling.temperature + gumbel_at(sampling.seed, position, ids)).argmax()]


def _nucleus(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """Indices of the smallest set of the largest entries that reaches `top_p`; of equal entries the first are kept."""
    lowest, num_equal = nucleus_border(logits, temperature, top_p)
    kept = logits > lowest
    kept[(logits == lowest).nonzero()[:num_equal, 0]] = True
    return kept.nonzero()[:, 0]


def _philox(blocks: Tensor, position: int, seed: int) -> list[Tensor]:
    """Ten rounds of Philox4x32 on counters (block, position, 0, 0).  [n] -> four lanes [n], each below 2**32"""
    c0, c1 = blocks, torch.full_like(blocks, position)
    c2 = c3 = torch.zeros_like(blocks)
    for k0, k1 in round_keys(seed):
        p0, p1 = c0 * PHILOX_M[0], c2 * PHILOX_M[1]
        c0, c1, c2, c3 = ((p1 >> 32) & MASK) ^ c1 ^ k0, p1 & MASK, ((p0 >> 32) & MASK) ^ c3 ^ k1, p0 & MASK
    return [c0, c1, c2, c3]


def _to_gumbel(bits: Tensor) -> Tensor:
    return -torch.log(-torch.log1p((bits.to(torch.float64) + 0.5) * -(2.0**-32)))
