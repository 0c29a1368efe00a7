"""What the device knows of itself, of the link and of the cloud, from traffic that flows anyway. Times in ms, clocks in s.

Everything is a function of what was observed and when, so it runs in virtual time as well.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from threading import RLock

from edgecloud.types import CallCost, ServiceLoad

WINDOW_S = 30.0  # of the least round trip
IDLE_S = 1.0  # a radio that was silent for longer answers its first packet late
FIRST_PACKET_MS = 1500.0  # by how much, at worst: LTE and 5G after 11 s, 9 in 10
SMOOTHING, DEVIATION_SMOOTHING = 1 / 8, 1 / 4  # RFC 6298
MAX_POSITION = 16  # draft positions told apart
PRIOR_ACCEPTANCE, PRIOR_WEIGHT = 0.6, 4.0  # as of so many tokens
POOLED_WEIGHT = 8.0  # a position's own count against that of all positions
MEMORY_TOKENS = 200.0  # after so many tokens an observation counts 1/e
SETTLED = 8  # observations after which a mean that moves means a change
SHARED = 0.6  # of a pass's change, in the exponent, that passes of other sizes are taken to share
SMALL_BYTES = 2048  # a request that takes no time on the line worth knowing
FEWEST_PREFILLED = 16  # tokens read at once that say what one of a prompt takes
USUAL_TOKENS = 2000.0  # what is usual follows this slowly
ALARM_TOKENS, ALARM_SHARE = 64, 0.25  # of its usual acceptance, for so long: a stale draft


class Smoothed:
    """A smoothed mean and mean deviation."""

    def __init__(self) -> None:
        self.mean: float | None = None
        self.deviation = 0.0
        self.count = 0

    def add(self, value: float) -> None:
        """Take in an observation. The first few count alike."""
        self.count += 1
        if self.mean is None:
            self.mean, self.deviation = value, value / 4
            return
        self.deviation += DEVIATION_SMOOTHING * (abs(value - self.mean) - self.deviation)
        self.mean += max(SMOOTHING, 1 / self.count) * (value - self.mean)


class LinkEstimate:
    """Round trip and rates of the link, without the cloud's own time."""

    def __init__(self) -> None:
        self._recent: deque[tuple[float, float]] = deque()  # (time, round trip), later and larger: the first is the window's least
        self._smoothed = Smoothed()
        self._uplink_ms_per_byte = Smoothed()
        self._heard_s = -math.inf
        self.observed_s = -math.inf  # when a round trip was seen

    def sent_to_idle(self, now_s: float) -> bool:
        """Whether a request that leaves now wakes a radio."""
        return now_s - self._heard_s > IDLE_S

    def heard(self, now_s: float) -> None:
        """A packet came."""
        self._heard_s = now_s

    def add(self, round_trip_ms: float, uplink_bytes: int, now_s: float, *, was_idle: bool) -> None:
        """A request and its answer. What was sent over an idle link says nothing, what was long says what a byte costs."""
        self.heard(now_s)
        value = max(0.0, round_trip_ms)
        if was_idle and self._smoothed.mean is not None:
            return
        if uplink_bytes > SMALL_BYTES and self._smoothed.mean is not None:
            self._uplink_ms_per_byte.add(max(0.0, value - self._smoothed.mean) / uplink_bytes)
            return
        self.observed_s = now_s
        self._smoothed.add(value)
        while self._recent and (self._recent[-1][1] >= value or self._recent[0][0] < now_s - WINDOW_S):
            self._recent.pop() if self._recent[-1][1] >= value else self._recent.popleft()
        self._recent.append((now_s, value))

    @property
    def rtt_ms(self) -> float | None:
        """Smoothed round trip of a small request."""
        return self._smoothed.mean

    @property
    def least_rtt_ms(self) -> float | None:
        """The least of the latest half minute."""
        return self._recent[0][1] if self._recent else None

    @property
    def deviation_ms(self) -> float:
        """Mean deviation of the round trip."""
        return self._smoothed.deviation

    @property
    def uplink_ms_per_byte(self) -> float:
        """What a further byte of a request costs; 0: not seen yet."""
        return self._uplink_ms_per_byte.mean or 0.0


