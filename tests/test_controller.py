"""The controller: what it may choose, what it prefers, and that it does not waver. All in virtual time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from operator import mul
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecloud.cost import COST_SLOWDOWN, MAX_IN_FLIGHT, flights_worth, overlapped, survival
from edgecloud.edge.controller import DRAFT_LENGTHS, OTHER_LENGTH, Controller
from edgecloud.edge.estimates import Estimates
from edgecloud.edge.plan import Plan
from edgecloud.options import OBJECTIVES
from edgecloud.types import CallCost, Objective


@dataclass(frozen=True)
class Site:
    """A device, a link and a cloud, as they are."""

    rtt_ms: float = 20.0
    step_ms: float = 18.0
    acceptance: float = 0.7
    pass_ms: float = 45.0
    row_ms: float = 5.0
    stream_ms: float = 50.0

    def verify_ms(self, num_rows: int) -> float:
        return self.pass_ms + self.row_ms * num_rows

    def streamed(self, noise: float = 1.0) -> CallCost:
        """A token of a stream, after the one before."""
        return CallCost(compute_ms=self.verify_ms(1) * noise, elapsed_ms=self.stream_ms * noise)

    def slower(self, factor: float) -> Site:
        """With a cloud that takes `factor` times as long."""
        return Site(
            self.rtt_ms, self.step_ms, self.acceptance, self.pass_ms * factor, self.row_ms * factor, self.stream_ms * factor
        )


def seen(site: Site, now_s: float = 0.0) -> Estimates:
    """What is known of a site after some time there."""
    estimates = Estimates.unknown()
    for _ in range(10):
        estimates.link.add(site.rtt_ms, 100, now_s, was_idle=False)
        estimates.device.drafted(site.step_ms)
        estimates.cloud.streamed(site.streamed())
        for length in (0, *DRAFT_LENGTHS):
            estimates.cloud.verified(length + 1, CallCost(compute_ms=site.verify_ms(length + 1)), conditional=False)
    random = Random(0)
    for _ in range(60):
        position = 0
        while position < 16:
            right = random.random() < site.acceptance
            estimates.acceptance.add(position, right)
            if not right:
                break
            position += 1
    return estimates


def plan_at(site: Site, objective: Objective = "latency", max_draft_tokens: int = 32) -> Plan:
    return Controller(seen(site), objective, max_draft_tokens).plan(0.0, 100)


sites = st.builds(
    Site,
    rtt_ms=st.floats(0, 400),
    step_ms=st.floats(1, 80),
    acceptance=st.floats(0.05, 0.97),
    pass_ms=st.floats(1, 300),
    row_ms=st.floats(0, 60),
    stream_ms=st.floats(2, 400),
)


@settings(max_examples=40)
@given(sites, st.sampled_from(OBJECTIVES), st.integers(1, 32))
def test_no_plan_is_outside_what_is_allowed(site: Site, objective: Objective, max_draft_tokens: int) -> None:
    plan = plan_at(site, objective, max_draft_tokens)
    assert plan.mode in {"cloud", "speculative"}
    assert plan.num_draft_tokens <= max_draft_tokens
    assert (plan.num_draft_tokens > 0) == (plan.mode == "speculative")
    if objective == "cost" and plan.mode == "speculative":
        price = price_of(site, plan)
        assert price <= 1.05 * COST_SLOWDOWN * site.stream_ms  # the estimates are smoothed, hence 5 %


def price_of(site: Site, plan: Plan) -> float:
    estimates = seen(site)
    chances = estimates.acceptance.survival(DRAFT_LENGTHS[-1])
    verify_ms = site.verify_ms(plan.num_draft_tokens + 1)
    first = plan.first, site.verify_ms(plan.first + 1)
    return overlapped(chances, plan.num_draft_tokens, site.step_ms, site.rtt_ms, verify_ms, MAX_IN_FLIGHT, 0.0, first).ms_per_token


@settings(max_examples=40)
@given(sites, st.floats(0, 400))
def test_a_longer_round_trip_never_makes_it_speculate(site: Site, longer_ms: float) -> None:
    far = Site(site.rtt_ms + longer_ms, site.step_ms, site.acceptance, site.pass_ms, site.row_ms, site.stream_ms)
    if plan_at(site).mode == "cloud":
        assert plan_at(far).mode == "cloud"


@settings(max_examples=40)
@given(sites, st.floats(1, 10))
def test_a_slower_cloud_never_makes_it_stream(site: Site, factor: float) -> None:
    if plan_at(site).mode == "speculative":
        assert plan_at(site.slower(factor)).mode == "speculative"


@settings(max_examples=20)
@given(sites, sites)
def test_it_does_not_waver_on_a_steady_link(site: Site, other: Site) -> None:
    """Ten minutes of noisy observations: at most one change of mode a minute, after the first second."""
    random = Random(1)
    estimates, now_s = seen(other), 0.0
    controller, modes = Controller(estimates), []
    for context in range(100, 700):
        now_s += 1.0
        noise = random.gauss(1.0, 0.05)
        estimates.link.add(site.rtt_ms * noise, 100, now_s, was_idle=False)
        estimates.device.drafted(site.step_ms * random.gauss(1.0, 0.05))
        estimates.cloud.streamed(site.streamed(random.gauss(1.0, 0.05)))
        for length in (0, *DRAFT_LENGTHS):
            cost = CallCost(compute_ms=site.verify_ms(length + 1) * random.gauss(1.0, 0.05))
            estimates.cloud.verified(length + 1, cost, conditional=False)
        position = 0
        while position < 4 and random.random() < site.acceptance:
            estimates.acceptance.add(position, True)
            position += 1
        estimates.acceptance.add(position, False)
        modes.append(controller.plan(now_s, context).mode)
    switches = sum(a != b for a, b in pairwise(modes[30:]))
    assert switches <= 10


def test_drafts_shrink_to_nothing_as_the_cloud_becomes_bound_by_arithmetic() -> None:
    """Rows that cost as much as a pass of their own: a draft that is half wrong costs more than it brings."""
    lengths = [plan_at(Site(rtt_ms=2, pass_ms=50 - row, row_ms=row, acceptance=0.6)).num_draft_tokens for row in (0, 10, 25, 49)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > 0
    assert lengths[-1] == 0


def test_what_the_user_wants_decides() -> None:
    site = Site(rtt_ms=60)
    latency, cost = plan_at(site), plan_at(site, "cost")
    assert cost.num_draft_tokens > latency.num_draft_tokens
    assert plan_at(site, "offline-first").num_draft_tokens == DRAFT_LENGTHS[-1]


def test_before_anything_is_known_it_streams() -> None:
    assert Controller(Estimates.unknown()).plan(0.0, 1).mode == "cloud"


def test_a_draft_that_has_gone_stale_is_not_asked_again() -> None:
    estimates = seen(Site(rtt_ms=2, acceptance=0.9))
    assert Controller(estimates).plan(0.0, 1).mode == "speculative"
    for _ in range(1500):
        estimates.acceptance.add(0, False)
    assert estimates.acceptance.alarm
    assert Controller(estimates).plan(0.0, 1).mode == "cloud"


def test_a_round_trip_seen_long_ago_is_tried_again() -> None:
    estimates = seen(Site(rtt_ms=2))
    for _ in range(30):
        estimates.link.add(400.0, 100, 1.0, was_idle=False)
    controller = Controller(estimates)
    assert controller.plan(1.0, 1).mode == "cloud"
    assert controller.plan(12.0, 2).mode == "speculative"


def test_it_drafts_no_further_ahead_than_guesses_can_be_right() -> None:
    """The same drafts, fewer of them on their way as the acceptance falls: that is no change of plan."""
    estimates = seen(Site(acceptance=0.9))
    controller = Controller(estimates, "offline-first")
    far = controller.plan(0.0, 1)
    for _ in range(60):
        estimates.acceptance.add(0, False)
    near = controller.plan(1.0, 2)
    assert not estimates.acceptance.alarm
    assert near.num_draft_tokens == far.num_draft_tokens
    assert 1 <= near.max_in_flight < far.max_in_flight <= MAX_IN_FLIGHT
    assert near.lookahead < far.lookahead


def same_way(a: Plan, b: Plan) -> bool:
    """Whether they differ in nothing but how many drafts may be on their way."""
    return replace(a, max_in_flight=b.max_in_flight) == b


def test_another_draft_length_must_promise_more_though_the_flights_change_with_the_acceptance() -> None:
    random, flights = Random(3), set()
    for site in (Site(rtt_ms=rtt_ms, step_ms=step_ms, stream_ms=200) for rtt_ms in (2, 30, 90) for step_ms in (5, 15)):
        estimates = seen(site)
        controller = Controller(estimates)
        plan = controller.plan(0.0, 0)
        for context in range(1, 80):
            estimates.acceptance.add(random.choice([0, 0, 1, 2]), random.random() < (0.9 if context % 40 < 20 else 0.3))
            arms = controller.arms(0.0, context)
            price = next(arm.price.ms_per_token for arm in arms if same_way(arm.plan, plan))
            plan, before = controller.plan(0.0, context), plan
            flights.add(plan.max_in_flight)
            if not same_way(plan, before):
                assert next(arm.price.ms_per_token for arm in arms if same_way(arm.plan, plan)) <= OTHER_LENGTH * price
    assert len(flights) > 1


# The cost model


@given(st.floats(0.0, 0.99), st.integers(0, 16), st.integers(0, 16), st.floats(0.1, 100), st.floats(0, 500), st.floats(0.1, 500))
def test_more_drafts_on_their_way_than_are_worth_it_change_no_price(
    acceptance: float, length: int, first: int, draft_ms: float, rtt_ms: float, verify_ms: float
) -> None:
    chances = survival(acceptance, 16)
    first_pass = first, 0.9 * verify_ms
    worth = flights_worth(chances, length, first)
    assert worth >= 1
    unlimited = overlapped(chances, length, draft_ms, rtt_ms, verify_ms, 1000, 3.0, first_pass)
    assert overlapped(chances, length, draft_ms, rtt_ms, verify_ms, worth, 3.0, first_pass) == unlimited
    limited = overlapped(chances, length, draft_ms, rtt_ms, verify_ms, MAX_IN_FLIGHT, 3.0, first_pass)
    assert overlapped(chances, length, draft_ms, rtt_ms, verify_ms, min(worth, MAX_IN_FLIGHT), 3.0, first_pass) == limited


@given(
    st.lists(st.floats(0.0, 1.0), min_size=12, max_size=12),
    st.floats(0.1, 100),
    st.floats(0, 500),
    st.floats(1, 500),
    st.floats(0, 50),
)
def test_the_least_price_of_a_round_is_where_the_marginal_rule_stops_drafting(
    rates: list[float], draft_ms: float, rtt_ms: float, base_ms: float, row_ms: float
) -> None:
    """The design's: draft token i+1 only if S_{i+1} / E_i > step / (C + i * step). A step here pays its row in the pass, too."""
    chances = list(accumulate(rates, mul))  # S_1, S_2, ...
    expected = list(accumulate(chances, initial=1.0))  # E_0, E_1, ...
    step_ms = draft_ms + row_ms
    fixed_ms = draft_ms / 2 + rtt_ms + base_ms + row_ms

    def price(length: int) -> float:
        """Of a round with nothing on its way: no guess of a bonus token is right."""
        verify_ms = base_ms + row_ms * (length + 1)
        return overlapped([*chances[:length], 0.0], length, draft_ms, rtt_ms, verify_ms, 1).ms_per_token

    stop = next((i for i, chance in enumerate(chances) if chance * (fixed_ms + i * step_ms) <= step_ms * expected[i]), len(chances))
    assert price(stop) == pytest.approx(min(price(length) for length in range(len(chances) + 1)), rel=1e-9)


