"""Paged attention in Triton against the float64 reference: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from packed import TOLERANCE, Case, Floats32, cases, runs_of

from edgecloud.kernels.attention import Segment

pytest.importorskip("triton", reason="triton has wheels for Linux only; there, `pip install edgecloud[cuda]` lets this run")
from edgecloud.kernels import attention_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PHASES = [Phase.explicit, Phase.reuse, Phase.generate]  # shrinking would take minutes in the interpreter


def attend(case: Case, dtype: torch.dtype = torch.float32, **options: Any) -> Floats32:
    tensors = [torch.from_numpy(a).to(DEVICE, dtype) for a in (case.query, case.keys, case.values)]
    got: Floats32 = attention_triton.ragged_paged_attention(*tensors, case.segments, case.scaling, **options).float().cpu().numpy()
    return got


windows = st.one_of(st.none(), st.integers(1, 90))
softcaps = st.one_of(st.none(), st.sampled_from([0.5, 5.0, 50.0]))


@given(cases(max_length=80), windows, softcaps)
@settings(max_examples=25, phases=PHASES)
def test_triton_equals_the_reference(case: Case, sliding_window: int | None, softcap: float | None) -> None:
    options = {"sliding_window": sliding_window, "softcap": softcap}
    np.testing.assert_allclose(attend(case, **options), case.expected(**options), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 64])
@pytest.mark.parametrize("sliding_window", [None, 1, 32])
def test_borders_of_blocks(length: int, sliding_window: int | None) -> None:
    case = sequence(length, group=3, seed=length)
    options = {"sliding_window": sliding_window}
    np.testing.assert_allclose(attend(case, **options), case.expected(**options), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("group", [1, 5, 16, 20])
def test_a_group_may_be_narrower_or_wider_than_a_tile(group: int) -> None:
    case = sequence(9, group, seed=group)
    np.testing.assert_allclose(attend(case), case.expected(), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_entries_of_16_bits_are_scored_and_summed_in_float32(dtype: torch.dtype, tolerance: float) -> None:
    case = sequence(100, group=2, seed=1)
    rounded = [torch.from_numpy(a).to(dtype).float().numpy() for a in (case.query, case.keys, case.values)]
    case = Case(rounded[0], rounded[1], rounded[2], case.segments, case.scaling)
    np.testing.assert_allclose(attend(case, dtype), case.expected(), rtol=tolerance, atol=tolerance / 8)


def test_a_context_of_ten_thousand_tokens() -> None:
    rng = np.random.default_rng(4)
    query, keys, values = (rng.standard_normal(shape, np.float32) for shape in ((2, 4, 16), (1, 10_240, 16), (1, 10_240, 16)))
    runs = ((5_000, 10_000), (16, 5_016))
    case = Case(query, keys, values, [Segment(0, 2, 10_000, runs)], 0.5)
    np.testing.assert_allclose(attend(case), case.expected(), rtol=TOLERANCE, atol=TOLERANCE)


# The same bits


def sequence(length: int, group: int, seed: int) -> Case:
    """All rows of one sequence that lies in one run."""
    rng = np.random.default_rng(seed)
    shapes = ((length, 2 * group, 8), (2, length, 8), (2, length, 8))
    query, keys, values = (rng.standard_normal(shape, np.float32) for shape in shapes)
    return Case(query, keys, values, [Segment(0, length, length, ((0, length),))], 0.4)


def in_company(case: Case, cuts: Sequence[int], seed: int) -> list[Case]:
    """The same sequence in a pass per chunk, on scattered pages of three slots, between two other sequences."""
    rng = np.random.default_rng(seed)
    length = len(case.query)
    num_slots = 3 * (-(-length // 3) + 30)
    pages = 3 * rng.permutation(num_slots // 3)
    slots = [int(page) + i for page in pages for i in range(3)]
    own, others = slots[:length], slots[length:]
    keys, values = (rng.standard_normal((2, num_slots, 8), np.float32) for _ in range(2))
    keys[:, own], values[:, own] = case.keys, case.values
    passes = []
    for start, stop in pairwise([0, *cuts, length]):
        query = rng.standard_normal((5 + stop - start + 1, case.query.shape[1], 8), np.float32)
        query[5:-1] = case.query[start:stop]
        segments = [
            Segment(0, 5, 40, runs_of(others[:40])),
            Segment(5, 5 + stop - start, stop, runs_of(own[:stop])),
            Segment(5 + stop - start, len(query), 17, runs_of(others[40:57])),
        ]
        passes.append(Case(query, keys, values, segments, case.scaling))
    return passes


@given(st.integers(2, 70), st.integers(1, 4), windows, softcaps, st.integers(0, 2**32 - 1), st.data())
@settings(max_examples=15, phases=PHASES)
def test_a_row_gets_the_same_bits_in_chunks_on_other_pages_and_in_company(
    length: int, group: int, sliding_window: int | None, softcap: float | None, seed: int, data: st.DataObject
) -> None:
    options = {"sliding_window": sliding_window, "softcap": softcap}
    case = sequence(length, group, seed)
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=3)))
    at_once = attend(case, **options)
    chunks = [attend(packed, **options)[5:-1] for packed in in_company(case, cuts, seed)]
    np.testing.assert_array_equal(np.concatenate(chunks), at_once)


@pytest.mark.parametrize("sliding_window", [None, 5])
def test_a_row_decoded_alone_gets_the_bits_that_it_gets_in_its_prompt(sliding_window: int | None) -> None:
    case = sequence(50, group=3, seed=9)
    at_once = attend(case, sliding_window=sliding_window)
    for position in (0, 1, 5, 31, 32, 33, 49):
        rows = slice(position, position + 1)
        alone = replace(case, query=case.query[rows], segments=[Segment(0, 1, position + 1, ((0, position + 1),))])
        np.testing.assert_array_equal(attend(alone, sliding_window=sliding_window), at_once[rows])


# The pool


@given(cases(max_length=20))
@settings(max_examples=10, phases=PHASES)
def test_slots_outside_the_contexts_are_never_read(case: Case) -> None:
    """They hold other sessions' tokens, or memory never written."""
    before = attend(case)
    used = [slot for segment in case.segments for first, last in segment.runs for slot in range(first, last)]
    unused = np.setdiff1d(np.arange(case.keys.shape[1]), used)
    case.keys[:, unused], case.values[:, unused] = np.nan, np.nan
    np.testing.assert_array_equal(attend(case), before)


def test_the_pool_may_be_a_view_and_is_only_read() -> None:
    """Strides are the pool's own: nothing is made contiguous, which would copy it."""
    case = sequence(40, group=2, seed=2)
    pool = torch.from_numpy(np.concatenate([case.keys, case.values], axis=2)).to(DEVICE)
    before = pool.clone()
    query = torch.from_numpy(case.query).to(DEVICE)
    keys, values = pool[:, :, :8], pool[:, :, 8:]
    got = attention_triton.ragged_paged_attention(query, keys, values, case.segments, case.scaling)
    np.testing.assert_array_equal(got.cpu().numpy(), attend(case))
    assert torch.equal(pool, before)


def test_the_layers_of_a_pass_share_one_plan() -> None:
    case = sequence(20, group=1, seed=3)
    attend(case)
    before = attention_triton._plan.cache_info()
    attend(case)
    after = attention_triton._plan.cache_info()
    assert (after.hits, after.misses) == (before.hits + 1, before.misses)
