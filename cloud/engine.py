"""The engine: owns target, cache and sessions, and does one thing: extend sessions, many in a pass.

`step` is the whole life of a pass. Everything happens on one thread, the caller's; engine_loop.py gives it one.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import groupby

from edgecloud.cloud.attention import KVPool, Rows, pack
from edgecloud.cloud.batcher import Batcher, Job, Share
from edgecloud.cloud.boundary import check_rows, decoded
from edgecloud.cloud.model import TargetModel
from edgecloud.cloud.pages import PagePool
from edgecloud.cloud.pass_cost import PassCostFit
from edgecloud.cloud.prompt_room import STRETCH
from edgecloud.cloud.sessions import IDS, Kind, SessionStore
from edgecloud.cloud.work import Answer, Boundary, EngineLoad, Extend, Extended, Failed, Invalid, Overloaded, Refused
from edgecloud.errors import ConfigError
from edgecloud.kernels.backend import backend_for
from edgecloud.kernels.choice_torch import ChoiceRow
from edgecloud.rpc.codec import row_keys

logger = logging.getLogger(__name__)

RETRY_AFTER_MS = 500
# A prefix of fewer tokens is computed rather than shared: it would split the context in two runs, and every pass that reads
# two pays more than one short prefill.
FEWEST_SHARED = 128
IDLE_CHECK_S = 1.0
ROWS_SHARE = 8  # rows of boundary tensors may take a byte beside so many of the cache: a row is smaller than its keys and values
CANCELLED_GRACE_S = 10.0  # a client that went away may come back this long before its session is dropped


class Engine:
    """A target model with a paged cache of `cache_bytes`.

    `stretch`: how much longer prompts may make the pass of others; infinite where nobody waits for a single answer.

    Raises:
        ConfigError: the cache would not hold a single page.
    """

    def __init__(
        self,
        model: TargetModel,
        *,
        cache_bytes: int = 1 << 30,
        page_size: int = 16,
        max_rows: int = 512,
        max_sessions: int = 1024,
        idle_s: float = 300.0,
        fewest_shared: int = FEWEST_SHARED,
        stretch: float = STRETCH,
    ) -> None:
        num_pages = cache_bytes // (page_size * model.bytes_per_token)
        if num_pages < 1:
            raise ConfigError(
                f"a cache of {cache_bytes} bytes holds no page of {page_size} tokens at {model.bytes_per_token} bytes a token; "
                f"give it more"
            )
        self._model = model
        self._kv = KVPool(num_pages * page_size)
        tile = backend_for(model.device.type).tile
        self._pool = PagePool(num_pages, page_size, self._kv.copy, max(1, tile // page_size))
        self.max_context_tokens = min(model.max_context_tokens, num_pages * page_size)
        max_row_bytes = max(cache_bytes // ROWS_SHARE, self.max_context_tokens * 4 * model.width)  # one session's at least
        self._sessions = SessionStore(self._pool, max_sessions, idle_s, max_row_bytes)
        self._fit = PassCostFit()
        self._batcher = Batcher(self._sessions, max_rows, self._fit, fewest_shared, stretch)
        self._jobs: list[Job] = []  # admitted: one a session
        self._deferred: dict[bytes, deque[Job]] = {}  # a session does one thing at a time, the rest waits here
        self._next_idle_check_s = 0.0

    def submit(self, number: int, request: Extend, answer: Callable[[Answer], None]) -> None:
        """Take a request in. `answer` is called at once or in a later `step`: once for a verify, once a token for a decode."""
        self._admit(Job(number, request, answer, time.monotonic(), draft_ids=request.draft_ids))

    def cancel(self, number: int) -> None:
        """Nobody waits for this request: it ends before the next pass, without an answer."""
        for job in self._jobs:
            if job.number == number:
                job.cancelled = True
        for deferred in self._deferred.values():  # at once: they could be sent faster than their session gets on
            for job in [job for job in deferred if job.number == number]:
                deferred.remove(job)

    def release(self, session_id: bytes) -> None:
        """Forget a session; if it is busy, after its requests."""
        session = self._sessions.get(session_id)
        if session is not None and session.busy:
            session.released = True  # its last job lets it go
        else:
            self._sessions.forget(session_id)

    @property
    def has_work(self) -> bool:
        """Whether the next step makes a pass."""
        return bool(self._jobs)

    @property
    def idle_ms(self) -> float:
        """How long there is nothing to do unless a request comes."""
        return 0.0 if self._jobs else math.inf

    @property
    def load(self) -> EngineLoad:
        """As it is between two passes."""
        untouched = sum(job.num_emitted == 0 and job.target_passes == 0 for job in self._jobs)
        waiting = untouched + sum(len(jobs) for jobs in self._deferred.values())
        return EngineLoad(len(self._sessions), waiting, self._pool.num_free, self._pool.num_pages, self._fit.cost)

    def step(self) -> None:
        """One pass: plan, pack, forward, choose, advance."""
        now = time.monotonic()
        if now >= self._next_idle_check_s:
            self._sessions.forget_idle(now)
            self._next_idle_check_s = now + IDLE_CHECK_S
        for job in [job for job in self._jobs if job.cancelled]:
            self._sessions.expire_soon(job.open_session, now + CANCELLED_GRACE_S)
            self._finish(job)
        plan = self._batcher.plan(self._jobs, now)
        refused = self._refuse_over_quota(plan.over_quota)
        shares = sorted((share for share in plan.shares if share.job not in refused), key=lambda share: share.kind)
        if plan.starved and not plan.shares and not refused:  # nobody can go on: the youngest makes room
            self._finish(plan.starved[-1], Overloaded("the key-value cache is full", RETRY_AFTER_MS))
        if not shares:
            return
        started = time.perf_counter()
        try:
            batch = pack(self._parts(shares), self._kv, self._model.device, bitwise=self._model.exact == "bitwise")
            logits = self._model.forward(batch)
            rows = [row for share in shares for row in _choice_rows(share)]
            choices = backend_for(logits.device.type).choose(logits, rows)
        except Exception as error:  # a broken pass must not take the other sessions down
            logger.exception("a pass over %d requests failed", len(shares))
            for share in shares:
                share.job.open_session.table.crop_to(share.start)
                self._finish(share.job, Failed(f"{type(error).__name__}: {error}"))
            return
        compute_ms = (time.perf_counter() - started) * 1e3
        num_layers = self._model.num_layers
        self._batcher.observe(shares, compute_ms * num_layers / (num_layers - shares[0].kind.cut))  # as if it had been whole
        at = 0
        for share in shares:
            share.job.choices += choices[at : at + share.num_choices]
            at += share.num_choices
            share.job.compute_ms += compute_ms
            share.job.target_passes += 1 / len(shares)
            session = share.job.open_session
            session.table.length = share.stop
            self._advance(share.job)
            session.table.publish(session.tokens)

    def _admit(self, job: Job) -> None:
        """Bring the session's tokens to what the request says, or answer at once."""
        request = job.request
        known = self._sessions.get(request.session_id)
        if known is not None and known.busy:
            self._deferred.setdefault(request.session_id, deque()).append(job)
            return
        boundary = request.boundary
        kind = IDS if boundary is None else Kind(boundary.cut, boundary.codec, boundary.row_bytes)
        if request.context_start:
            if known is None or known.kind != kind:
                job.answer(Refused(0))
                return
            if not known.vouches_for(request.context_start, request.context_hash):
                job.answer(Refused(len(known.tokens) if request.context_start > len(known.tokens) else 0))
                return
            if request.assumed_id is not None and not known.has_chosen(request.assumed_id, request.context_start):
                job.answer(Refused(len(known.tokens)))
                return
        if boundary is not None and (answer := self._unfit(request, boundary)) is not None:
            job.answer(answer)
            return
        session = self._sessions.open(request.session_id, time.monotonic(), request.tenant)
        if session is None:
            job.answer(Overloaded("every session is busy", RETRY_AFTER_MS))
            return
        session.busy = True
        job.session = session
        job.context_length = request.context_start + request.num_new_context
        if boundary is None:
            session.replace_from(request.context_start, request.context_ids + request.draft_ids)
        else:
            keys = row_keys(boundary.rows, boundary.row_bytes, boundary.cut, boundary.codec)
            session.replace_from(request.context_start, keys, kind, boundary.rows)
        session.table.crop_to(job.context_length - 1)  # the logits of the context's last token are needed
        self._jobs.append(job)

    def _unfit(self, request: Extend, boundary: Boundary) -> Answer | None:
        """The answer to rows that cannot be computed on, or that there is no room to keep; None: they can be taken in."""
        try:
            check_rows(boundary, self._model.width, self._model.dtype)
        except ConfigError as error:
            return Invalid(str(error))
        num_bytes = request.context_start * boundary.row_bytes + len(boundary.rows)
        if not self._sessions.make_room_for_rows(request.session_id, num_bytes):
            return Overloaded("the rows of busy sessions take all the room that there is for them", RETRY_AFTER_MS)
        return None

    def _parts(self, shares: Sequence[Share]) -> list[Rows]:
        """What a pass computes, with encoded rows decoded."""
        parts: list[Rows] = []
        for kind, alike in groupby(shares, key=lambda share: share.kind):
            group = list(alike)
            rows = [share.rows for share in group]
            if kind.cut:
                encoded = [share.job.open_session.rows_between(share.start, share.stop) for share in group]
                each = decoded(encoded, kind.codec, self._model.width, self._model.dtype, self._model.device)
                rows = [part._replace(hidden=hidden) for part, hidden in zip(rows, each, strict=True)]
            parts += rows
        return parts

    def _refuse_over_quota(self, over_quota: list[Job]) -> list[Job]:
        """Of each tenant that could not go on, the request that came last makes room for the others."""
        refused = []
        for tenant in {job.request.tenant for job in over_quota}:
            theirs = [job for job in self._jobs if job.request.tenant == tenant]
            job = max((job for job in theirs if job in over_quota or job.open_session.table.num_pages), key=lambda job: job.number)
            job.open_session.table.release()
            self._finish(job, Overloaded("this tenant's sessions at work hold all of its max_cache_tokens", RETRY_AFTER_MS))
            refused.append(job)
        return refused

    def _finish(self, job: Job, answer: Answer | None = None) -> None:
        """Take a job off the list, answer it, and let the session's next one in."""
        session = job.open_session
        self._jobs.remove(job)
        session.busy = False
        if answer is not None:
            session.last_used_s = time.monotonic()
            job.answer(answer)
        waiting = self._deferred.pop(session.session_id, None)
        while waiting and not session.busy:
            self._admit(waiting.popleft())
        if waiting:
            self._deferred[session.session_id] = waiting
        elif session.released and not session.busy:
            self._sessions.forget(session.session_id)

    def _advance(self, job: Job) -> None:
        """After a pass: answer, go on decoding, or wait for the next chunk."""
        session = job.open_session
        if len(job.choices) < len(job.draft_ids) + 1:
            return
        num_accepted = 0
        while num_accepted < len(job.draft_ids) and job.choices[num_accepted] == job.draft_ids[num_accepted]:
            num_accepted += 1
        token = job.choices[num_accepted]
        cached = job.context_length + num_accepted
        session.crop_to(cached)
        if session.kind.cut:  # the next token's row is for the device to compute
            session.chosen = token
        else:
            session.tokens.append(token)
        job.num_emitted += 1
        request = job.request
        full = len(session.tokens) > self.max_context_tokens  # the last token needs no place: no pass follows it
        last = job.num_emitted >= request.max_new_tokens or token in request.stop_token_ids or full
        now = time.monotonic()
        queue_ms = max(0.0, (now - job.arrived_s) * 1e3 - job.compute_ms)
        answer = Extended(num_accepted, token, len(session.tokens), queue_ms, job.compute_ms, job.target_passes, last)
        if last:
            self._finish(job, answer)
            return
        job.answer(answer)
        job.context_length = len(session.tokens)
        job.draft_ids = ()
        job.choices = []
        job.is_prompt = False
        job.arrived_s, job.compute_ms, job.target_passes = now, 0.0, 0.0


def _choice_rows(share: Share) -> list[ChoiceRow]:
    tokens, sampling = share.job.open_session.tokens, share.job.request.sampling
    positions = range(share.stop - share.num_choices, share.stop)
    if share.kind.cut:
        return [ChoiceRow((), sampling, num_unknown=position + 1) for position in positions]
    return [ChoiceRow(tokens[: position + 1], sampling) for position in positions]