class CloudEstimate:
    """Time that a request spends in the service: its fit of a pass, corrected by what requests really took."""

    def __init__(self) -> None:
        self._load: ServiceLoad | None = None
        self._streamed = Smoothed()  # between two tokens of a stream
        self._gap = Smoothed()  # of that, what is no pass
        self._queue = Smoothed()  # before a verification that waits for none of ours
        self._passes: dict[int, Smoothed] = {}  # by number of rows: the time of a pass is a staircase, no line

    @property
    def known(self) -> bool:
        """Whether a pass can be predicted."""
        return bool(self._passes) or (self._load is not None and self._load.pass_base_ms > 0)

    def tell(self, load: ServiceLoad) -> None:
        """A reply brought the service's own fit."""
        self._load = load

    def verified(self, num_rows: int, cost: CallCost, *, conditional: bool) -> None:
        """A verdict took this long in the service. One that read a prompt says nothing of drafts."""
        if num_rows > MAX_POSITION + 1:
            return
        self._learn(num_rows, cost.compute_ms)
        if not conditional:
            self._queue.add(cost.queue_ms)

    def streamed(self, cost: CallCost) -> None:
        """Two tokens of a stream came this far apart."""
        self._streamed.add(cost.elapsed_ms)
        self._gap.add(cost.elapsed_ms - cost.compute_ms)
        self._learn(1, cost.compute_ms)

    def _learn(self, num_rows: int, compute_ms: float) -> None:
        """What made this pass slower or faster, company in it, does the same to those not seen since."""
        seen = self._passes.setdefault(num_rows, Smoothed())
        before_ms = seen.mean
        seen.add(compute_ms)
        if before_ms and seen.mean and seen.count > SETTLED:  # before, a change is the noise of the first few
            for other in self._passes.values():
                if other is not seen and other.mean is not None:
                    other.mean *= (seen.mean / before_ms) ** SHARED

    def fitted_ms(self, num_rows: int, context_tokens: int) -> float:
        """The service's own fit; 0: it has none."""
        load = self._load
        if load is None:
            return 0.0
        return load.pass_base_ms + load.pass_per_token_ms * num_rows + load.pass_per_context_token_ms * context_tokens

    def verify_ms(self, num_rows: int, context_tokens: int) -> float:
        """Queue and pass of a verification of so many rows."""
        return self.pass_ms(num_rows, context_tokens) + self.queue_ms

    def stream_ms(self, context_tokens: int) -> float:
        """Between two tokens of a stream."""
        return max(0.0, self.pass_ms(1, context_tokens) + (self._gap.mean or 0.0))

    @property
    def queue_ms(self) -> float:
        """Before a pass, of a request that waits for none of ours."""
        return self._queue.mean or 0.0

    def pass_ms(self, num_rows: int, context_tokens: int) -> float:
        """A pass with so many rows of ours: as seen, else from the nearest seen and the fit's difference."""
        seen = self._passes.get(num_rows)
        if seen is not None and seen.mean is not None:
            return seen.mean
        fitted = self.fitted_ms(num_rows, context_tokens)
        if not self._passes:
            return fitted
        nearest = min(list(self._passes), key=lambda rows: abs(rows - num_rows))  # a copy: another generation may add one
        mean = self._passes[nearest].mean or 0.0
        return max(mean / 2, mean + fitted - self.fitted_ms(nearest, context_tokens))

    @property
    def stream_deviation_ms(self) -> float:
        """Mean deviation between two tokens of a stream."""
        return self._streamed.deviation


class DeviceEstimate:
    """Times of the device's own models."""

    def __init__(self) -> None:
        self._step = Smoothed()
        self._front_row = Smoothed()
        self._prefill = Smoothed()

    def drafted(self, elapsed_ms: float) -> None:
        """A single step took this long."""
        self._step.add(elapsed_ms)

    def prefilled(self, num_tokens: int, elapsed_ms: float) -> None:
        """The draft model read so many tokens at once."""
        if num_tokens >= FEWEST_PREFILLED:
            self._prefill.add(elapsed_ms / num_tokens)

    def fronted(self, num_rows: int, elapsed_ms: float) -> None:
        """The front took this long for so many rows."""
        if num_rows:
            self._front_row.add(elapsed_ms / num_rows)

    @property
    def step_ms(self) -> float | None:
        """One drafted token; None: not seen yet."""
        return self._step.mean

    @property
    def prefill_ms(self) -> float | None:
        """A token of a prompt in the draft model; None: not seen yet."""
        return self._prefill.mean

    @property
    def front_row_ms(self) -> float | None:
        """One token through the front of a split target; None: not seen yet."""
        return self._front_row.mean


