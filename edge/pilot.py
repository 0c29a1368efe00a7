"""One generation on the device as a state machine: it is told what happened, and says what to do and what to show.

No clock, no thread, no network: the same machine runs over gRPC, in virtual time, and through every order of events in a test.

    final tokens   | tail: the device's guesses            |
    ...............|  draft 1  |b|  draft 2  |b|  not sent  |
                   ^ flight 1    ^ flight 2

A flight is a draft on its way to the verdict. The next one leaves before that has come: its context is what the device
guesses the verdict to be (all accepted, then the bonus token b). A wrong guess costs nothing but the device's energy, for the
service refuses a context that it does not have without a pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from edgecloud.edge.happenings import (
    Action,
    Cancel,
    Decode,
    Draft,
    Drafted,
    Failed,
    Happening,
    Hedge,
    Judged,
    Meet,
    Met,
    Streamed,
    Tick,
    Verify,
)
from edgecloud.edge.plan import Plan, Planner
from edgecloud.edge.retry import Retry
from edgecloud.errors import CloudError, CloudOverloadedError, CloudUnavailableError, ContextMissingError, DeadlineExceededError
from edgecloud.tokens import common_prefix
from edgecloud.types import CallCost, CloudBack, CloudLost, Guess, LossPolicy, Mode, ModeChanged, Round, Step, Verdict

TICK_S = 1e-6  # clocks are told apart to this: rounding must not wake the pilot again and again at one moment


class Patience(Protocol):
    """When an answer is late, by what is known of link and cloud. Seconds."""

    def overdue_s(self, num_new_tokens: int, streaming: bool) -> float:
        """After this time the answer would nearly always have come."""
        ...

    def lost_s(self, num_new_tokens: int, streaming: bool) -> float:
        """After this time the cloud counts as lost."""
        ...


class Tally(Protocol):
    """Counts how good the guesses are."""

    def add(self, position: int, accepted: bool) -> None:
        """The guess at `position`, counted from the last wrong one, was the target's choice, or was not."""
        ...


@dataclass(slots=True)
class Flight:
    """A draft on its way to the verdict."""

    call: int
    start: int  # tokens before the draft
    draft_ids: list[int]
    sent_s: float
    mode: Mode
    verdict: Verdict | None = None  # it has come before the verdict on which it depends
    hedged: bool = False

    @property
    def horizon(self) -> int:
        """Tokens when all is accepted, the bonus token included."""
        return self.start + len(self.draft_ids) + 1


@dataclass(slots=True)
class _Stream:
    call: int
    heard_s: float
    num_heard: int = 0
    hedged: bool = False


