"""Coupled choice, the float64 reference in NumPy: what the next token is, written plainly.

    choice(tokens) = argmax_v( z_v + G(seed, position, v) )      z = processed logits / temperature

G is Gumbel noise from Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), so any
machine can compute any entry without state. Argmax of logits plus Gumbel noise samples exactly from softmax(z)
(Gumbel-max trick); a draft model that adds the same noise agrees with the target with probability >= (1-TV)/(1+TV)
(Daliri, Musco, Suresh 2024). `choice_numpy` (device), `choice_torch`
(cloud) and `choice_triton` (cloud on CUDA) compute the same faster: noise only where it can matter.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edgecloud.sampling import SamplingSettings

PHILOX_M = (0xD2511F53, 0xCD9E8D57)
PHILOX_W = (0x9E3779B9, 0xBB67AE85)
PHILOX_ROUNDS = 10

Floats = npt.NDArray[np.float64]


def round_keys(seed: int) -> list[tuple[int, int]]:
    """The key of each of the ten rounds; the seed's low and high 32 bits are the first."""
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    return [((k0 + i * PHILOX_W[0]) & 0xFFFFFFFF, (k1 + i * PHILOX_W[1]) & 0xFFFFFFFF) for i in range(PHILOX_ROUNDS)]


def philox4x32(counter: npt.NDArray[np.uint32], seed: int) -> npt.NDArray[np.uint32]:
    """Ten rounds of Philox4x32. counter: [n, 4] -> [n, 4]."""
    c0, c1, c2, c3 = (counter[:, i].astype(np.uint64) for i in range(4))
    m0, m1 = np.uint64(PHILOX_M[0]), np.uint64(PHILOX_M[1])
    mask, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    for k0, k1 in round_keys(seed):
        p0, p1 = m0 * c0, m1 * c2
        c0, c1, c2, c3 = (p1 >> shift) ^ c1 ^ np.uint64(k0), p1 & mask, (p0 >> shift) ^ c3 ^ np.uint64(k1), p0 & mask
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def gumbel(seed: int, position: int, vocab_size: int) -> Floats:
    """G(seed, position, v) for every v.  -> [vocab_size]

    Counter (v // 4, position, 0, 0), lane v % 4; u = (x + 0.5) / 2**32, G = -log(-log1p(-u)).
    """
    counter = np.zeros(((vocab_size + 3) // 4, 4), np.uint32)
    counter[:, 0] = np.arange(len(counter), dtype=np.uint32)
    counter[:, 1] = np.uint32(position)
    bits = philox4x32(counter, seed).reshape(-1)[:vocab_size]
    u = (bits.astype(np.float64) + 0.5) * 2.0**-32
    noise: Floats = -np.log(-np.log1p(-u))
    return noise


def process(logits: npt.NDArray[np.floating], tokens: Sequence[int], sampling: SamplingSettings) -> Floats:
    """Repetition penalty, temperature, top-k, top-p, in Hugging Face's order. logits: [vocab] -> [vocab] float64."""
    z = logits.astype(np.float64)
    if sampling.repetition_penalty != 1.0:
        seen = np.unique(np.asarray(tokens, np.int64))
        seen = seen[seen < len(z)]
        z[seen] = np.where(z[seen] < 0, z[seen] * sampling.repetition_penalty, z[seen] / sampling.repetition_penalty)
    if sampling.greedy:
        return z
    z /= sampling.temperature
    if 0 < sampling.top_k < len(z):
        z[z < np.partition(z, -sampling.top_k)[-sampling.top_k]] = -np.inf
    if sampling.top_p < 1.0:
        order = np.argsort(-z, kind="stable")
        p = np.exp(z[order] - z[order[0]])
        p /= p.sum()
        z[order[(np.cumsum(p) - p) >= sampling.top_p]] = -np.inf
    return z


def choose(logits: npt.NDArray[np.floating], tokens: Sequence[int], sampling: SamplingSettings) -> int:
    """The token that follows `tokens`, given the model's logits after the last of them. logits: [vocab]."""
    if sampling.greedy and sampling.repetition_penalty == 1.0:
        return int(logits.argmax())
    z = process(logits, tokens, sampling)
    if not sampling.greedy:
        z += gumbel(sampling.seed, len(tokens), len(z))
    return int(z.argmax())
