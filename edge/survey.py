"""What a device finds out by asking, before there is any traffic: its own speed, the link's, and the cloud's.

A few seconds each. The estimates of edge/estimates.py learn the same things from generations.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc

from edgecloud.edge.drafter import ModelDrafter
from edgecloud.edge.model import DraftModel
from edgecloud.edge.remote import Cloud, RemoteVerifier
from edgecloud.errors import ContextMissingError
from edgecloud.rpc import codec
from edgecloud.sampling import SamplingSettings
from edgecloud.types import CallCost, ServiceLoad

NUM_STEPS, NUM_PREFILLS, NUM_PINGS, NUM_UPLOADS = 40, 5, 20, 5
NUM_TURNS, STREAMED_TOKENS = 7, 5  # each turn times every number of rows once, and a stream: what slows one, slows all
PREFILL_TOKENS = 128
UPLOAD_TOKENS = 4096  # about 8 to 12 kB: with the headers still within TCP's first window
GREEDY = SamplingSettings()


@dataclass(frozen=True, slots=True)
class Spread:
    """Repeated measurements of one thing."""

    median: float
    p25: float
    p75: float
    num_samples: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Median and quartiles."""
        low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
        return cls(statistics.median(values), low, high, len(values))


@dataclass(frozen=True, slots=True)
class DeviceSurvey:
    """The device's own model."""

    step_ms: Spread  # a drafted token, its choice included
    prefill_ms_per_token: Spread
    prefill_tokens: int  # of the prompt with which that was measured


@dataclass(frozen=True, slots=True)
class LinkSurvey:
    """The way to the service."""

    least_rtt_ms: float  # of a request that no model sees
    rtt_ms: float  # their median
    rtt_deviation_ms: float  # mean distance from the median
    num_samples: int
    verify_rtt_ms: float  # of a verification, without queue and pass: what every round pays
    uplink_ms_per_byte: float  # of a further byte of a request, roughly; 0: too little to tell


@dataclass(frozen=True, slots=True)
class PassTime:
    """Verifications of so many rows (draft tokens and one), as the service counts. Medians."""

    num_rows: int
    queue_ms: float
    compute_ms: float
    num_samples: int


@dataclass(frozen=True, slots=True)
class CloudSurvey:
    """The service."""

    passes: list[PassTime]
    stream_ms: Spread  # between two tokens of a stream
    prefill_ms: Spread  # of a prompt that it has not seen, queue included
    prefill_tokens: float  # median length of these prompts
    load: ServiceLoad | None  # when it was last heard


