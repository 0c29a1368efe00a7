"""Coupled choice written again in plain Python, scalar by scalar, and examples to hold the kernels against it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from hypothesis import assume
from hypothesis import strategies as st

from edgecloud.sampling import SamplingSettings

Logits = npt.NDArray[np.float32]

MARGIN = 1e-9  # kernels may differ by an ulp of log or exp; a choice that hangs on less is no example
MAX_SEED = 2**64 - 1

# Of Philox4x32-10, from Random123: counter, key, answer.
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],  # the digits of pi
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def plain_philox(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Philox4x32-10 on Python's integers."""
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k0, p1 % 2**32, (p0 >> 32) ^ c[3] ^ k1, p0 % 2**32]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c


def plain_gumbel(seed: int, position: int, v: int) -> float:
    """One entry of the noise."""
    bits = plain_philox((v // 4, position, 0, 0), (seed % 2**32, seed // 2**32))[v % 4]
    return -math.log(-math.log1p(-(bits + 0.5) / 2**32))


def plain_scores(logits: Sequence[float], tokens: Sequence[int], sampling: SamplingSettings) -> tuple[list[float], float]:
    """Processed logits plus noise, and how far the top-p border was from cutting elsewhere."""
    z, border = [float(x) for x in logits], math.inf
    for v in set(tokens):
        if v < len(z):
            z[v] = z[v] * sampling.repetition_penalty if z[v] < 0 else z[v] / sampling.repetition_penalty
    if sampling.temperature == 0:
        return z, border
    z = [x / sampling.temperature for x in z]
    if 0 < sampling.top_k < len(z):
        smallest_kept = sorted(z, reverse=True)[sampling.top_k - 1]
        z = [x if x >= smallest_kept else -math.inf for x in z]
    if sampling.top_p < 1.0:
        weights = [math.exp(x - max(z)) for x in z]
        before = 0.0
        for v in sorted(range(len(z)), key=lambda v: (-z[v], v)):
            border = min(border, abs(before - sampling.top_p))
            if before >= sampling.top_p:
                z[v] = -math.inf
            before += weights[v] / math.fsum(weights)
    return [x + plain_gumbel(sampling.seed, len(tokens), v) for v, x in enumerate(z)], border


def plain_choice(logits: Sequence[float], tokens: Sequence[int], sampling: SamplingSettings) -> int:
    """The token. Rejects an example that hangs on a rounding error; greedy ties are exact and go to the first."""
    scores, border = plain_scores(logits, tokens, sampling)
    best, second = sorted(scores, reverse=True)[:2]
    assume(border > MARGIN)
    assume(sampling.temperature == 0 or best - second > MARGIN)
    return scores.index(best)


# A small alphabet of values makes ties; continuous values make the rest.
logit_values = st.one_of(st.sampled_from([-2.0, -0.5, 0.0, 0.5, 1.0, 2.0]), st.floats(-30, 30, width=32))
logit_rows = st.lists(logit_values, min_size=2, max_size=67).map(lambda row: np.array(row, np.float32))
seeds = st.one_of(st.integers(0, MAX_SEED), st.sampled_from([0, 1, 2**32 - 1, 2**32, 2**63, MAX_SEED]))
settings_ = st.builds(
    SamplingSettings,
    temperature=st.one_of(st.just(0.0), st.just(1.0), st.floats(0.01, 100)),
    top_k=st.one_of(st.just(0), st.integers(0, 80)),
    top_p=st.one_of(st.just(1.0), st.floats(0.001, 1.0)),
    repetition_penalty=st.one_of(st.just(1.0), st.floats(0.01, 100)),
    seed=seeds,
)
contexts = st.lists(st.integers(0, 80), max_size=40)
