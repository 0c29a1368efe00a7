"""The round model: what a draft length is worth. One home for the formulas, for planner and controller alike.

Notation of docs/design: S_i is the probability that the first i draft tokens are all accepted; a verify pass takes
a + b * new_tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

NEGLIGIBLE = 0.01  # probability below which a cycle is cut off
FURTHEST = 64  # tokens after which it is
RTT_TOLERANCE = 1e-6  # of a break-even round trip, relative
MAX_IN_FLIGHT = 4  # drafts on their way at a time; drafting speed and round trip seldom allow more
COST_SLOWDOWN = 1.5  # objective `cost`: at most this much slower than a stream


def survival(acceptance_rate: float, num_draft_tokens: int) -> list[float]:
    """S_1..S_K when every position is accepted independently with `acceptance_rate` (0 to 1)."""
    return [acceptance_rate**i for i in range(1, num_draft_tokens + 1)]


def tokens_per_round(survival: Sequence[float]) -> float:
    """E = 1 + sum S_i: final tokens that one round yields, the recovered or bonus token included."""
    return 1.0 + sum(survival)


@dataclass(frozen=True, slots=True)
class Price:
    """What a way of working costs, in expectation."""

    ms_per_token: float
    passes_per_token: float  # of the target


def overlapped(
    survival: Sequence[float],
    num_draft_tokens: int,
    draft_ms: float,
    rtt_ms: float,
    verify_ms: float,
    max_in_flight: int,
    queue_ms: float = 0.0,
    first: tuple[int, float] | None = None,
) -> Price:
    """Speculation with drafts on their way while the next are made (edge/pilot.py), from one wrong guess to the next.

    The first draft has K tokens, each later one a guess of the bonus token and K more. They are verified one after another, a
    pass of `verify_ms` each, as long as every guess before was right: with probability S. The verdict on the first wrong guess
    ends the cycle; half a step of the device's is then wasted on average.

    Args:
        survival: S_1, S_2, ... ; further ones go on at the last rate.
        num_draft_tokens: K, from 0.
        draft_ms: a drafted token.
        rtt_ms: the round trip.
        verify_ms: a pass over K + 1 positions.
        max_in_flight: drafts on their way at a time.
        queue_ms: until the pass begins, unless the one before has kept the place.
        first: length of the first draft and ms of its pass, where they are not K's.
    """
    first_length, first_ms = first or (num_draft_tokens, verify_ms)
    trip_ms = rtt_ms / 2
    surviving, num_tokens, num_passes, total_ms = 1.0, 0.0, 0.0, draft_ms / 2
    pass_end_ms = 0.0
    verdicts: list[float] = []  # when they arrive
    reach, sums = _reach(tuple(survival), max(num_draft_tokens, FURTHEST))
    start, length, pass_ms = 0, first_length + 1, first_ms
    while surviving > NEGLIGIBLE and start < FURTHEST:
        sent_ms = (start + length - 1) * draft_ms
        if len(verdicts) >= max_in_flight and verdicts[-max_in_flight] > sent_ms:
            sent_ms = verdicts[-max_in_flight]
        arrives_ms = sent_ms + trip_ms + queue_ms
        pass_end_ms = (arrives_ms if arrives_ms > pass_end_ms else pass_end_ms) + pass_ms
        verdicts.append(pass_end_ms + trip_ms)
        num_passes += surviving
        num_tokens += sums[start + length] - sums[start]
        start += length
        survives = reach[start]
        last = survives <= NEGLIGIBLE or start >= FURTHEST
        total_ms += (surviving - (0.0 if last else survives)) * verdicts[-1]
        surviving, length, pass_ms = survives, num_draft_tokens + 1, verify_ms
    return Price(total_ms / num_tokens, num_passes / num_tokens)


@dataclass(frozen=True, slots=True)
class Exited:
    """What a calibration saw of token exits."""

    share: float  # of the device's guesses, how many need no verdict
    divergence: float  # of these, how many are not the target's choice


def cascaded(
    exited: Exited, acceptance_rate: float, num_draft_tokens: int, draft_ms: float, rtt_ms: float, verify_ms: float, queue_ms: float
) -> Price:
    """Cascade (edge/cascade.py), from one verdict to the next: a run of sure guesses, then K unsure ones and sure ones between.

    With c the share of sure guesses, d their divergence and a the acceptance of unsure ones: a run behind a wrong guess has
    c / (1 - c) tokens. Behind an accepted guess the next unsure one is judged with probability (1 - c) / (1 - c (1 - d)),
    and c / (1 - c (1 - d)) tokens lie between.

    Args:
        exited: c and d.
        acceptance_rate: of all guesses, from which a follows.
        num_draft_tokens: K, of unsure guesses, from 1.
        draft_ms: a drafted token.
        rtt_ms: the round trip.
        verify_ms: the pass.
        queue_ms: until it begins.
    """
    sure, wrong = min(exited.share, 0.99), exited.divergence
    unsure_rate = min(1.0, max(0.0, (acceptance_rate - sure * (1 - wrong)) / (1 - sure)))
    between = sure / (1 - sure * (1 - wrong))
    goes_on = unsure_rate * (1 - sure) / (1 - sure * (1 - wrong))
    run, flight = sure / (1 - sure), num_draft_tokens / (1 - sure)
    judged = [goes_on**j for j in range(num_draft_tokens + 1)]  # the chance that unsure guess j, or the bonus position, is
    num_tokens = run + sum(judged) + sum(judged[:-1]) * unsure_rate * between
    return Price(((run + flight) * draft_ms + rtt_ms + queue_ms + verify_ms) / num_tokens, 1 / num_tokens)


def flights_worth(survival: Sequence[float], num_draft_tokens: int, first_length: int | None = None) -> int:
    """How many drafts on their way at a time can matter: those whose start survives with more than a negligible probability.

    With more of them `overlapped` gives the same price. Arguments as there; at least 1.
    """
    reach, _ = _reach(tuple(survival), max(num_draft_tokens, FURTHEST))
    number, start = 1, (num_draft_tokens if first_length is None else first_length) + 1
    while start < FURTHEST and reach[start] > NEGLIGIBLE:
        number += 1
        start += num_draft_tokens + 1
    return number


def split_overlapped(
    survival: Sequence[float],
    num_draft_tokens: int,
    draft_ms: float,
    front_ms: float,
    uplink_ms: float,
    rtt_ms: float,
    tail_ms: float,
    cut_share: float,
    max_in_flight: int,
) -> Price:
    """`overlapped` on a target whose front runs on the device: a token is drafted, passed through the front, and its row sent.

    Device and uplink work side by side, so a row waits for the slower of the two; draft and front share the device.

    Args:
        survival: S_1, S_2, ...
        num_draft_tokens: K; front and tail see K + 1 rows.
        draft_ms: a drafted token.
        front_ms: the front over K + 1 rows.
        uplink_ms: sending their boundary rows.
        rtt_ms: the round trip.
        tail_ms: the tail over K + 1 rows.
        cut_share: of a pass, what the front saves the cloud: 0 to 1.
        max_in_flight: drafts on their way at a time.
    """
    row_ms, row_up_ms = front_ms / (num_draft_tokens + 1), uplink_ms / (num_draft_tokens + 1)
    step_ms = max(draft_ms + row_ms, row_up_ms)
    price = overlapped(survival, num_draft_tokens, step_ms, rtt_ms + row_ms + uplink_ms, tail_ms, max_in_flight)
    return Price(price.ms_per_token, price.passes_per_token * (1.0 - cut_share))


def drafted_per_token(survival: Sequence[float], num_draft_tokens: int, draft_ms: float, ms_per_token: float) -> float:
    """Tokens that the device drafts for a final one, as it goes on while verdicts travel: as many as there is time for."""
    most = (num_draft_tokens + 1) * MAX_IN_FLIGHT / tokens_per_round(survival[:num_draft_tokens])
    return min(most, ms_per_token / draft_ms) if draft_ms > 0 else most


def uplink_ms(num_bytes: float, mbps: float | None) -> float:
    """Sending so many bytes; None: at once."""
    return 0.0 if mbps is None else num_bytes * 8 / (mbps * 1e3)


def answer_ms(ttft_ms: float, ms_per_token: float, num_tokens: int) -> float:
    """Until the last token of an answer."""
    return ttft_ms + (num_tokens - 1) * ms_per_token


def ttft_ms(prefill_ms: float, rtt_ms: float = 0.0, uplink_ms: float = 0.0) -> float:
    """Until the first token: the prompt goes up, is read, and the token comes back. On the device, reading it is all."""
    return rtt_ms + uplink_ms + prefill_ms


def fastest_ms_per_token(
    survival: Sequence[float],
    verify_ms: Mapping[int, float],
    draft_ms: float,
    rtt_ms: float,
    max_in_flight: int,
    queue_ms: float = 0.0,
) -> float:
    """Speculation at the best of the draft lengths K that `verify_ms` names, each with its pass over K + 1 positions."""
    prices = (overlapped(survival, k, draft_ms, rtt_ms, pass_ms, max_in_flight, queue_ms) for k, pass_ms in verify_ms.items())
    return min(price.ms_per_token for price in prices)


def break_even_rtt_ms(
    survival: Sequence[float],
    verify_ms: Mapping[int, float],
    draft_ms: float,
    stream_ms: float,
    max_in_flight: int,
    queue_ms: float = 0.0,
) -> float | None:
    """The round trip at which speculation at its best takes as long a token as the stream; below it, speculation is faster.

    The stream's time per token does not depend on the round trip; speculation's grows with it, at every draft length and
    without bound, so there is one such round trip, or none (None: the stream is as fast even without a network).
    """

    def gain_ms(rtt_ms: float) -> float:
        return stream_ms - fastest_ms_per_token(survival, verify_ms, draft_ms, rtt_ms, max_in_flight, queue_ms)

    if gain_ms(0.0) <= 0:
        return None
    low, high = 0.0, 1.0
    while gain_ms(high) > 0:
        low, high = high, 2 * high
    while high - low > RTT_TOLERANCE * high:
        middle = (low + high) / 2
        low, high = (middle, high) if gain_ms(middle) > 0 else (low, middle)
    return (low + high) / 2


@lru_cache(maxsize=4)  # one survival is asked for every draft length
def _reach(survival: tuple[float, ...], margin: int) -> tuple[list[float], list[float]]:
    """S_0, S_1, ... until it is negligible, and more than `margin` more; and the sum of all before each.

    Beyond those given, S falls at the last rate.
    """
    reach = [1.0, *survival]
    rate = reach[-1] / reach[-2] if survival and reach[-2] else 0.0
    while reach[-1] > NEGLIGIBLE and len(reach) <= FURTHEST:
        reach.append(reach[-1] * rate)
    for _ in range(margin + 1):
        reach.append(reach[-1] * rate)
    return reach, [0.0, *accumulate(reach)]