class AcceptanceEstimate:
    """How probable it is that the first i tokens of a draft are all accepted, with forgetting."""

    def __init__(self) -> None:
        self._right = [0.0] * MAX_POSITION
        self._tried = [0.0] * MAX_POSITION
        self._usual: float | None = None
        self._num_low = 0

    def add(self, position: int, accepted: bool) -> None:
        """The token at `position` of a draft (0: the first), all before it accepted, was accepted or not."""
        keep = math.exp(-1 / MEMORY_TOKENS)
        self._right = [count * keep for count in self._right]
        self._tried = [count * keep for count in self._tried]
        at = min(position, MAX_POSITION - 1)
        self._tried[at] += 1
        self._right[at] += accepted
        rate = self.rate
        if self._usual is None:
            self._usual = rate if sum(self._tried) >= ALARM_TOKENS else None
            return
        self._num_low = self._num_low + 1 if rate < ALARM_SHARE * self._usual else 0
        self._usual += (rate - self._usual) / USUAL_TOKENS

    @property
    def rate(self) -> float:
        """Over all positions."""
        return (sum(self._right) + PRIOR_ACCEPTANCE * PRIOR_WEIGHT) / (sum(self._tried) + PRIOR_WEIGHT)

    @property
    def alarm(self) -> bool:
        """Whether the acceptance has dropped for good."""
        return self._num_low >= ALARM_TOKENS

    def survival(self, num_draft_tokens: int) -> list[float]:
        """S_1..S_K."""
        pooled = self.rate
        survival, product = [], 1.0
        for i in range(num_draft_tokens):
            at = min(i, MAX_POSITION - 1)
            product *= (self._right[at] + pooled * POOLED_WEIGHT) / (self._tried[at] + POOLED_WEIGHT)
            survival.append(product)
        return survival


@dataclass(slots=True)
class Estimates:
    """All of it, for one service."""

    link: LinkEstimate
    cloud: CloudEstimate
    device: DeviceEstimate
    acceptance: AcceptanceEstimate
    _lock: RLock = field(default_factory=RLock, repr=False)  # generations in mode `cloud` run side by side

    def answered(self, cost: CallCost, load: ServiceLoad | None, now_s: float, *, was_idle: bool) -> None:
        """A request's first answer came, with the service's load if it was told."""
        with self._lock:
            self.link.add(cost.elapsed_ms - cost.queue_ms - cost.compute_ms, cost.uplink_bytes, now_s, was_idle=was_idle)
            if load is not None:
                self.cloud.tell(load)

    def judged(
        self, num_rows: int, cost: CallCost, load: ServiceLoad | None, now_s: float, *, was_idle: bool, conditional: bool
    ) -> None:
        """A verdict came, of a pass over so many rows of ours. A conditional request's queue is the request before it."""
        with self._lock:
            self.answered(cost, load, now_s, was_idle=was_idle)
            self.cloud.verified(num_rows, cost, conditional=conditional)

    def streamed(self, cost: CallCost, load: ServiceLoad | None, now_s: float, *, was_idle: bool) -> None:
        """A token of a stream came."""
        with self._lock:
            if cost.uplink_bytes:
                self.answered(cost, load, now_s, was_idle=was_idle)
            else:
                self.link.heard(now_s)
                self.cloud.streamed(cost)

    def of_another_target(self) -> Estimates:
        """For a target whose passes and choices are others, on the same device and link."""
        return Estimates(self.link, CloudEstimate(), self.device, AcceptanceEstimate())

    @classmethod
    def unknown(cls) -> Estimates:
        """Before the first observation."""
        return cls(LinkEstimate(), CloudEstimate(), DeviceEstimate(), AcceptanceEstimate())
