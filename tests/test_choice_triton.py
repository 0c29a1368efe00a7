"""Coupled choice in Triton against the definition: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from plain_choice import KNOWN_ANSWERS, MARGIN, MAX_SEED, Logits, contexts, plain_choice, plain_gumbel, seeds, settings_

from edgecloud.kernels import choice
from edgecloud.kernels.choice_torch import ChoiceRow
from edgecloud.sampling import SamplingSettings

pytest.importorskip("triton", reason="triton has wheels for Linux only; there, `pip install edgecloud[cuda]` lets this run")
import triton
import triton.language as tl

from edgecloud.kernels import choice_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PHASES = [Phase.explicit, Phase.reuse, Phase.generate]  # shrinking would take minutes in the interpreter


def choose(logits: npt.NDArray[np.floating], rows: Sequence[ChoiceRow]) -> list[int]:
    return choice_triton.choose(torch.from_numpy(logits).to(DEVICE), rows)


@triton.jit
def _philox(counter: tl.tensor, seed: tl.tensor, answer: tl.tensor) -> None:
    c0, c1, c2, c3 = tl.load(counter), tl.load(counter + 1), tl.load(counter + 2), tl.load(counter + 3)
    lanes = tl.philox(tl.load(seed), c0, c1, c2, c3)
    for i in tl.static_range(4):
        tl.store(answer + i, lanes[i].to(tl.int64))


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS, ids=["zeros", "ones", "pi"])
def test_philox_known_answers_of_random123(counter: list[int], key: list[int], expected: list[int]) -> None:
    words = torch.from_numpy(np.array(counter, np.uint32).view(np.int32)).to(DEVICE)
    seed = torch.from_numpy(np.array([key[0] | key[1] << 32], np.uint64).view(np.int64)).to(DEVICE)
    answer = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    _philox[(1,)](words, seed, answer)
    assert answer.tolist() == expected


@given(seeds, st.integers(0, 300), st.integers(0, 2100), st.integers(0, 2100))
@settings(max_examples=20, phases=PHASES)
def test_the_noise_is_that_of_the_definition(seed: int, position: int, v: int, w: int) -> None:
    """Pins G(v) - G(w) between two pairs of logits, one of which v must win and one w."""
    assume(v != w)
    assert_noise(seed, position, v, w)


@pytest.mark.parametrize(("position", "v"), [(134390, 5349), (1056, 7024)], ids=["highest", "lowest"])
def test_the_ends_of_the_noise_are_finite_and_exact(position: int, v: int) -> None:
    assert_noise(7, position, v, v - 1)


def assert_noise(seed: int, position: int, v: int, w: int) -> None:
    difference = plain_gumbel(seed, position, v) - plain_gumbel(seed, position, w)
    logits = np.full((2, max(v, w) + 1), -np.inf)
    logits[:, v] = 0.0
    logits[:, w] = [difference - MARGIN, difference + MARGIN]
    row = ChoiceRow(tokens=[0] * position, sampling=SamplingSettings(temperature=1.0, seed=seed))
    assert choose(logits, [row, row]) == [v, w]


# Few values make ties, many make the rest; the sizes lie about the borders of chunks.
@given(
    rows=st.lists(st.tuples(contexts, settings_), min_size=1, max_size=5),
    vocab_size=st.sampled_from([2, 3, 67, 513, 1023, 1024, 1025, 2500]),
    scale=st.sampled_from([0.0, 0.05, 1.0, 4.0]),
    distinct=st.sampled_from([2, 5, 40, 10**6]),
    data_seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=50, phases=PHASES)
def test_every_row_gets_the_token_of_the_definition(
    rows: list[tuple[list[int], SamplingSettings]], vocab_size: int, scale: float, distinct: int, data_seed: int
) -> None:
    logits = np.random.default_rng(data_seed).normal(size=(len(rows), vocab_size)) * scale
    logits = (np.round(logits * distinct) / distinct).astype(np.float32)
    expected = [plain_choice(row.tolist(), tokens, sampling) for row, (tokens, sampling) in zip(logits, rows, strict=True)]
    assert choose(logits, [ChoiceRow(tokens, sampling) for tokens, sampling in rows]) == expected


def test_it_agrees_with_the_reference_on_a_real_vocabulary() -> None:
    rng = np.random.default_rng(0)
    logits: Logits = (rng.normal(size=(5, 49_155)) * 3).astype(np.float32)
    rows = [
        ChoiceRow([], SamplingSettings()),
        ChoiceRow(list(range(50)), SamplingSettings(repetition_penalty=1.3)),
        ChoiceRow([3], SamplingSettings(temperature=1.0, seed=7)),
        ChoiceRow([3, 4], SamplingSettings(temperature=0.8, top_p=0.95, seed=123456789012345)),
        ChoiceRow([5], SamplingSettings(temperature=1.2, top_k=50, top_p=0.9, repetition_penalty=1.1, seed=MAX_SEED)),
    ]
    assert choose(logits, rows) == [choice.choose(row, r.tokens, r.sampling) for row, r in zip(logits, rows, strict=True)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_it_chooses_the_same_from_any_dtype_that_holds_the_logits(dtype: torch.dtype) -> None:
    logits = torch.from_numpy(np.random.default_rng(1).normal(size=(2, 500)) * 3).to(dtype)
    rows = [ChoiceRow([1, 2], s) for s in (SamplingSettings(), SamplingSettings(temperature=0.9, top_k=40, top_p=0.9, seed=3))]
    expected = [choice.choose(row.double().numpy(), r.tokens, r.sampling) for row, r in zip(logits, rows, strict=True)]
    assert choice_triton.choose(logits.to(DEVICE), rows) == expected


def test_of_equals_the_first_is_taken_across_chunks() -> None:
    logits = np.zeros((3, 3000), np.float32)
    logits[0, [1500, 2500]] = 1.0
    logits[1, [1023, 1024]] = 1.0
    assert choose(logits, [ChoiceRow([], SamplingSettings())] * 3) == [1500, 1023, 0]


@pytest.mark.parametrize("sampling", [SamplingSettings(top_k=2, temperature=1.0), SamplingSettings(top_p=0.3, temperature=1.0)])
def test_ties_at_the_border_of_a_filter_are_kept_as_by_the_reference(sampling: SamplingSettings) -> None:
    """Top-k keeps all of them; top-p keeps the first: here of a thousand equals about three hundred."""
    logits = np.zeros((60, 1000), np.float32)
    rows = [ChoiceRow([0] * n, sampling) for n in range(60)]
    got = choose(logits, rows)
    assert got == [choice.choose(row, r.tokens, r.sampling) for row, r in zip(logits, rows, strict=True)]
    assert (max(got) > 500) == (sampling.top_k == 2)


@pytest.mark.parametrize("temperature", [0.0, 1e-6, 1.0, 100.0])
def test_a_masked_logit_is_never_chosen(temperature: float) -> None:
    logits = np.full((1, 1030), -np.inf, np.float32)
    logits[0, 1027] = -1000.0
    assert choose(logits, [ChoiceRow([], SamplingSettings(temperature=temperature))]) == [1027]


def test_a_broken_row_still_gets_a_token_of_the_vocabulary() -> None:
    logits = np.full((3, 1030), np.nan, np.float32)
    logits[1] = -np.inf
    logits[2, :7] = 0.0
    expected = [int(row.argmax()) for row in logits]
    assert choose(logits, [ChoiceRow([], SamplingSettings())] * 3) == expected
    sampled = choose(logits, [ChoiceRow([], SamplingSettings(temperature=1.0))] * 3)
    assert all(0 <= token < 1030 for token in sampled)


def test_it_takes_rows_of_a_larger_tensor_as_they_lie() -> None:
    wide = torch.from_numpy(np.random.default_rng(2).normal(size=(2, 40, 3))).to(DEVICE)
    rows = [ChoiceRow([], SamplingSettings())] * 2
    assert choice_triton.choose(wide[:, :, 1], rows) == choice_triton.choose(wide[:, :, 1].contiguous(), rows)
