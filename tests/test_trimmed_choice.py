"""A choice over the logits of a trimmed draft, against the definition over the whole vocabulary with -inf for all others."""

from __future__ import annotations

from collections.abc import Sequence
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from plain_choice import MARGIN, Logits, contexts, logit_rows, plain_scores, settings_

from edgecloud.kernels import choice_numpy
from edgecloud.kernels.choice import choose
from edgecloud.kernels.entries import kept_entries
from edgecloud.sampling import SamplingSettings

VOCAB = 300


def spread(logits: Logits, token_ids: Sequence[int], dtype: type[np.floating]) -> npt.NDArray[np.floating]:
    """The same logits over the whole vocabulary."""
    whole = np.full(VOCAB, -np.inf, dtype)
    whole[list(token_ids)] = logits
    return whole


@given(
    logits=logit_rows,
    ids=st.permutations(range(VOCAB)),
    dtype=st.sampled_from([np.float32, np.float64]),
    tokens=st.one_of(contexts, st.lists(st.integers(0, 10**6), max_size=8)),
    sampling=settings_,
)
@example(np.zeros(3, np.float32), [5, 9, 7, *range(5), 6, 8, *range(10, VOCAB)], np.float32, [9], SamplingSettings())
@settings(max_examples=200)
def test_it_is_the_choice_over_the_vocabulary_with_nothing_elsewhere(
    logits: Logits, ids: list[int], dtype: type[np.floating], tokens: list[int], sampling: SamplingSettings
) -> None:
    kept = sorted(ids[: len(logits)])
    row = logits.astype(dtype)
    place = {token: i for i, token in enumerate(kept)}  # for the definition in plain Python, which knows places only
    _, border = plain_scores(row.tolist(), [place[t] for t in tokens if t in place], sampling)
    assume(sampling.greedy or border > MARGIN)
    before = row.copy()
    assert choice_numpy.choose(row, tokens, sampling, kept_entries(kept)) == choose(spread(row, kept, dtype), tokens, sampling)
    np.testing.assert_array_equal(row, before)  # the caller's row is left alone


def test_the_first_of_equals_is_the_lowest_token() -> None:
    assert choice_numpy.choose(np.array([0, 3, 3], np.float32), [], SamplingSettings(), kept_entries([2, 40, 90])) == 40


@given(st.sets(st.integers(0, 10**6), min_size=1, max_size=60), st.integers(0, 2**32 - 1), st.integers(1, 200))
@settings(max_examples=40)
def test_it_always_keeps_to_the_list(ids: set[int], seed: int, length: int) -> None:
    kept = sorted(ids)
    logits = np.random.default_rng(seed).normal(size=len(kept)).astype(np.float32)
    for sampling in (SamplingSettings(temperature=2.0, seed=seed), SamplingSettings(temperature=1.0, top_p=0.9, top_k=20)):
        assert choice_numpy.choose(logits, [*kept, *range(length)], sampling, kept_entries(kept)) in ids


@pytest.mark.parametrize("vocab_size", [10**6, 10**9])
def test_the_noise_costs_what_is_kept_whatever_the_vocabulary(vocab_size: int) -> None:
    kept = kept_entries(range(0, vocab_size, vocab_size // 100))
    with patch.object(choice_numpy, "_philox", wraps=choice_numpy._philox) as drawn:
        choice_numpy.choose(np.zeros(len(kept.lanes), np.float32), [1, 2], SamplingSettings(temperature=1.0), kept)
    assert [len(call.args[0]) for call in drawn.call_args_list] == [len(kept.blocks)] == [100]


@pytest.mark.parametrize("token_ids", [[], [-1, 3], [3, 3], [4, 3]])
def test_a_list_that_does_not_ascend_is_refused(token_ids: list[int]) -> None:
    with pytest.raises(ValueError, match="ascend"):
        kept_entries(token_ids)


def test_a_list_of_everything_changes_nothing() -> None:
    logits = np.random.default_rng(5).normal(size=VOCAB).astype(np.float32)
    for sampling in (SamplingSettings(), SamplingSettings(temperature=1.0, seed=3), SamplingSettings(temperature=0.7, top_p=0.8)):
        for length in range(20):
            same = choice_numpy.choose(logits, [7] * length, sampling, kept_entries(range(VOCAB)))
            assert same == choice_numpy.choose(logits, [7] * length, sampling)
