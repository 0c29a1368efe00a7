"""Coupled choice: the definition in plain Python, against the reference and the kernels of device and cloud."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt
import pytest
import scipy.stats
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from plain_choice import (
    KNOWN_ANSWERS,
    MARGIN,
    MAX_SEED,
    Logits,
    contexts,
    logit_rows,
    plain_choice,
    plain_gumbel,
    plain_philox,
    plain_scores,
    seeds,
    settings_,
)

from edgecloud.kernels import choice_numpy, choice_torch
from edgecloud.kernels.choice import choose, gumbel, philox4x32, process
from edgecloud.kernels.choice_torch import ChoiceRow
from edgecloud.sampling import SamplingSettings


def torch_choice(logits: Logits, tokens: Sequence[int], sampling: SamplingSettings) -> int:
    """One row through the torch kernel."""
    [token] = choice_torch.choose(torch.from_numpy(logits)[None], [ChoiceRow(tokens=tokens, sampling=sampling)])
    return token


def choices(logits: Logits, tokens: Sequence[int], sampling: SamplingSettings) -> set[int]:
    """What the reference, the device and the cloud choose: one element, if they agree."""
    on_device = choice_numpy.choose(logits, tokens, sampling)
    return {choose(logits, tokens, sampling), on_device, torch_choice(logits, tokens, sampling)}


def random_logits(vocab_size: int, seed: int = 0) -> Logits:
    return (np.random.default_rng(seed).normal(size=vocab_size) * 3).astype(np.float32)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS, ids=["zeros", "ones", "pi"])
def test_philox_known_answers_of_random123(counter: list[int], key: list[int], expected: list[int]) -> None:
    assert plain_philox(counter, key) == expected
    assert philox4x32(np.array([counter], np.uint32), key[0] | key[1] << 32).tolist() == [expected]


@given(seeds, st.integers(0, 2**32 - 1), st.integers(1, 70))
def test_gumbel_is_the_definition(seed: int, position: int, vocab_size: int) -> None:
    expected = [plain_gumbel(seed, position, v) for v in range(vocab_size)]
    np.testing.assert_allclose(gumbel(seed, position, vocab_size), expected, rtol=1e-13, atol=1e-13)


def assert_noise(seed: int, position: int, v: int, w: int) -> None:
    """Pins G(v) - G(w) between two pairs of logits, one of which v must win and one w."""
    difference = plain_gumbel(seed, position, v) - plain_gumbel(seed, position, w)
    logits = np.full((2, max(v, w) + 1), -np.inf)
    logits[:, v] = 0.0
    logits[:, w] = [difference - MARGIN, difference + MARGIN]
    tokens, sampling = [0] * position, SamplingSettings(temperature=1.0, seed=seed)
    row = ChoiceRow(tokens=tokens, sampling=sampling)
    assert choice_torch.choose(torch.from_numpy(logits), [row, row]) == [v, w]
    assert [choice_numpy.choose(pair, tokens, sampling) for pair in logits] == [v, w]
    filtered = replace(sampling, top_k=2)  # draws the noise of two tokens alone
    assert choice_torch.choose(torch.from_numpy(logits), [replace(row, sampling=filtered)] * 2) == [v, w]
    assert [choice_numpy.choose(pair, tokens, filtered) for pair in logits] == [v, w]


@given(seeds, st.integers(0, 300), st.integers(0, 300), st.integers(0, 300))
def test_device_and_cloud_draw_the_noise_of_the_definition(seed: int, position: int, v: int, w: int) -> None:
    assume(v != w)
    assert_noise(seed, position, v, w)


# The noise at its ends. These entries were found by search: their 32 bits are all ones, and all zeros.
HIGHEST, LOWEST = -math.log(-math.log1p(-(2.0**-33))), -math.log(-math.log1p(-(1 - 2.0**-33)))


@pytest.mark.parametrize(("position", "v", "expected"), [(134390, 5349, HIGHEST), (1056, 7024, LOWEST), (115434, 510, LOWEST)])
def test_the_ends_of_the_noise_are_finite_and_exact(position: int, v: int, expected: float) -> None:
    assert gumbel(7, position, v + 1)[v] == pytest.approx(expected, abs=1e-12)
    assert_noise(7, position, v, v - 1)


def test_gumbel_of_a_padded_vocabulary_starts_alike() -> None:
    """A draft with padded columns must draw the noise that the target draws."""
    np.testing.assert_array_equal(gumbel(7, 11, 1001)[:999], gumbel(7, 11, 999))


@given(logit_rows, contexts, settings_)
def test_every_kernel_chooses_as_defined(logits: Logits, tokens: list[int], sampling: SamplingSettings) -> None:
    expected = plain_choice(logits.tolist(), tokens, sampling)
    assert choices(logits, tokens, sampling) == {expected}


@given(logit_rows, contexts, settings_)
def test_process_keeps_the_tokens_that_the_definition_keeps(logits: Logits, tokens: list[int], sampling: SamplingSettings) -> None:
    scores, border = plain_scores(logits.tolist(), tokens, sampling)
    assume(border > MARGIN)
    before = logits.copy()
    z = process(logits, tokens, sampling)
    assert [math.isinf(x) for x in z] == [math.isinf(x) for x in scores]
    np.testing.assert_array_equal(logits, before)  # the caller's row is left alone


@given(st.lists(st.tuples(contexts, settings_), min_size=1, max_size=8), st.integers(2, 67), st.integers(0, 2**32 - 1))
def test_rows_of_one_call_do_not_know_each_other(
    cases: list[tuple[list[int], SamplingSettings]], vocab_size: int, data_seed: int
) -> None:
    logits = np.random.default_rng(data_seed).normal(size=(len(cases), vocab_size)).astype(np.float32) * 4
    rows = [ChoiceRow(tokens=tokens, sampling=sampling) for tokens, sampling in cases]
    together = choice_torch.choose(torch.from_numpy(logits), rows)
    assert together == [torch_choice(logits[i], row.tokens, row.sampling) for i, row in enumerate(rows)]
    assert together == choice_torch.choose(torch.from_numpy(logits), rows)


@pytest.mark.parametrize("vocab_size", [49_152, 49_155])
@pytest.mark.parametrize(
    "sampling",
    [
        SamplingSettings(),
        SamplingSettings(repetition_penalty=1.3),
        SamplingSettings(temperature=1.0, seed=7),
        SamplingSettings(temperature=0.8, top_p=0.95, seed=123456789012345),
        SamplingSettings(temperature=1.2, top_k=50, top_p=0.9, repetition_penalty=1.1, seed=MAX_SEED),
    ],
    ids=lambda s: f"T{s.temperature}-k{s.top_k}-p{s.top_p}-r{s.repetition_penalty}",
)
def test_the_kernels_agree_on_a_real_vocabulary(vocab_size: int, sampling: SamplingSettings) -> None:
    logits = np.stack([random_logits(vocab_size, i) for i in range(6)])
    contexts = [list(range(0, 50 * (i + 1), 3)) for i in range(6)]
    rows = [ChoiceRow(tokens=tokens, sampling=sampling) for tokens in contexts]
    expected = [choose(row, tokens, sampling) for row, tokens in zip(logits, contexts, strict=True)]
    assert choice_torch.choose(torch.from_numpy(logits), rows) == expected
    assert [choice_numpy.choose(row, tokens, sampling) for row, tokens in zip(logits, contexts, strict=True)] == expected


@given(
    vocab_size=st.sampled_from([511, 512, 513, 600, 1500]),
    scale=st.sampled_from([0.0, 0.05, 1.0, 4.0]),
    distinct=st.sampled_from([2, 5, 40, 10**6]),
    data_seed=st.integers(0, 2**32 - 1),
    tokens=contexts,
    sampling=settings_,
)
@settings(max_examples=60)
def test_a_nucleus_of_any_size_is_kept_whole(
    vocab_size: int, scale: float, distinct: int, data_seed: int, tokens: list[int], sampling: SamplingSettings
) -> None:
    """The kernels look among the largest few hundred logits first: flat distributions and long ties do not fit there."""
    logits = np.random.default_rng(data_seed).normal(size=vocab_size) * scale
    logits = (np.round(logits * distinct) / distinct).astype(np.float32)
    assert choices(logits, tokens, sampling) == {plain_choice(logits.tolist(), tokens, sampling)}


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.9), (2500, 0.8), (0, 0.9999)])
def test_a_wide_nucleus_is_not_cut_short(top_k: int, top_p: float) -> None:
    logits = random_logits(3000) / 10
    beyond = set(np.argsort(-logits)[1000:])
    sampling = SamplingSettings(temperature=1.0, top_k=top_k, top_p=top_p)
    drawn = [choices(logits, [0] * n, sampling) for n in range(40)]
    assert all(len(agreed) == 1 for agreed in drawn)
    assert set.union(*drawn) & beyond


def test_a_nucleus_that_is_mostly_a_long_tail_is_kept_whole() -> None:
    """One token of probability 0.6, and 30,000 that share the rest: none of those is likely, most are in the set."""
    logits = np.concatenate([[np.log(0.6 / 0.4 * 30_000)], random_logits(30_000) / 1000]).astype(np.float32)
    sampling = SamplingSettings(temperature=1.0, top_p=0.9)
    drawn = [choices(logits, [0] * n, sampling) for n in range(30)]
    assert all(len(agreed) == 1 for agreed in drawn)
    assert len(set.union(*drawn)) > 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_torch_chooses_the_same_from_any_dtype_that_holds_the_logits(dtype: torch.dtype) -> None:
    logits = torch.from_numpy(random_logits(500)).to(dtype)
    for sampling in (SamplingSettings(), SamplingSettings(temperature=0.9, top_k=40, top_p=0.9, seed=3)):
        [token] = choice_torch.choose(logits[None], [ChoiceRow(tokens=[1, 2], sampling=sampling)])
        assert token == choose(logits.double().numpy(), [1, 2], sampling)


# What sampling means.

DISTRIBUTIONS = [
    SamplingSettings(temperature=1.0, seed=7),
    SamplingSettings(temperature=0.6, seed=2**40 + 1),
    SamplingSettings(temperature=2.5, seed=1),
    SamplingSettings(temperature=1.0, top_k=5, seed=3),
    SamplingSettings(temperature=1.0, top_p=0.8, seed=4),
    SamplingSettings(temperature=1.3, top_k=8, top_p=0.9, repetition_penalty=1.4, seed=MAX_SEED),
]


def softmax_of(logits: Logits, sampling: SamplingSettings) -> npt.NDArray[np.float64]:
    z = process(logits, [0], sampling)  # every context below holds token 0 and no other
    p = np.exp(z - z.max())
    normal: npt.NDArray[np.float64] = p / p.sum()
    return normal


def assert_follows(counts: npt.NDArray[np.int64], p: npt.NDArray[np.float64]) -> None:
    """Chi-square at 0.1 %; seeds are fixed, so the outcome is too."""
    assert not counts[p == 0].any()
    kept = p > 0
    assert scipy.stats.chisquare(counts[kept], counts.sum() * p[kept]).pvalue > 1e-3


@pytest.mark.parametrize("sampling", DISTRIBUTIONS, ids=lambda s: f"T{s.temperature}-k{s.top_k}-p{s.top_p}")
def test_choices_over_positions_follow_the_softmax(sampling: SamplingSettings) -> None:
    logits = np.random.default_rng(0).normal(size=10).astype(np.float32)
    drawn = [choice_numpy.choose(logits, [0] * n, sampling) for n in range(1, 6001)]
    assert_follows(np.bincount(drawn, minlength=10), softmax_of(logits, sampling))


@pytest.mark.parametrize("sampling", DISTRIBUTIONS, ids=lambda s: f"T{s.temperature}-k{s.top_k}-p{s.top_p}")
def test_choices_over_seeds_follow_the_softmax(sampling: SamplingSettings) -> None:
    logits = np.random.default_rng(1).normal(size=10).astype(np.float32)
    rows = [ChoiceRow(tokens=[0], sampling=replace(sampling, seed=seed)) for seed in range(4000)]
    drawn = choice_torch.choose(torch.from_numpy(logits).expand(len(rows), -1), rows)
    assert_follows(np.bincount(drawn, minlength=10), softmax_of(logits, sampling))


def test_neighbouring_positions_are_independent() -> None:
    drawn = [choose(np.zeros(4, np.float32), [0] * n, SamplingSettings(temperature=1.0)) for n in range(8000)]
    pairs = np.bincount([4 * a + b for a, b in zip(drawn[::2], drawn[1::2], strict=True)], minlength=16)
    assert_follows(pairs, np.full(16, 1 / 16))


def test_equal_noise_couples_draft_and_target() -> None:
    """Pr[match] >= (1-TV)/(1+TV), which independent draws would miss."""
    target = np.random.default_rng(2).normal(size=50).astype(np.float32)
    draft = target + np.random.default_rng(3).normal(size=50).astype(np.float32) * 0.5
    sampling = SamplingSettings(temperature=1.0, seed=5)
    p, q = softmax_of(target, sampling), softmax_of(draft, sampling)
    total_variation = 0.5 * np.abs(p - q).sum()
    bound = (1 - total_variation) / (1 + total_variation)
    n = 4000
    matches = sum(choose(target, [0] * i, sampling) == choose(draft, [0] * i, sampling) for i in range(1, n + 1))
    assert matches / n > bound - 3 * math.sqrt(bound * (1 - bound) / n)
    assert matches / n > (p * q).sum() + 0.1


@given(logit_rows, contexts, seeds, st.floats(0.01, 100))
def test_greedy_ignores_the_seed_and_top_k_and_top_p(
    logits: Logits, tokens: list[int], seed: int, repetition_penalty: float
) -> None:
    plain = SamplingSettings(repetition_penalty=repetition_penalty)
    dressed = replace(plain, seed=seed, top_k=1, top_p=0.5)
    assert choices(logits, tokens, dressed) == choices(logits, tokens, plain)
    assert len(choices(logits, tokens, plain)) == 1


def test_greedy_takes_the_first_of_equals() -> None:
    logits = np.array([0, 3, 3, 3], np.float32)
    for sampling in (SamplingSettings(), SamplingSettings(repetition_penalty=1.5)):
        assert choices(logits, [0], sampling) == {1}


@pytest.mark.parametrize("bit", [0, 1, 31, 32, 63])
def test_every_part_of_the_seed_counts(bit: int) -> None:
    logits = np.zeros(1000, np.float32)
    texts = [[choose(logits, [0] * n, SamplingSettings(temperature=1.0, seed=s)) for n in range(8)] for s in (0, 1 << bit)]
    assert texts[0] != texts[1]


def test_the_noise_depends_on_the_position_not_on_the_tokens() -> None:
    logits, sampling = np.zeros(1000, np.float32), SamplingSettings(temperature=1.0)
    assert choose(logits, [1, 2, 3], sampling) == choose(logits, [4, 5, 6], sampling)
    assert choose(logits, [1, 2, 3], sampling) != choose(logits, [1, 2, 3, 4], sampling)


@given(st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=40, unique=True), st.floats(0.01, 100), seeds)
def test_keeping_one_token_is_greedy(values: list[float], temperature: float, seed: int) -> None:
    logits = np.array(values, np.float32)
    for top_k, top_p in ((1, 1.0), (0, 1e-9), (1, 1e-9)):
        sampling = SamplingSettings(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        assert choices(logits, [0], sampling) == {logits.argmax()}


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(1e-9, 1), (0.4999, 1), (0.5001, 2), (0.7999, 2), (0.8001, 3), (0.9499, 3), (0.9501, 4), (1.0, 4)],
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: int) -> None:
    order = [2, 0, 3, 1]  # from likely to unlikely
    logits = np.empty(4, np.float32)
    logits[order] = np.log([0.5, 0.3, 0.15, 0.05])
    sampling = SamplingSettings(temperature=1.0, top_p=top_p)
    assert set(np.flatnonzero(np.isfinite(process(logits, [], sampling)))) == set(order[:kept])
    assert set.union(*(choices(logits, [0] * n, sampling) for n in range(150))) == set(order[:kept])


def test_top_k_keeps_ties_of_the_last_kept() -> None:
    logits, sampling = np.array([2, 1, 1, 0], np.float32), SamplingSettings(temperature=1.0, top_k=2)
    assert np.isfinite(process(logits, [], sampling)).tolist() == [True, True, True, False]
    assert set.union(*(choices(logits, [0] * n, sampling) for n in range(60))) == {0, 1, 2}


@pytest.mark.parametrize("sampling", [SamplingSettings(), *DISTRIBUTIONS], ids=lambda s: f"T{s.temperature}-k{s.top_k}")
def test_a_masked_logit_is_never_chosen(sampling: SamplingSettings) -> None:
    logits = np.array([-np.inf, 1, -np.inf, 0, -np.inf], np.float32)
    for n in range(40):
        tokens = [0, 2] * n
        assert choices(logits, tokens, sampling) in ({1}, {3})


@pytest.mark.parametrize("temperature", [1e-6, 1e-3, 100.0])
def test_extreme_temperatures_stay_finite(temperature: float) -> None:
    logits = np.array([-1000, 0, 999, 1000], np.float32)
    sampling = SamplingSettings(temperature=temperature, top_k=3, top_p=0.99, seed=1)
    assert len(choices(logits, [0], sampling)) == 1
    assert not np.isnan(process(logits, [0], sampling)).any()


def test_the_penalty_skips_tokens_beyond_the_vocabulary() -> None:
    """The draft's vocabulary may be smaller than the target's."""
    logits, tokens = np.array([1, 2, 3], np.float32), [2, 3, 4, 100_000]
    sampling = SamplingSettings(repetition_penalty=2.0)
    assert process(logits, tokens, sampling).tolist() == [1.0, 2.0, 1.5]
    assert choices(logits, tokens, sampling) == {1}


def test_the_penalty_counts_a_repeated_token_once() -> None:
    sampling = SamplingSettings(repetition_penalty=2.0)
    assert process(np.array([4, -1], np.float32), [0, 0, 1, 1, 1], sampling).tolist() == [2.0, -2.0]


# The independent oracle, where this checkout has one beside it.


@pytest.fixture(scope="module")
def oracle() -> ModuleType:
    beside = Path(__file__).resolve().parents[2] / "shared" / "check"
    path = Path(os.environ.get("EDGECLOUD_CHECK", beside)) / "reference.py"
    if not path.is_file():
        pytest.skip(f"no oracle at {path}; set EDGECLOUD_CHECK to the folder of reference.py")
    spec = importlib.util.spec_from_file_location("edgecloud_oracle", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@given(logit_rows, contexts, settings_)
def test_the_oracle_chooses_the_same(oracle: ModuleType, logits: Logits, tokens: list[int], sampling: SamplingSettings) -> None:
    tokens = [t for t in tokens if t < len(logits)] or [0]  # the oracle takes no others
    assume(plain_scores(logits.tolist(), tokens, sampling)[1] > MARGIN)
    expected, margin = oracle.choose(
        logits,
        tokens,
        seed=sampling.seed,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        repetition_penalty=sampling.repetition_penalty,
    )
    assume(sampling.greedy or margin > MARGIN)
    assert choices(logits, tokens, sampling) == {expected}
