"""Device and cloud at work on one generation, in real time: the pilot decides, a courier calls, a thread drafts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from queue import Empty, SimpleQueue

from edgecloud.edge.courier import Courier, Letter
from edgecloud.edge.estimates import Estimates
from edgecloud.edge.happenings import Action, Cancel, Decode, Draft, Drafted, Failed, Happening, Hedge, Meet, Met, Tick, Verify
from edgecloud.edge.pilot import Pilot
from edgecloud.edge.replicas import RemoteSession
from edgecloud.errors import CloudError, DeadlineExceededError
from edgecloud.protocols import Drafter, ScoringDrafter
from edgecloud.sampling import SamplingSettings
from edgecloud.types import Step


def collaborate(
    pilot: Pilot,
    drafter: Drafter,
    session: RemoteSession,
    sampling: SamplingSettings,
    stop_token_ids: Collection[int],
    estimates: Estimates,
    meet: Callable[[], int],
    new_courier: Callable[..., Courier] = Courier,
    scorer: ScoringDrafter | None = None,
) -> Iterator[Step]:
    """Yield what the pilot has to show, until the generation is whole.

    Args:
        pilot: not yet begun.
        drafter: used on one thread of this function's own.
        session: its `deadline_s` ends the generation.
        sampling: how tokens are chosen, on both sides.
        stop_token_ids: ends of the answer.
        estimates: fed by what happens.
        meet: makes the handshake; returns the longest draft that the service takes.
        new_courier: makes who carries out calls, from Courier's arguments.
        scorer: who guesses in place of the drafter, where a pilot has to know how sure a guess is.

    Raises:
        CloudError: as the pilot and `meet` do; DeadlineExceededError: the session's deadline passed.
    """
    inbox: SimpleQueue[Letter] = SimpleQueue()
    courier = new_courier(session, sampling, stop_token_ids, estimates, inbox.put)

    def guess(tokens: list[int]) -> tuple[int, float]:
        if scorer is not None:
            return scorer.guess(tokens, sampling)
        [token_id] = drafter.draft(tokens, 1, sampling, stop_token_ids)
        return token_id, 0.0

    device = _Device(guess, estimates, inbox.put)
    try:
        pilot.begin(time.monotonic())
        while True:
            while pilot.actions:
                _carry_out(pilot.actions.pop(0), courier, device, meet, inbox.put)
            while pilot.steps:
                yield pilot.steps.pop(0)
            if pilot.finished:
                return
            if session.deadline_s is not None and time.monotonic() >= session.deadline_s:
                if pilot.whole:
                    return
                raise DeadlineExceededError("the time allowed for this generation has passed; allow more or ask for less")
            happening = _next(inbox, pilot.wake_s, session.deadline_s)
            if happening is not None:
                pilot.take(happening, time.monotonic())
    finally:
        courier.close()
        device.close()


def _carry_out(action: Action, courier: Courier, device: _Device, meet: Callable[[], int], post: Callable[[Letter], None]) -> None:
    match action:
        case Draft():
            device.draft(action)
        case Verify():
            courier.verify(action)
        case Decode():
            courier.decode(action)
        case Hedge(call):
            courier.hedge(call)
        case Cancel():
            courier.cancel(action)
        case Meet():
            threading.Thread(target=_meet, args=(meet, post), name="handshake", daemon=True).start()


def _meet(meet: Callable[[], int], post: Callable[[Letter], None]) -> None:
    try:
        max_draft_tokens = meet()
    except CloudError as error:
        post(partial(Failed, None, error))
    except BaseException as error:  # not the cloud's fault: it ends the generation, on its own thread
        post(partial(_raise, error))
    else:
        post(lambda: Met(max_draft_tokens))


def _raise(error: BaseException) -> Happening:
    raise error


def _next(inbox: SimpleQueue[Letter], wake_s: float | None, deadline_s: float | None) -> Happening | None:
    times = [at for at in (wake_s, deadline_s) if at is not None]
    wait_s = max(0.0, min(times) - time.monotonic()) if times else None
    try:
        return inbox.get(timeout=wait_s)()
    except Empty:
        return Tick()


class _Device:
    """The drafter, on a thread of its own, so that a verdict need not wait for a step."""

    def __init__(
        self,
        guess: Callable[[list[int]], tuple[int, float]],
        estimates: Estimates,
        post: Callable[[Letter], None],
    ) -> None:
        self._guess = guess
        self._estimates = estimates
        self._post = post
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="draft")
        self._last: tuple[int, int] | None = None  # version and number of tokens of the draft before

    def draft(self, order: Draft) -> None:
        """Guess a token."""
        one_step = self._last == (order.version, len(order.tokens) - 1)
        self._last = order.version, len(order.tokens)
        started = time.perf_counter()

        def drafted(done: Future[tuple[int, float]]) -> None:
            elapsed_ms = (time.perf_counter() - started) * 1e3
            self._post(lambda: self._take(order, done, elapsed_ms if one_step else None))

        self._thread.submit(self._guess, order.tokens).add_done_callback(drafted)

    def close(self) -> None:
        """After the step under way."""
        self._thread.shutdown(cancel_futures=True)

    def _take(self, order: Draft, done: Future[tuple[int, float]], elapsed_ms: float | None) -> Happening:
        token_id, score = done.result()
        if elapsed_ms is not None:
            self._estimates.device.drafted(elapsed_ms)
        return Drafted(order.version, token_id, score)