@given(st.floats(0.01, 0.99), st.integers(0, 16), st.floats(0.1, 100), st.floats(0, 500), st.floats(0.1, 500), st.integers(1, 4))
def test_time_grows_with_every_delay_and_falls_with_room_in_flight(
    acceptance: float, length: int, draft_ms: float, rtt_ms: float, verify_ms: float, in_flight: int
) -> None:
    chances = survival(acceptance, 16)
    price = overlapped(chances, length, draft_ms, rtt_ms, verify_ms, in_flight)
    assert overlapped(chances, length, draft_ms, rtt_ms + 9, verify_ms, in_flight).ms_per_token >= price.ms_per_token
    assert overlapped(chances, length, draft_ms, rtt_ms, verify_ms + 9, in_flight).ms_per_token >= price.ms_per_token
    assert overlapped(chances, length, draft_ms + 9, rtt_ms, verify_ms, in_flight).ms_per_token >= price.ms_per_token
    assert overlapped(chances, length, draft_ms, rtt_ms, verify_ms, in_flight + 1).ms_per_token <= price.ms_per_token + 1e-9
    assert 0 < price.passes_per_token <= 1 + 1e-9


def test_a_draft_that_is_never_right_costs_a_round_a_token() -> None:
    price = overlapped(survival(0.0, 4), 4, 10.0, 20.0, 30.0, 4)
    assert price.ms_per_token == pytest.approx(10.0 / 2 + 40.0 + 20.0 + 30.0)
    assert price.passes_per_token == 1.0


def test_one_draft_at_a_time_is_the_round_of_the_design() -> None:
    """With nothing on its way, and a draft that is wrong at its end: K drafts, a round trip, a pass."""
    chances = [1.0, 1.0, 1.0, 0.0]
    price = overlapped(chances, 3, 10.0, 20.0, 30.0, 1)
    assert price.ms_per_token == pytest.approx((10.0 / 2 + 30.0 + 20.0 + 30.0) / 4)
