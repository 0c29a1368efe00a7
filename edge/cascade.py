"""Mode `cascade`: a pilot that asks only where the device is not sure.

The next token is again a function of the tokens alone: the device's guess where its score reaches the threshold, else the target's
choice. So a sure guess is final the moment that all before it is, whatever a verdict says of it later: draft lengths, faults and
checks change what is asked, never the text. Only an unsure guess opens a flight; sure ones behind it ride along.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from edgecloud.calibration import OPENING_TOKENS
from edgecloud.edge.exits import Exits
from edgecloud.edge.happenings import Cancel, Drafted, Failed, Happening, Judged, Verify
from edgecloud.edge.pilot import TICK_S, Flight, Pilot
from edgecloud.edge.plan import Plan
from edgecloud.tokens import common_prefix
from edgecloud.types import Audit, CallCost, Guess, Mode, Round, TokenStatus, Verdict


@dataclass(slots=True)
class _Told:
    """What a verdict brought besides tokens; the first round that comes of it carries it."""

    num_draft_tokens: int = 0
    num_accepted: int = 0
    cost: CallCost = CallCost()  # noqa: RUF009  # frozen


class CascadePilot(Pilot):
    """Takes `exits` besides what a Pilot takes.

    With the scopes `before` and `after` a request goes one way as a whole: to the device, as in mode `edge`, or to the cloud, as
    the planner says.

    When the answer is whole, its last tokens may have to be checked (`Exits.audits`): that is not waited for longer than an answer
    usually takes.
    """

    def __init__(self, *arguments: Any, exits: Exits, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._exits = exits
        self._undecided = exits.scope != "token"
        self._on_device = False  # the request was routed there
        self._cascading = False  # by the latest plan
        self._scores: list[float] = []  # of the tail
        self._chosen: list[int] = []  # by the target, for the positions behind the final tokens; they wait for the device's guess
        self._unchecked = len(self.tokens)  # from here on tokens were skipped, and nobody asked about them yet
        self._check: Flight | None = None  # of the last tokens, when the answer is whole

    def take(self, happening: Happening, now_s: float) -> None:
        """As the Pilot's."""
        if self._check is None:
            super().take(happening, now_s)
        elif not self.finished:
            self._conclude(self._check, happening, now_s)

    # Tokens

    def _keep_guess(self, drafted: Drafted) -> None:
        self._scores.append(drafted.score)
        if self._may_skip and not self.tail:
            self.tail.append(drafted.token_id)
            if not self._advance():
                self.steps.append(Guess([drafted.token_id]))
            return
        super()._keep_guess(drafted)
        if self._undecided and self._tells_enough and self._route(fmean(self._scores)):
            tail, self.tail = self.tail, []
            self._end_with(tail)

    def _route(self, score: float) -> bool:
        """Decide where the request goes.  -> whether it stays here"""
        self._undecided = False
        self._on_device = self._offline = self._exits.sure(score)
        self._backlog = not self._offline and bool(self.tail)  # what there is goes up as one draft
        return self._offline

    @property
    def _tells_enough(self) -> bool:
        """Whether the request can be routed by what was guessed."""
        return self._is_whole(self.tail) or (self._exits.scope == "before" and len(self._scores) >= OPENING_TOKENS)

    @property
    def _may_skip(self) -> bool:
        """Not while tokens are on their way that another mode asked for."""
        return self._cascading and self._stream is None and all(flight.mode == "cascade" for flight in self._flights)

    def _advance(self, told: _Told | None = None) -> bool:
        """Make final what needs no further word: sure guesses, and choices of the target.  -> whether there was any"""
        rounds: list[tuple[TokenStatus, list[int]]] = []
        num_audited = num_diverged = 0
        while self.tail and not self._is_whole(self.tokens[self._start :]):
            guess, sure = self.tail[0], self._exits.sure(self._scores[0])
            if not sure and not self._chosen:
                break
            choice = self._chosen.pop(0) if self._chosen else None
            token = guess if sure or choice is None else choice
            self._append(token)
            if choice is not None:
                self._unchecked = len(self.tokens)
                num_audited += sure
                num_diverged += token != choice
            status: TokenStatus = "final" if token == choice else "unverified"
            if not rounds or rounds[-1][0] != status:
                rounds.append((status, []))
            rounds[-1][1].append(token)
        if told is not None and not rounds:
            rounds.append(("final", []))
        told = told or _Told()
        for status, token_ids in rounds:
            self.steps.append(Round(token_ids, "cascade", status, told.num_draft_tokens, told.num_accepted, told.cost))
            told = _Told()
        self._audited(num_audited, num_diverged)
        self._finish_if_complete()
        return bool(rounds)

    def _append(self, token: int) -> None:
        """A token is final; the tail goes on behind it, or is void."""
        if token == self.tail[0]:
            del self.tail[0], self._scores[0]
        else:
            self.tail.clear()
            self._scores.clear()
            self._version += 1
        self.tokens.append(token)

    def _settle(
        self, position: int, ids: Sequence[int], mode: Mode, cost: CallCost, num_draft_tokens: int = 0, num_accepted: int = 0
    ) -> None:
        super()._settle(position, ids, mode, cost, num_draft_tokens, num_accepted)
        del self._scores[: len(self._scores) - len(self.tail)]
        self._unchecked = len(self.tokens)

    def _land(self, flight: Flight, verdict: Verdict) -> None:
        if flight.mode != "cascade":
            super()._land(flight, verdict)
            return
        run = self.tokens[flight.start :]  # skipped, and sent as part of the draft to be checked
        ids = [*flight.draft_ids[: verdict.num_accepted], verdict.next_token_id]
        same = self._compare(run, ids)
        # Behind a token that is not the target's, its choice is for another text.
        self._chosen = ids[same:] if same == len(run) else []
        self._unchecked = len(self.tokens)
        self._opened, self._backlog = True, False
        self._advance(_Told(len(flight.draft_ids) - len(run), max(0, verdict.num_accepted - len(run)), verdict.cost))

    def _compare(self, run: Sequence[int], ids: Sequence[int]) -> int:
        """How many of the skipped tokens are the target's choice; it says nothing of those behind the first that is not."""
        same = common_prefix(run, ids)
        num_compared = min(len(run), len(ids))
        self._audited(num_compared, num_compared - same)
        return same

    def _audited(self, num_audited: int, num_diverged: int) -> None:
        if num_audited:
            self.steps.append(Audit(num_audited, num_diverged))

    # Calls

    def _decide(self, now_s: float) -> None:
        if not self.whole:
            super()._decide(now_s)
        if self.whole and self._check is None:
            self._open_check(now_s)

    def _call(self, plan: Plan, now_s: float) -> None:
        was, self._cascading = self._cascading, plan.mode == "cascade"
        if was and not self._cascading and self._chosen:
            chosen, self._chosen = self._chosen, []
            self._settle(len(self.tokens), chosen, "cascade", CallCost())
        if self._may_skip:
            self._advance()
        if not (self.finished or self.whole or (self._undecided and self._met)):  # the handshake is made in any case
            super()._call(plan, now_s)

    def _send(self, plan: Plan, now_s: float) -> None:
        if plan.mode == "cascade":
            self._escalate(plan, now_s)
        elif not any(flight.mode == "cascade" for flight in self._flights):
            super()._send(plan, now_s)

    def _escalate(self, plan: Plan, now_s: float) -> None:
        """One flight at a time, from the first unsure guess on."""
        if self._flights or not self.tail:
            return
        most = min(self._max_draft, self._end - len(self.tokens) - 1)
        draft: list[int] = []
        num_unsure = 0
        for token, score in zip(self.tail[:most], self._scores, strict=False):
            unsure = not self._exits.sure(score)
            if unsure and num_unsure == plan.num_draft_tokens and not self._backlog:
                break
            draft.append(token)
            num_unsure += unsure
        enough = num_unsure >= plan.first or self._backlog
        if not enough and len(self.tail) < min(most, plan.lookahead) and self.tail[-1] not in self._stops:
            return
        run = self.tokens[self._unchecked :]
        num_checked = min(len(run), self._max_draft - len(draft)) if run and self._exits.audits(self._unchecked, run) else 0
        start = len(self.tokens) - num_checked
        self._fly(start, self.tokens[start:] + draft, now_s)

    def _fly(self, start: int, draft: list[int], now_s: float) -> Flight:
        call = next(self._calls)
        flight = Flight(call, start, draft, now_s, "cascade")
        self._flights.append(flight)
        self._flown = "cascade"
        self.actions.append(Verify(call, self.tokens[:start], draft, None))
        return flight

    def _draft(self, plan: Plan, late: bool) -> None:
        if not (self.finished or self.whole):
            super()._draft(plan, late)

    def _lookahead(self, plan: Plan) -> int:
        if self._undecided:
            return OPENING_TOKENS if self._exits.scope == "before" else self._end
        return super()._lookahead(plan)

    # The end

    def _is_whole(self, answer: Sequence[int]) -> bool:
        return bool(answer) and (answer[-1] in self._stops or len(answer) >= self._end - self._start)

    def _finish_if_complete(self) -> None:
        super()._finish_if_complete()
        run = self.tokens[self._unchecked :]
        asked = run and self._met and not self._lost and (self._on_device or not self._offline)
        if self.finished and asked and self._exits.audits(self._unchecked, run):
            self.finished, self.whole = False, True

    def _open_check(self, now_s: float) -> None:
        """What was skipped last goes up by itself: the target's next token says what it would have chosen for the last one."""
        start = max(self._unchecked, len(self.tokens) - 1 - self._max_draft)
        self._check = self._fly(start, self.tokens[start:-1], now_s)
        num_new = len(self.tokens) - start if self._opened else len(self.tokens)
        self.wake_s = now_s + self._patience.overdue_s(num_new, False)

    def _conclude(self, check: Flight, happening: Happening, now_s: float) -> None:
        match happening:
            case Judged(call, verdict) if call == check.call:
                self._compare(self.tokens[check.start :], [*check.draft_ids[: verdict.num_accepted], verdict.next_token_id])
                self.steps.append(Round([], "cascade", "final", cost=verdict.cost))
                self.finished = True
            case Failed(call) if call == check.call:
                self.finished = True
            case _ if self.wake_s is not None and now_s + TICK_S >= self.wake_s:
                self.actions.append(Cancel(check.call))
                self.finished = True