class Pilot:
    """Flies one generation.

    After every `take`, `actions` are to be carried out and `steps` to be shown, both in order; and `take(Tick())` is to be
    called at `wake_s` at the latest.

    Args:
        prompt: tokens before the answer.
        planner: says what mode and what draft length.
        retry: bounds of repeating what failed.
        patience: says when an answer is late.
        tally: is told how every guess turned out.
        max_new_tokens, stop_token_ids: where the answer ends.
        on_loss: without the cloud the device goes on with guesses (`continue`), or not (`wait`), or the generation ends (`fail`).
        max_provisional_tokens: guesses at a time while the cloud is late.
        met: the handshake has been made before, with this longest draft; None: it has not.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        planner: Planner,
        retry: Retry,
        patience: Patience,
        tally: Tally,
        *,
        max_new_tokens: int,
        stop_token_ids: Collection[int],
        on_loss: LossPolicy = "continue",
        max_provisional_tokens: int = 256,
        met: int | None = None,
    ) -> None:
        self.tokens = list(prompt)  # prompt and final tokens
        self.tail: list[int] = []  # the device's guesses, behind them
        self.actions: list[Action] = []
        self.steps: list[Step] = []
        self.finished = False
        self.whole = False  # the answer is there, and only what is learned from it is waited for
        self.wake_s: float | None = None
        self._planner = planner
        self._retry = retry
        self._patience = patience
        self._tally = tally
        self._start, self._end = len(prompt), len(prompt) + max_new_tokens
        self._stops = frozenset(stop_token_ids)
        self._on_loss = on_loss
        self._max_provisional = max_provisional_tokens
        self._max_draft = met or 0
        self._met, self._meeting = met is not None, False
        self._calls = itertools.count()
        self._flights: list[Flight] = []  # in the order in which they left; only such as can still come true
        self._stream: _Stream | None = None
        self._drafting = False
        self._version = 0  # of the tail: a guess made on an earlier one is void
        self._num_right = 0  # guesses in a row
        self._opened = False  # the target has read the prompt
        self._flown: Mode = "speculative"  # of the latest flight
        self._may_chain = True  # no flight was refused since the last verdict
        self._resting_until_s: float | None = None
        self._lost = False
        self._backlog = False  # guesses piled up without the cloud: all of them go into the next flight
        self._offline = False  # for the rest of this generation
        self._limits: tuple[int, float, float] | None = None  # a call, and after how many seconds it is overdue, and lost

    def begin(self, now_s: float) -> None:
        """The first actions."""
        self._decide(now_s)

    def take(self, happening: Happening, now_s: float) -> None:
        """Something happened.

        Raises:
            CloudError: what failed cannot be mended by asking again, or was asked often enough.
        """
        if self.finished:
            return
        if not isinstance(happening, Drafted):  # a guess changes nothing in what is known of link and cloud
            self._limits = None
        match happening:
            case Drafted():
                self._take_guess(happening)
            case Met(max_draft_tokens):
                self._met, self._meeting, self._max_draft = True, False, max_draft_tokens
                self._heard()
            case Judged(call, verdict):
                self._take_verdict(call, verdict)
            case Streamed(call, start, token_ids, cost):
                self._take_streamed(call, start, token_ids, cost, now_s)
            case Failed(call, error):
                self._take_failure(call, error, now_s)
            case Tick():
                pass
        if not self.finished:
            self._decide(now_s)

    # What comes in

    def _take_guess(self, drafted: Drafted) -> None:
        self._drafting = False
        if drafted.version != self._version:
            return
        if self._offline:
            self._end_with([drafted.token_id])
            return
        self._keep_guess(drafted)

    def _keep_guess(self, drafted: Drafted) -> None:
        self.tail.append(drafted.token_id)
        self.steps.append(Guess([drafted.token_id]))

    def _take_verdict(self, call: int, verdict: Verdict) -> None:
        self._heard()
        flight = next((flight for flight in self._flights if flight.call == call), None)
        if flight is None:  # nobody waits for it; what it took is counted all the same
            self.steps.append(Round([], self._flown, "final", cost=verdict.cost))
            return
        flight.verdict = verdict
        while self._flights and (first := self._flights[0]).verdict is not None and not self.finished:
            self._flights.pop(0)
            self._may_chain = True
            self._land(first, first.verdict)

    def _land(self, flight: Flight, verdict: Verdict) -> None:
        """The verdict on the first flight."""
        ids = [*flight.draft_ids[: verdict.num_accepted], verdict.next_token_id]
        self._settle(flight.start, ids, flight.mode, verdict.cost, len(flight.draft_ids), verdict.num_accepted)

    def _take_streamed(self, call: int, start: int, token_ids: list[int], cost: CallCost, now_s: float) -> None:
        self._heard()
        stream = self._stream
        if stream is None or stream.call != call:
            self.steps.append(Round([], "cloud", "final", cost=cost))
            return
        if start > len(self.tokens):  # tokens are missing in between: ask again from here
            self._close_stream()
            return
        stream.heard_s = now_s
        stream.num_heard += 1
        self._settle(start, token_ids, "cloud", cost)

    def _take_failure(self, call: int | None, error: CloudError, now_s: float) -> None:
        stream = self._stream
        if call is None:
            self._meeting = False
        elif not self._forget(call):
            return
        if stream is not None and stream.call == call and stream.num_heard and isinstance(error, CloudUnavailableError):
            return  # it got on and broke, at the time limit of a call for one: asked for again at once; that may fail
        if isinstance(error, ContextMissingError):
            self._take_refusal(call, error, now_s)
            return
        if not isinstance(error, CloudUnavailableError | CloudOverloadedError):
            raise error
        for flight in list(self._flights):
            self._drop(flight)
        self._close_stream()
        if self._on_loss == "fail":
            raise error
        try:
            self._resting_until_s = now_s + self._retry.pause_s(error, now_s)
        except DeadlineExceededError:
            raise
        except (CloudUnavailableError, CloudOverloadedError) as last:
            self._give_up(last)
            return
        self._lose(str(error))

    def _take_refusal(self, call: int | None, error: ContextMissingError, now_s: float) -> None:
        """The service lacks the context: the guess before it was wrong, which its verdict will say, or it forgot the session."""
        later = [flight for flight in self._flights if call is not None and flight.call > call]
        for flight in later:
            self._drop(flight)
        if self._flights:
            self._may_chain = False
        else:
            self._retry.pause_s(error, now_s)

    def _settle(
        self, position: int, ids: Sequence[int], mode: Mode, cost: CallCost, num_draft_tokens: int = 0, num_accepted: int = 0
    ) -> None:
        """The target says that `ids` stand at `position`: they become final."""
        before = len(self.tokens)
        new = list(ids[before - position : self._end - position])
        for at, token in enumerate(new):
            if token in self._stops:
                del new[at + 1 :]
                break
        same = common_prefix(new, self.tail)
        for _ in range(same):
            self._tally.add(self._num_right, True)
            self._num_right += 1
        if same < min(len(new), len(self.tail)):
            self._tally.add(self._num_right, False)
        if same < len(new):
            self._num_right = 0
        self.tokens += new
        if same == len(new):
            del self.tail[:same]
        else:
            self.tail.clear()
            self._version += 1
        for flight in list(self._flights):
            if (same < len(new) and flight.start > before + same) or flight.horizon <= len(self.tokens):
                self._drop(flight)
        self.steps.append(Round(new, mode, "final", num_draft_tokens, num_accepted, cost))
        self._opened = True
        self._backlog = False
        self._finish_if_complete()

    # What goes out

    def _decide(self, now_s: float) -> None:
        plan = self._planner.plan(now_s, len(self.tokens))
        if not self._offline:
            self._call(plan, now_s)
        waited = self._waited(now_s)
        late = self._lateness(waited)
        waiting = self._flights[0] if self._flights else self._stream if late == "lost" else None
        if late is not None and waiting is not None and not waiting.hedged:
            waiting.hedged = True
            self.actions.append(Hedge(waiting.call))
        if late == "lost" and not self._lost:
            if self._on_loss == "fail":
                raise CloudUnavailableError("the cloud has not answered in time")
            self._lose("the cloud has not answered in time")
        self._draft(plan, late is not None)
        self._finish_unreached()
        self.wake_s = self._next_wake(now_s, waited)

    def _call(self, plan: Plan, now_s: float) -> None:
        if self._resting_until_s is not None:
            if now_s < self._resting_until_s:
                return
            self._resting_until_s = None
        if not self._met:
            if not self._meeting:
                self._meeting = True
                self.actions.append(Meet())
            return
        if plan.mode == "cloud" and not (self._backlog and self.tail):
            if self._stream is None and not self._flights:
                call = next(self._calls)
                self._stream = _Stream(call, now_s)
                self.actions.append(Decode(call, list(self.tokens), self._end - len(self.tokens)))
            return
        self._close_stream()
        self._send(plan, now_s)

    def _send(self, plan: Plan, now_s: float) -> None:
        """Flights, as long as the tail holds whole drafts for them."""
        while len(self._flights) < (plan.max_in_flight if self._may_chain else 1):
            last = self._flights[-1] if self._flights else None
            start = last.horizon if last else len(self.tokens)
            base = start - len(self.tokens)
            room = self._end - start
            if room <= 0 or base > len(self.tail) or not self._stops.isdisjoint(self.tail[:base]):
                return
            length = min(plan.num_draft_tokens, self._max_draft)
            if self._backlog or not self._opened:  # all that there is, or the prompt alone
                length = min(self._max_draft if self._backlog else 0, len(self.tail) - base)
            length = min(length, room - 1)
            draft = self.tail[base : base + length]
            if not self._stops.isdisjoint(draft):
                del draft[next(at for at, token in enumerate(draft) if token in self._stops) + 1 :]
            elif len(draft) < (length if last else min(length, plan.first)):
                return
            if last and not draft and self._backlog:
                return
            call = next(self._calls)
            self._flights.append(Flight(call, start, draft, now_s, plan.mode))
            self._flown = plan.mode
            self.actions.append(Verify(call, self.tokens + self.tail[:base], draft, start if last else None))

    def _draft(self, plan: Plan, late: bool) -> None:
        if self._drafting or len(self.tokens) + len(self.tail) >= self._end or (self.tail and self.tail[-1] in self._stops):
            return
        without_cloud = late or self._lost or not self._met
        limit = self._lookahead(plan)
        if self._offline:
            limit = self._end
        elif without_cloud and self._on_loss == "continue":
            limit = max(limit, self._max_provisional)
        if len(self.tail) < limit:
            self._drafting = True
            self.actions.append(Draft(self._version, self.tokens + self.tail))

    def _lookahead(self, plan: Plan) -> int:
        """Tokens to draft beyond the last final one, while the cloud is there."""
        return plan.lookahead

    # Losing the cloud

    def _heard(self) -> None:
        """The cloud has answered."""
        if self._lost and self._met:
            self._lost = False
            self.steps.append(CloudBack())
        self._retry.succeeded()

    def _lose(self, reason: str) -> None:
        if not self._lost:
            self._lost = True
            self.steps.append(CloudLost(reason))
        self._backlog = True

    def _give_up(self, error: CloudError) -> None:
        """Without the cloud to the end of this generation, if the user allows it."""
        if self._on_loss != "continue":
            raise error
        for flight in list(self._flights):
            self._drop(flight)
        self._close_stream()
        self._offline = True
        self.steps.append(ModeChanged("edge", str(error)))
        tail, self.tail = self.tail, []
        self._end_with(tail)

    def _finish_unreached(self) -> None:
        """A cloud that was never met is not waited for."""
        whole = self.tail and (self.tail[-1] in self._stops or len(self.tokens) + len(self.tail) >= self._end)
        if whole and not self._met and self._lost:
            self._give_up(CloudUnavailableError("the cloud was not reached"))

    def _end_with(self, token_ids: list[int]) -> None:
        """Keep guesses that nobody will verify."""
        self.tokens += token_ids
        if token_ids:
            self.steps.append(Round(token_ids, "edge", "provisional"))
        self._finish_if_complete()

    def _waited(self, now_s: float) -> tuple[float, float, float] | None:
        """For how long an answer has been waited for, and how long it takes to be overdue, and to be lost."""
        first = self._flights[0] if self._flights else None
        if first is not None:
            call, since_s, num_new, streaming = first.call, first.sent_s, len(first.draft_ids) + 1, False
        elif self._stream is not None:
            call, since_s, num_new, streaming = self._stream.call, self._stream.heard_s, 1, self._stream.num_heard > 0
        else:
            return None
        if self._limits is None or self._limits[0] != call:
            num_new = num_new if self._opened else len(self.tokens)
            self._limits = call, self._patience.overdue_s(num_new, streaming), self._patience.lost_s(num_new, streaming)
        _, overdue_s, lost_s = self._limits
        return now_s - since_s, overdue_s, lost_s

    def _lateness(self, waited: tuple[float, float, float] | None) -> Literal["overdue", "lost"] | None:
        if waited is None:
            return None
        waited_s, overdue_s, lost_s = waited
        if waited_s + TICK_S >= lost_s:
            return "lost"
        return "overdue" if waited_s + TICK_S >= overdue_s else None

    def _next_wake(self, now_s: float, waited: tuple[float, float, float] | None) -> float | None:
        wake_s = self._resting_until_s
        if waited is not None:
            waited_s, *limits = waited
            for limit_s in limits:
                if limit_s > waited_s + TICK_S and (wake_s is None or now_s - waited_s + limit_s < wake_s):
                    wake_s = now_s - waited_s + limit_s
        return wake_s

    # Small print

    def _finish_if_complete(self) -> None:
        if len(self.tokens) >= self._end or (len(self.tokens) > self._start and self.tokens[-1] in self._stops):
            self.finished = True
            for flight in list(self._flights):
                self._drop(flight)
            self._close_stream()

    def _forget(self, call: int) -> bool:
        """Take a call that has ended off the books; False: it was not on them."""
        if self._stream is not None and self._stream.call == call:
            self._stream = None
            return True
        for flight in self._flights:
            if flight.call == call:
                self._flights.remove(flight)
                return True
        return False

    def _drop(self, flight: Flight) -> None:
        self._flights.remove(flight)
        if flight.verdict is None:
            self.actions.append(Cancel(flight.call))

    def _close_stream(self) -> None:
        if self._stream is not None:
            self.actions.append(Cancel(self._stream.call))
            self._stream = None
