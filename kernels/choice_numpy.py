"""Coupled choice in NumPy, as the device runs it. See choice.py for the definition.

Nothing of the size of the vocabulary is sorted, and logarithms are taken only of noise that can decide: filters keep few
tokens, and without filters the bits tell beforehand which entries stay too small to win. A trimmed draft has logits of the
tokens that it keeps (entries.py): their choice is that over the whole vocabulary with -inf for all others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from edgecloud.kernels.choice import PHILOX_M, round_keys
from edgecloud.kernels.entries import LANES, Entries, all_entries
from edgecloud.sampling import SamplingSettings

NEAR = 3.0  # entries this close to the highest are scored first; the best of them sets the bar for the others
LIKELY_SHARE = 1e-4  # tokens of at least this probability nearly always reach top_p
SCORE_SLACK = 1e-6  # the bar is lowered by this, far more than the logarithms round

MULTIPLIERS = np.array(PHILOX_M, np.uint64)[:, None]
LOW_WORD, WORD_BITS = np.uint64(0xFFFFFFFF), np.uint64(32)

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]
Bits = npt.NDArray[np.uint64]


def choose(
    logits: npt.NDArray[np.floating], tokens: Sequence[int], sampling: SamplingSettings, entries: Entries | None = None
) -> int:
    """The token that follows `tokens`, given the logits after the last of them. logits: [vocab], or [kept] with `entries`."""
    entries = entries or all_entries(len(logits))
    if sampling.repetition_penalty != 1.0:
        logits = _penalize(logits.astype(np.float64), tokens, sampling.repetition_penalty, entries)
    if sampling.greedy:
        return entries.token(int(logits.argmax()))
    places: Ids | None = None
    if 0 < sampling.top_k < len(logits):
        places = np.flatnonzero(logits >= np.partition(logits, -sampling.top_k)[-sampling.top_k])
    if sampling.top_p < 1.0:
        kept = _nucleus(logits if places is None else logits[places], sampling.temperature, sampling.top_p)
        places = kept if places is None else places[kept]
    if places is None:
        return entries.token(_highest_noisy(logits, len(tokens), sampling, entries))
    if len(places) == 1:
        return entries.token(int(places[0]))
    ids = entries.tokens(places)
    z = _scaled(logits[places], sampling.temperature)
    return int(ids[(z + _gumbel_at(ids, len(tokens), sampling.seed)).argmax()])


def _penalize(z: Floats, tokens: Sequence[int], penalty: float, entries: Entries) -> Floats:
    seen = entries.places(np.unique(np.asarray(tokens, np.int64)), len(z))
    z[seen] = np.where(z[seen] < 0, z[seen] * penalty, z[seen] / penalty)
    return z


def _scaled(logits: npt.NDArray[np.floating], temperature: float) -> Floats:
    """The definition's z, for the few entries that need it to the last bit."""
    z: Floats = logits.astype(np.float64) / temperature
    return z


def _nucleus(logits: npt.NDArray[np.floating], temperature: float, top_p: float) -> Ids:
    """Indices of the smallest set of the largest entries that reaches `top_p`; of equal entries the first are kept."""
    weights = np.subtract(logits, logits.max(), dtype=np.float64)
    weights *= 1 / temperature
    np.exp(weights, out=weights)
    total = weights.sum()
    # The second bound always holds enough: together, the entries below it weigh less than half of what top_p leaves out.
    for smallest in (LIKELY_SHARE * total, 0.5 * (1 - top_p) * total / len(weights)):
        candidates = np.flatnonzero(weights >= smallest)
        if weights[candidates].sum() > (top_p + 1e-9) * total:
            break
    order = np.argsort(-logits[candidates], kind="stable")
    p = weights[candidates[order]] / total
    return np.sort(candidates[order[(np.cumsum(p) - p) < top_p]])


def _highest_noisy(logits: npt.NDArray[np.floating], position: int, sampling: SamplingSettings, entries: Entries) -> int:
    """Where z_v + G(seed, position, v) is highest, taking the logarithms only of noise high enough to win."""
    bits = _philox(entries.blocks, position, sampling.seed).reshape(-1)[entries.lanes]
    near_logit = float(logits.max()) - NEAR * sampling.temperature
    near = np.flatnonzero(logits >= near_logit)
    bar = (_scaled(logits[near], sampling.temperature) + _to_gumbel(bits[near])).max()
    # Another entry wins only with noise above g. Noise falls as its bits rise.
    g = bar - near_logit / sampling.temperature - SCORE_SLACK
    most = np.uint64(-math.expm1(-math.exp(min(-g, 30.0))) * 2.0**32 + 1)
    places = np.union1d(near, np.flatnonzero(bits <= most))
    return int(places[(_scaled(logits[places], sampling.temperature) + _to_gumbel(bits[places])).argmax()])


def _gumbel_at(ids: Ids, position: int, seed: int) -> Floats:
    """G(seed, position, v) for each v of `ids`.  [n] -> [n]"""
    blocks, where = np.unique(ids // LANES, return_inverse=True)
    return _to_gumbel(_philox(blocks.astype(np.uint64), position, seed)[where, ids % LANES])


def _to_gumbel(bits: Bits) -> Floats:
    noise: Floats = -np.log(-np.log1p((bits.astype(np.float64) + 0.5) * -(2.0**-32)))
    return noise


def _philox(blocks: Bits, position: int, seed: int) -> Bits:
    """Ten rounds of Philox4x32 on counters (block, position, 0, 0), both halves at once.  [n] -> [n, 4], below 2**32"""
    even, odd = np.zeros((2, 2, len(blocks)), np.uint64)  # words 0 and 2, words 1 and 3
    even[0], odd[0] = blocks, position
    for keys in _round_keys(seed):
        product = even * MULTIPLIERS
        odd ^= keys
        even = (product >> WORD_BITS)[::-1] ^ odd
        product &= LOW_WORD
        odd = product[::-1]
    return np.stack([even[0], odd[0], even[1], odd[1]], axis=1)


@lru_cache(maxsize=64)
def _round_keys(seed: int) -> Bits:
    """-> [rounds, 2, 1]"""
    return np.array(round_keys(seed), np.uint64)[:, :, None]
