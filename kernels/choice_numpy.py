"""Coupled choice in NumPy, as the device runs it. See choice.py for the definition.

Filters keep few tokens, so the noise is drawn for those alone, and nothing of the size of the vocabulary is sorted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edgecloud.kernels.choice import gumbel, philox4x32
from edgecloud.sampling import SamplingSettings

NUCLEUS_GUESS = 512  # tokens that nearly always hold top_p; when they do not, all are sorted

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]


def gumbel_at(seed: int, position: int, ids: Ids) -> Floats:
    """G(seed, position, v) for each v of `ids`.  [n] -> [n]"""
    blocks, lanes = np.unique(ids // 4, return_inverse=True)
    counter = np.zeros((len(blocks), 4), np.uint32)
    counter[:, 0] = blocks
    counter[:, 1] = np.uint32(position)
    bits = philox4x32(counter, seed)[lanes, ids % 4]
    noise: Floats = -np.log(-np.log1p((bits.astype(np.float64) + 0.5) * -(2.0**-32)))
    return noise


def choose(logits: npt.NDArray[np.floating], tokens: Sequence[int], sampling: SamplingSettings) -> int:
    """The token that follows `tokens`, given the model's logits after the last of them. logits: [vocab]."""
    if sampling.repetition_penalty == 1.0:
        if sampling.greedy:
            return int(logits.argmax())
        z = logits.astype(np.float64)
    else:
        z = _penalize(logits.astype(np.float64), tokens, sampling.repetition_penalty)
        if sampling.greedy:
            return int(z.argmax())
    z /= sampling.temperature
    ids: Ids | None = None
    if 0 < sampling.top_k < len(z):
        ids = np.flatnonzero(z >= np.partition(z, -sampling.top_k)[-sampling.top_k])
    if sampling.top_p < 1.0:
        kept = _nucleus(z if ids is None else z[ids], sampling.top_p)
        ids = kept if ids is None else ids[kept]
    if ids is None:
        return int((z + gumbel(sampling.seed, len(tokens), len(z))).argmax())
    return int(ids[(z[ids] + gumbel_at(sampling.seed, len(tokens), ids)).argmax()])


def _penalize(z: Floats, tokens: Sequence[int], penalty: float) -> Floats:
    seen = np.unique(np.asarray(tokens, np.int64))
    seen = seen[seen < len(z)]
    z[seen] = np.where(z[seen] < 0, z[seen] * penalty, z[seen] / penalty)
    return z


def _nucleus(z: Floats, top_p: float) -> Ids:
    """Indices of the smallest set of the largest entries that reaches `top_p`; of equal entries the first are kept."""
    highest = z.max()
    total = np.exp(z - highest).sum()
    for size in (NUCLEUS_GUESS, len(z)):
        largest = z if size >= len(z) else np.partition(z, len(z) - size)[-size:]
        largest = np.sort(largest)[::-1]
        p = np.exp(largest - highest) / total
        num_kept = int(((np.cumsum(p) - p) < top_p).sum())
        if num_kept < len(largest) or len(largest) == len(z):
            break
    lowest = largest[num_kept - 1]
    kept = z > lowest
    ties = np.flatnonzero(z == lowest)[: num_kept - int(kept.sum())]
    kept[ties] = True
    return np.flatnonzero(kept)
