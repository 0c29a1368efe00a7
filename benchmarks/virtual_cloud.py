"""A verification service in virtual time: one session of it to the token, the others as rows in its passes."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from simpy import Environment
from virtual_link import later
from virtual_text import WRONG, Text

from edgecloud.tokens import common_prefix
from edgecloud.types import ServiceLoad


class PassTimes:
    """What a pass takes: measured numbers of rows, straight lines between them, and so much a token of context.

    Args:
        ms_by_rows: measured with `rows_context` tokens before.
        per_context_token_ms: for every token more or fewer.
    """

    def __init__(self, ms_by_rows: Mapping[int, float], per_context_token_ms: float = 0.0, rows_context: int = 0) -> None:
        self._rows = sorted(ms_by_rows)
        self._ms = [ms_by_rows[rows] for rows in self._rows]
        self._per_context_token_ms = per_context_token_ms
        self._rows_context = rows_context
        self._cache: dict[int, float] = {}
        n = [rows for rows in self._rows if rows <= 20]
        at = [ms_by_rows[rows] for rows in n]
        mean_n, mean_ms = sum(n) / len(n), sum(at) / len(at)
        square = sum((x - mean_n) ** 2 for x in n) or 1.0
        slope = max(0.0, sum((x - mean_n) * (y - mean_ms) for x, y in zip(n, at, strict=True)) / square)
        base = max(0.0, mean_ms - slope * mean_n - per_context_token_ms * rows_context)
        self.load = ServiceLoad(1, 0, 1, 1, base, slope, per_context_token_ms)  # with the line that the service tells of

    def of(self, num_rows: int, num_context: int) -> float:
        """Milliseconds."""
        ms = self._cache.get(num_rows)
        if ms is None:
            ms = self._cache[num_rows] = self._of_rows(num_rows)
        return ms + self._per_context_token_ms * (num_context - self._rows_context)

    def _of_rows(self, num_rows: int) -> float:
        rows, ms = self._rows, self._ms
        if len(rows) == 1:
            return ms[0]
        at = min(max(bisect_right(rows, num_rows), 1), len(rows) - 1)
        slope = (ms[at] - ms[at - 1]) / (rows[at] - rows[at - 1])
        return max(ms[0], ms[at - 1] + slope * (num_rows - rows[at - 1]))


@dataclass(slots=True)
class Company:
    """Other sessions: so many, with so many rows each in every pass."""

    num_sessions: int = 0
    rows_each: int = 1


@dataclass(slots=True)
class Job:
    """A request: a stream if `max_new_tokens` is above 1."""

    call: int
    session: int
    start: int  # context that the session has, as the client thinks
    tokens: list[int]
    draft_ids: list[int]
    max_new_tokens: int
    reply: Callable[[Answer], None]
    arrived_s: float = 0.0
    num_emitted: int = 0
    cancelled: bool = False


class Extended(NamedTuple):
    """A verdict, or a token of a stream."""

    num_accepted: int
    next_token_id: int
    queue_ms: float
    compute_ms: float
    target_passes: float
    load: ServiceLoad
    last: bool


@dataclass(frozen=True, slots=True)
class Refused:
    """The session lacks the context."""

    cached_length: int


Answer = Extended | Refused


class VirtualCloud:
    """One request of the session at a time, in the order in which they come; as cloud/engine.py does it.

    Args:
        text: what the target says.
        times: of a pass.
        company: the other sessions at a time. With any, pass follows pass.
        overhead_ms: of the service around the engine, a request.
        noise: relative deviation of a pass.
    """

    def __init__(
        self,
        env: Environment,
        text: Text,
        times: PassTimes,
        company: Callable[[float], Company] | None = None,
        overhead_ms: float = 0.0,
        noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        self._env = env
        self.text = text
        self._times = times
        self._company = company or (lambda _: Company())
        self._overhead_s = overhead_ms / 1e3
        self._noise = noise
        self._random = Random(seed)
        self._tokens: list[int] | None = None  # of the session; None: not known
        self._cached = 0  # of them, those whose keys and values are there
        self._shared: list[int] = []
        self._job: Job | None = None
        self._deferred: deque[Job] = deque()
        self._free_s = 0.0  # when the last pass ended
        self._stops: frozenset[int] = frozenset()
        self._epoch = 0
        self.session = 0  # what comes late for the one before is for nobody
        self.num_passes = 0.0  # of this session, a pass shared by n counts 1/n

    def open(self, text: Text, stop_token_ids: frozenset[int] = frozenset()) -> None:
        """Another generation: another session."""
        self.text, self._stops = text, stop_token_ids
        self.session += 1
        self.restart()

    def know(self, tokens: list[int]) -> None:
        """Their keys and values are there, of another session with the same prompt."""
        self._shared = list(tokens)

    def restart(self) -> None:
        """Forget the session and everything under way."""
        self._tokens, self._cached, self._job = None, 0, None
        self._deferred.clear()
        self._epoch += 1

    def submit(self, job: Job) -> None:
        """A request has arrived."""
        if job.session != self.session:
            return
        job.arrived_s = self._env.now
        if self._overhead_s:
            later(self._env, self._overhead_s, self._let_in, job, self._epoch)
        else:
            self._admit(job)

    def cancel(self, session: int, call: int) -> None:
        """The client does not wait for it any more: it ends before the next pass."""
        if session == self.session:
            later(self._env, self._overhead_s, self._cancel, call)

    def _cancel(self, call: int) -> None:
        if self._job is not None and self._job.call == call:
            self._job.cancelled = True
        for job in [job for job in self._deferred if job.call == call]:
            self._deferred.remove(job)

    def cancel_all(self) -> None:
        """The connection broke."""
        self._deferred.clear()
        if self._job is not None:
            self._job.cancelled = True

    def _let_in(self, job: Job, epoch: int) -> None:
        if epoch == self._epoch:
            self._admit(job)

    def _admit(self, job: Job) -> None:
        if self._job is not None:
            self._deferred.append(job)
            return
        known = self._tokens
        if (known is None and job.start) or (known is not None and known[: job.start] != job.tokens[: job.start]):
            job.reply(Refused(0 if known is None or job.start <= len(known) else len(known)))
            return
        tokens = job.tokens + job.draft_ids
        same = 0 if known is None else common_prefix(known, tokens)
        same, cached = (common_prefix(self._shared, tokens),) * 2 if known is None else (same, self._cached)
        self._cached = min(cached, same, len(job.tokens) - 1)
        self._tokens = tokens
        self._job = job
        self._plan()

    def _plan(self) -> None:
        """When the next pass begins and ends."""
        job, now_s = self._job, self._env.now
        assert job is not None
        assert self._tokens is not None
        company = self._company(now_s)
        rows = company.num_sessions * company.rows_each
        wait_s = 0.0
        if rows and now_s > self._free_s:
            cycle_s = self._times.of(rows, len(self._tokens)) / 1e3
            wait_s = math.ceil((now_s - self._free_s) / cycle_s) * cycle_s + self._free_s - now_s
        pass_s = self._times.of(rows + len(self._tokens) - self._cached, len(self._tokens)) / 1e3
        if self._noise:
            pass_s *= max(0.5, self._random.gauss(1.0, self._noise))
        later(self._env, wait_s, self._begin, job, pass_s, 1 / (company.num_sessions + 1), self._epoch)

    def _begin(self, job: Job, pass_s: float, share: float, epoch: int) -> None:
        if epoch != self._epoch:
            return
        if job.cancelled:
            self._finish()
            return
        later(self._env, pass_s, self._end, job, pass_s, share, epoch)

    def _end(self, job: Job, pass_s: float, share: float, epoch: int) -> None:
        if epoch != self._epoch:
            return
        assert self._tokens is not None
        truth, context, draft = self.text.tokens, len(job.tokens), job.draft_ids
        assert job.tokens[-1] < WRONG, "a pass over a context that is no text of the target's"
        num_accepted = common_prefix(draft, truth[context : context + len(draft)])
        cached = context + num_accepted
        token = truth[cached]
        self._tokens[cached:] = [token]
        self._cached = cached
        self._free_s = now_s = self._env.now
        self.num_passes += share
        job.num_emitted += 1
        last = job.num_emitted >= job.max_new_tokens or token in self._stops or cached + 1 >= len(truth)
        queue_ms = (now_s - job.arrived_s - pass_s) * 1e3
        answer = Extended(num_accepted, token, max(0.0, queue_ms), pass_s * 1e3, share, self._times.load, last)
        if not job.cancelled:
            job.reply(answer)
        if last or job.cancelled:
            self._finish()
            return
        job.tokens, job.draft_ids, job.arrived_s = list(self._tokens), [], now_s
        self._plan()

    def _finish(self) -> None:
        self._job = None
        while self._deferred and not self._busy:
            self._admit(self._deferred.popleft())

    @property
    def _busy(self) -> bool:
        return self._job is not None
