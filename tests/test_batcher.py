"""Who goes into the next pass: deadlines, tenants and prompts beside short requests; and what a pass is expected to take."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecloud.cloud.batcher import SHORT_ROWS, Batcher, Job, Share
from edgecloud.cloud.pages import PagePool
from edgecloud.cloud.pass_cost import PassCostFit
from edgecloud.cloud.projections import padded_rows
from edgecloud.cloud.prompt_room import SMALLEST_CHUNK_ROWS, STRETCH
from edgecloud.cloud.sessions import SessionStore
from edgecloud.cloud.work import Extend
from edgecloud.sampling import SamplingSettings

MAX_ROWS = 256


class Desk:
    """A batcher with all the pages it wants, and requests to plan for."""

    def __init__(self, max_rows: int = MAX_ROWS, fit: PassCostFit | None = None, stretch: float = STRETCH) -> None:
        self._sessions = SessionStore(PagePool(10_000, 16), 1000, 300.0)
        self.batcher = Batcher(self._sessions, max_rows, fit or PassCostFit(), stretch=stretch)
        self.jobs: list[Job] = []

    def ask(self, num_rows: int, *, tenant: str = "", deadline_s: float = math.inf, arrived_s: float = 0.0) -> Job:
        number = len(self.jobs)
        request = Extend(b"%016d" % number, 0, (number,) * num_rows, 0, SamplingSettings(), tenant=tenant, deadline_s=deadline_s)
        session = self._sessions.open(request.session_id, 0.0)
        assert session is not None
        session.tokens = list(request.context_ids)
        self.jobs.append(Job(number, request, lambda _: None, arrived_s, session, context_length=num_rows))
        return self.jobs[-1]

    def plan(self) -> list[Share]:
        plan = self.batcher.plan(self.jobs, now_s=0.0)
        assert not plan.starved
        return plan.shares

    def run(self, shares: Sequence[Share]) -> None:
        """As the engine does after a pass; who is through comes again with as much."""
        for share in shares:
            share.job.open_session.table.length = share.stop % len(share.job.open_session.tokens)


def fit_of(base_ms: float, per_token_ms: float, per_context_token_ms: float = 0.0) -> PassCostFit:
    fit = PassCostFit()
    for i in range(40):
        rows, context = 1 + i % 7 * 9, 1 + i * 37 % 900
        fit.observe(rows, context, base_ms + per_token_ms * rows + per_context_token_ms * context)
    return fit


# The fit


@given(st.floats(0.1, 500), st.floats(0.001, 20), st.floats(0, 0.05), st.integers(0, 2**32 - 1))
def test_the_fit_finds_what_passes_take(base_ms: float, per_token_ms: float, per_context_token_ms: float, seed: int) -> None:
    rng, fit = np.random.default_rng(seed), PassCostFit()
    for _ in range(60):
        rows, context = int(rng.integers(1, 300)), int(rng.integers(1, 8000))
        fit.observe(rows, context, base_ms + per_token_ms * rows + per_context_token_ms * context)
    assert fit.predict_ms(100, 3000) == pytest.approx(base_ms + per_token_ms * 100 + per_context_token_ms * 3000, rel=0.02)


@given(st.lists(st.tuples(st.integers(1, 512), st.integers(1, 8192), st.floats(0, 1e5)), max_size=60))
def test_whatever_passes_take_no_term_is_negative_or_infinite(passes: list[tuple[int, int, float]]) -> None:
    fit = PassCostFit()
    for rows, context, took_ms in passes:
        fit.observe(rows, context, took_ms)
    cost = fit.cost
    assert all(0 <= x < math.inf for x in (cost.base_ms, cost.per_token_ms, cost.per_context_token_ms))


def test_ten_thousand_passes_of_one_shape_do_not_blow_the_fit_up() -> None:
    fit = fit_of(50.0, 3.0)
    for _ in range(10_000):
        fit.observe(1, 100, 53.0)
    assert fit.predict_ms(1, 100) == pytest.approx(53.0, rel=0.01)
    for i in range(100):
        fit.observe(1 + i % 50, 100, 20.0 + (1 + i % 50))  # a faster machine
    assert fit.predict_ms(30, 100) == pytest.approx(50.0, rel=0.1)


def test_one_pass_that_waited_for_another_process_does_not_spoil_the_fit() -> None:
    fit = fit_of(50.0, 3.0)
    fit.observe(10, 300, 60_000.0)
    assert fit.predict_ms(10, 300) < 3 * 80


# The plan


@given(
    st.lists(st.tuples(st.integers(1, 400), st.sampled_from("abc"), st.floats(0, 10)), min_size=1, max_size=12),
    st.sampled_from([1, 7, 64, 512]),
)
def test_every_pass_is_full_or_holds_everybody(asked: list[tuple[int, str, float]], max_rows: int) -> None:
    desk = Desk(max_rows)
    for num_rows, tenant, deadline_s in asked:
        desk.ask(num_rows, tenant=tenant, deadline_s=deadline_s)
    shares = desk.plan()
    rows = sum(share.num_rows for share in shares)
    assert 1 <= rows <= max_rows
    assert len({share.job.number for share in shares}) == len(shares)
    short = sum(min(job.num_rows, SHORT_ROWS) for job in desk.jobs if job.num_rows <= SHORT_ROWS)
    assert rows >= min(max_rows, short)


def test_the_least_slack_goes_first_where_there_is_no_room_for_all() -> None:
    desk = Desk(max_rows=10)
    late, soon, never = desk.ask(5, deadline_s=9.0), desk.ask(5, deadline_s=1.0), desk.ask(5)
    assert [share.job for share in desk.plan()] == [soon, late]
    desk.jobs.remove(soon)
    assert [share.job for share in desk.plan()] == [late, never]


def test_a_long_pass_leaves_less_slack_than_a_short_one_with_the_same_deadline() -> None:
    desk = Desk(max_rows=40, fit=fit_of(10.0, 50.0))
    small, large = desk.ask(4, deadline_s=5.0), desk.ask(40, deadline_s=5.0)
    assert desk.plan()[0].job is large
    assert small not in [share.job for share in desk.plan()]


def test_equals_take_turns() -> None:
    desk = Desk(max_rows=2)
    jobs = [desk.ask(1, arrived_s=float(i)) for i in range(5)]
    first = [share.job for share in desk.plan()]
    assert first == jobs[:2]
    for job in first:
        job.arrived_s = 10.0  # a decode waits for its next token from now on
    assert [share.job for share in desk.plan()] == jobs[2:4]


def test_a_tenant_with_many_requests_gets_no_more_than_one_with_few() -> None:
    desk = Desk(max_rows=8)
    for _ in range(40):
        desk.ask(4, tenant="many")
    desk.ask(4, tenant="few")
    rows: Counter[str] = Counter()
    for _ in range(50):
        shares = desk.plan()
        for share in shares:
            rows[share.job.request.tenant] += share.num_rows
    assert rows["few"] == rows["many"]


def test_a_tenant_that_was_away_has_saved_nothing() -> None:
    desk = Desk(max_rows=4)
    for _ in range(4):
        desk.ask(4, tenant="steady")
    for _ in range(100):
        desk.plan()
    for _ in range(4):
        desk.ask(4, tenant="back")
    served = Counter(share.job.request.tenant for _ in range(20) for share in desk.plan())
    assert served == {"steady": 10, "back": 10}


@given(st.floats(1, 200), st.floats(0.05, 20), st.integers(1, 12), st.integers(1, 5))
def test_a_prompt_stretches_the_pass_of_others_by_no_more_than_it_may(
    base_ms: float, per_token_ms: float, num_short: int, short_rows: int
) -> None:
    fit = fit_of(base_ms, per_token_ms)
    desk = Desk(max_rows=4096, fit=fit)
    short = [desk.ask(short_rows) for _ in range(num_short)]
    prompt = desk.ask(2000)
    shares = desk.plan()
    assert [share.job for share in shares] == [*short, prompt]
    rows = shares[-1].num_rows
    alone_ms, together_ms = (base_ms + per_token_ms * (num_short * short_rows + n) for n in (0, rows))
    assert rows >= SMALLEST_CHUNK_ROWS
    assert together_ms <= 1.05 * STRETCH * alone_ms or rows == SMALLEST_CHUNK_ROWS


def test_the_last_chunk_of_a_prompt_is_no_short_request() -> None:
    desk = Desk(fit=fit_of(10.0, 10.0))
    desk.ask(1)
    prompt = desk.ask(100)
    prompt.is_prompt = True
    prompt.open_session.table.length = 60
    assert desk.plan()[-1].num_rows == SMALLEST_CHUNK_ROWS


def test_where_nobody_waits_for_one_answer_prompts_fill_every_pass() -> None:
    desk = Desk(fit=fit_of(40, 1), stretch=math.inf)
    for _ in range(8):
        desk.ask(1)
    for _ in range(4):
        desk.ask(2000)
    for _ in range(10):
        shares = desk.plan()
        assert sum(share.num_rows for share in shares) == MAX_ROWS
        desk.batcher.observe(shares, 300.0)
        desk.run(shares)


def test_a_prompt_alone_takes_all_there_is() -> None:
    desk = Desk(fit=fit_of(10.0, 10.0))
    desk.ask(2000)
    assert [share.num_rows for share in desk.plan()] == [MAX_ROWS]


# The plan in virtual time


class Machine:
    """What a pass takes: as long as the weights, or as arithmetic in steps of rows; and the contexts. Its speed may change."""

    def __init__(self, weights_ms: float, row_ms: float, step: int, context_ms: float) -> None:
        self.weights_ms, self.row_ms, self.step, self.context_ms = weights_ms, row_ms, step, context_ms
        self.speed = 1.0

    def took_ms(self, num_rows: int, num_context: int) -> float:
        whole = -(-padded_rows(num_rows) // self.step) * self.step
        return (max(self.weights_ms, self.row_ms * whole) + self.context_ms * num_context) / self.speed


def stretches(desk: Desk, machine: Machine, noise: np.random.Generator, num_passes: int) -> list[tuple[float, int]]:
    """Play passes.  -> how much longer each was than without prompts, and rows of prompts, for those that had both"""
    played = []
    for _ in range(num_passes):
        shares = desk.plan()
        short = [share for share in shares if not share.job.is_prompt]
        num_rows = sum(share.num_rows for share in shares)
        took_ms = machine.took_ms(num_rows, sum(share.stop for share in shares))
        alone_ms = machine.took_ms(sum(share.num_rows for share in short), sum(share.stop for share in short))
        desk.batcher.observe(shares, took_ms * noise.uniform(0.97, 1.1))
        for share in shares:
            share.job.open_session.table.length = share.stop
            if share.stop == len(share.job.open_session.tokens):  # the next token of a decode; another prompt
                if share.job.is_prompt:
                    share.job.open_session.table.length = 0
                else:
                    share.job.open_session.tokens.append(0)
        if short and len(shares) > len(short):
            played.append((took_ms / alone_ms, num_rows - len(short)))
    return played


@given(
    row_ms=st.floats(0.05, 3),
    step=st.sampled_from([1, 2, 4, 8, 16]),
    steps_free=st.floats(2, 20),
    context_ms=st.floats(0, 0.005),
    num_short=st.integers(1, 12),
    seed=st.integers(0, 2**32 - 1),
)
def test_whatever_rows_cost_no_pass_takes_twice_what_it_would_without_the_prompt(
    row_ms: float, step: int, steps_free: float, context_ms: float, num_short: int, seed: int
) -> None:
    machine, noise = Machine(steps_free * step * row_ms, row_ms, step, context_ms), np.random.default_rng(seed)
    desk = Desk(max_rows=512)
    for _ in range(num_short):
        desk.ask(30)
    stretches(desk, machine, noise, 40)
    desk.ask(2000)
    for stretch, rows in stretches(desk, machine, noise, 300):
        assert stretch <= 2.0 or rows <= SMALLEST_CHUNK_ROWS


@pytest.mark.parametrize("speed", [0.5, 2.0])
def test_a_machine_that_becomes_slower_or_faster_under_a_prompt_is_measured_anew(speed: float) -> None:
    machine, noise = Machine(40.0, 1.5, 1, 0.001), np.random.default_rng(0)
    desk = Desk(max_rows=512)
    for _ in range(8):
        desk.ask(30)
    stretches(desk, machine, noise, 40)
    desk.ask(2000)
    stretches(desk, machine, noise, 200)
    machine.speed = speed
    stretches(desk, machine, noise, 400)
    settled = [stretch for stretch, _ in stretches(desk, machine, noise, 200)]
    assert 1.15 <= np.median(settled) <= max(settled) <= 1.7