def survey_device(model: DraftModel, vocab_size: int, tokens: Sequence[int]) -> DeviceSurvey:
    """Time the draft model on `tokens`, repeated as needed; `vocab_size` as the drafter's."""
    length = min(PREFILL_TOKENS, model.max_context_tokens // 2)
    prompt = _repeated(tokens, length)
    prefills = [_timed_ms(lambda: _prefill(model, prompt)) for _ in range(NUM_PREFILLS + 1)][1:]  # the first one warms up
    drafter = ModelDrafter(lambda: model, vocab_size)
    log = prompt[: length // 2]
    model.extend_to(log)
    steps = []
    for _ in range(min(NUM_STEPS, model.max_context_tokens - len(log))):
        started = time.perf_counter()
        log += drafter.draft(log, 1, GREEDY, ())
        steps.append((time.perf_counter() - started) * 1e3)
    return DeviceSurvey(Spread.of(steps[1:] or steps), Spread.of([ms / length for ms in prefills]), length)


def survey_link(cloud: Cloud, tokens: Sequence[int], window: int, verify_costs: Collection[CallCost]) -> LinkSurvey:
    """Time small requests, and large ones that the service refuses without a pass.

    Args:
        cloud: the service.
        tokens: any; they are repeated.
        window: of the service, in tokens.
        verify_costs: what verifications took before.

    Raises:
        CloudError: it does not answer.
    """
    cloud.describe(wait=True)  # the connection, and a radio, are awake now
    trips = [_timed_ms(lambda: cloud.describe(wait=False)) for _ in range(NUM_PINGS)]
    median = statistics.median(trips)
    verify_trips = [cost.elapsed_ms - cost.queue_ms - cost.compute_ms for cost in verify_costs]
    return LinkSurvey(
        least_rtt_ms=min(trips),
        rtt_ms=median,
        rtt_deviation_ms=statistics.fmean(abs(trip - median) for trip in trips),
        num_samples=len(trips),
        verify_rtt_ms=max(0.0, statistics.median(verify_trips)),
        uplink_ms_per_byte=_uplink_ms_per_byte(cloud, _repeated(tokens, min(UPLOAD_TOKENS, window - 1))),
    )


def survey_cloud(
    cloud: Cloud, prompts: Sequence[Sequence[int]], draft_ids: Sequence[int], rows: Sequence[int]
) -> tuple[CloudSurvey, list[CallCost]]:
    """Time prefills, verifications and a stream.  -> the survey, and what the verifications took

    Args:
        cloud: the service.
        prompts: that it has not seen; what it has, it does not compute.
        draft_ids: guesses of any quality, as many as the most of `rows` needs.
        rows: how many rows to time, in turn.

    Raises:
        CloudError: it does not answer.
    """
    prefills: list[CallCost] = []
    for tokens in prompts:
        session = RemoteVerifier(cloud)
        prefills.append(session.submit(tokens, [], GREEDY).result().cost)
        session.release()
    session = RemoteVerifier(cloud)
    costs: dict[int, list[CallCost]] = {count: [] for count in rows}
    try:
        tokens = prompts[0]
        session.submit(tokens, draft_ids[: max(rows) - 1], GREEDY).result()  # reads the context, and warms up
        streamed: list[float] = []
        for _ in range(NUM_TURNS):
            for count in rows:
                costs[count].append(session.submit(tokens, draft_ids[: count - 1], GREEDY).result().cost)
            intervals = [round_.cost.elapsed_ms for round_ in session.decode(tokens, STREAMED_TOKENS, GREEDY, ())]
            streamed += intervals[1:]  # the first waits for the round trip
    finally:
        session.release()
    survey = CloudSurvey(
        passes=[_pass_time(count, of_rows) for count, of_rows in costs.items()],
        stream_ms=Spread.of(streamed),
        prefill_ms=Spread.of([cost.queue_ms + cost.compute_ms for cost in prefills]),
        prefill_tokens=statistics.median(len(tokens) for tokens in prompts),
        load=cloud.load,
    )
    return survey, [cost for of_rows in costs.values() for cost in of_rows]


def _pass_time(num_rows: int, costs: Sequence[CallCost]) -> PassTime:
    queue_ms = statistics.median(cost.queue_ms for cost in costs)
    return PassTime(num_rows, queue_ms, statistics.median(cost.compute_ms for cost in costs), len(costs))


def _uplink_ms_per_byte(cloud: Cloud, tokens: list[int]) -> float:
    """From requests on a context that the service cannot have: it refuses them without a pass, long or short."""
    times: dict[int, list[float]] = {}
    for _ in range(NUM_UPLOADS):
        for some in (tokens[:2], tokens):
            session = RemoteVerifier(cloud)
            request = session.verify_request(some, [], codec.sampling_to_wire(GREEDY), num_assumed=1)
            times.setdefault(request.ByteSize(), []).append(_timed_ms(partial(_refused, session, request)))
    (small, small_ms), (large, large_ms) = ((size, statistics.median(ms)) for size, ms in sorted(times.items()))
    return max(0.0, large_ms - small_ms) / (large - small)


def _refused(session: RemoteVerifier, request: Any) -> None:
    try:
        session.verify_future(request).result()
    except grpc.RpcError as error:
        with suppress(ContextMissingError):
            raise session.learned(error, conditional=True) from error


def _prefill(model: DraftModel, tokens: list[int]) -> None:
    model.crop_to(0)
    model.extend_to(tokens)


def _repeated(tokens: Sequence[int], length: int) -> list[int]:
    return (list(tokens) * (length // len(tokens) + 1))[:length]


def _timed_ms(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) * 1e3
