"""What the device makes of the answers that it sees."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from random import Random

import pytest

from edgecloud.cost import overlapped, survival
from edgecloud.edge.estimates import CloudEstimate, Estimates
from edgecloud.types import CallCost


def verdict(compute_ms: float, queue_ms: float = 0.0) -> CallCost:
    return CallCost(1.0, queue_ms, compute_ms, queue_ms + compute_ms + 40.0, 100, 100)


def test_a_verdict_that_read_a_prompt_says_nothing_of_drafts() -> None:
    cloud = CloudEstimate()
    cloud.verified(5, verdict(60.0), conditional=False)
    cloud.verified(300, verdict(2500.0), conditional=False)
    assert cloud.verify_ms(5, 300) == pytest.approx(60.0)
    assert cloud.stream_ms(300) < 100.0


def test_company_in_passes_is_seen_in_those_that_were_not_made_since() -> None:
    cloud = CloudEstimate()
    for _ in range(20):
        cloud.streamed(CallCost(compute_ms=50.0, elapsed_ms=50.0))
    for _ in range(40):
        cloud.verified(5, verdict(60.0), conditional=True)
    for _ in range(40):
        cloud.verified(5, verdict(180.0), conditional=True)
    assert cloud.stream_ms(100) > 80.0
    for _ in range(40):
        cloud.verified(5, verdict(60.0), conditional=True)
    assert cloud.stream_ms(100) == pytest.approx(50.0, rel=0.05)


def test_a_request_that_waits_for_ours_is_not_said_to_queue() -> None:
    estimates = Estimates.unknown()
    estimates.judged(5, verdict(60.0, 20.0), None, 1.0, was_idle=False, conditional=False)
    for at_s in range(20):
        estimates.judged(5, verdict(60.0, 500.0), None, float(at_s), was_idle=False, conditional=True)
    assert estimates.cloud.queue_ms == pytest.approx(20.0)
    assert estimates.link.rtt_ms == pytest.approx(40.0)


def test_only_the_first_draft_of_a_chain_queues_when_the_cloud_is_the_slow_part() -> None:
    free, behind = (overlapped(survival(0.9, 16), 4, 1.0, 20.0, 90.0, 4, queue_ms) for queue_ms in (0.0, 40.0))
    assert free.passes_per_token == behind.passes_per_token
    tokens = 1 / (1 - 0.9)  # from one wrong guess to the next
    assert behind.ms_per_token - free.ms_per_token == pytest.approx(40.0 / tokens, rel=0.1)


def test_generations_side_by_side_may_feed_and_ask_at_once() -> None:
    known = Estimates.unknown()

    def work(seed: int) -> None:
        random = Random(seed)
        for at in range(3000):
            cost = CallCost(compute_ms=random.uniform(1, 99), elapsed_ms=random.uniform(100, 200), uplink_bytes=99)
            known.judged(random.randint(1, 17), cost, None, at / 50, was_idle=False, conditional=False)
            known.streamed(CallCost(compute_ms=5.0, elapsed_ms=6.0), None, at / 50, was_idle=False)
            assert known.cloud.pass_ms(random.randint(1, 17), 9) > 0
            assert (known.link.least_rtt_ms or 0.0) >= 0

    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(work, seed) for seed in range(4)]:
            done.result()


def test_a_prompt_tells_what_a_token_of_it_takes_on_the_device_and_a_few_tokens_do_not() -> None:
    device = Estimates.unknown().device
    device.prefilled(4, 400.0)  # a step's fixed cost is most of it
    assert device.prefill_ms is None
    device.prefilled(100, 150.0)
    device.prefilled(200, 300.0)
    assert device.prefill_ms == pytest.approx(1.5)
