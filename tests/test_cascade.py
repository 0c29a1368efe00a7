"""Mode `cascade`: a text that is a function of the tokens alone, whatever draft lengths, faults and checks there are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_pilot import COST, PROMPT, STOP, WRONG, Counts, Steady, World, explore, target_after

from edgecloud.calibration import OPENING_TOKENS
from edgecloud.edge.cascade import CascadePilot
from edgecloud.edge.exits import Exits
from edgecloud.edge.happenings import Cancel, Draft, Drafted, Failed, Happening, Judged, Tick, Verify
from edgecloud.edge.pilot import Pilot
from edgecloud.edge.plan import Fixed, Plan
from edgecloud.edge.retry import Retry, Timeout
from edgecloud.errors import CloudUnavailableError
from edgecloud.types import Audit, ExitScope, Guess, Round, Verdict

SURE, UNSURE = 0.95, 0.3
THRESHOLD = 0.9
OTHER = 60  # the choice of the target that nobody waited for


def make_cascade(plan: Plan, num_tokens: int, exits: Exits, met: int | None = 32) -> CascadePilot:
    return CascadePilot(
        PROMPT,
        Fixed(plan),
        Retry(Timeout(), None, "cloud"),
        Steady(),
        Counts(),
        max_new_tokens=num_tokens,
        stop_token_ids={STOP},
        met=met,
        exits=exits,
    )


# Two models of a few tokens, and a service of them, in this process


def noise(tokens: list[int], salt: int) -> int:
    """A number that depends on all of them."""
    value = salt
    for token in tokens:
        value = (value * 1_000_003 + token + 1) % 2_147_483_647
    return value * 48_271 % 2_147_483_647


def choice_of(tokens: list[int], salt: int) -> int:
    """The target's."""
    token = noise(tokens, salt) % 12
    return STOP if token == 11 and len(tokens) > len(PROMPT) + 3 else token


def guess_of(tokens: list[int], salt: int) -> tuple[int, float]:
    """The device's: it agrees in two of three cases, and scores are what they are."""
    kind = noise(tokens, salt + 7)
    score = (kind // 3 % 1000) / 1000
    return (choice_of(tokens, salt) if kind % 3 else (choice_of(tokens, salt) + 1) % 11), score


def text_of(salt: int, num_tokens: int, threshold: float) -> list[int]:
    """The definition: the device's guess where its score reaches the threshold, else the target's choice."""
    tokens = list(PROMPT)
    while len(tokens) < len(PROMPT) + num_tokens and tokens[-1] != STOP:
        guess, score = guess_of(tokens, salt)
        tokens.append(guess if score >= threshold else choice_of(tokens, salt))
    return tokens[len(PROMPT) :]


@dataclass
class Flown:
    """What came of a generation."""

    final: list[int] = field(default_factory=list)
    statuses: list[str] = field(default_factory=list)
    num_passes: int = 0
    audits: list[Audit] = field(default_factory=list)
    guessed: list[int] = field(default_factory=list)
    contexts: list[int] = field(default_factory=list)  # lengths, of the calls

    def read(self, pilot: Pilot) -> None:
        for step in pilot.steps:
            if isinstance(step, Round):
                if step.token_ids != self.guessed[: len(step.token_ids)]:
                    self.guessed = []
                del self.guessed[: len(step.token_ids)]
                self.final += step.token_ids
                self.statuses += [step.status] * len(step.token_ids)
            elif isinstance(step, Guess):
                self.guessed += step.token_ids
            elif isinstance(step, Audit):
                self.audits.append(step)
        pilot.steps.clear()
        assert self.final == pilot.tokens[len(PROMPT) :]
        assert self.guessed == pilot.tail


def fly(pilot: Pilot, salt: int, order: list[int] | None = None, faults: frozenset[int] = frozenset()) -> Flown:
    """Fly it; `order` says in turn whether device (even) or service (odd) comes first; calls of these numbers are lost."""
    flown, drafts, calls, now_s = Flown(), [], [], 0.0
    turns = iter((order or [0]) * 10_000)
    pilot.begin(now_s)
    while not pilot.finished:
        for action in pilot.actions:
            match action:
                case Draft():
                    drafts.append(action)
                case Verify():
                    calls.append(action)
                    flown.num_passes += 1
                    flown.contexts.append(len(action.tokens))
                case Cancel(call):
                    calls = [other for other in calls if other.call != call]
                case _:
                    raise AssertionError(action)
        pilot.actions.clear()
        flown.read(pilot)
        now_s += 1e-3
        happening: Happening
        if drafts and (not calls or next(turns) % 2 == 0):
            draft = drafts.pop()
            happening = Drafted(draft.version, *guess_of(draft.tokens, salt))
        elif calls and calls[0].call in faults:
            happening = Failed(calls.pop(0).call, CloudUnavailableError("lost"))
        elif calls:
            happening = judged(calls.pop(0), salt)
        else:
            assert pilot.wake_s is not None
            now_s, happening = max(now_s, pilot.wake_s), Tick()
        pilot.take(happening, now_s)
    flown.read(pilot)
    return flown


def judged(order: Verify, salt: int) -> Judged:
    tokens, num_accepted = list(order.tokens), 0
    for guess in order.draft_ids:
        if guess != choice_of(tokens, salt):
            break
        tokens.append(guess)
        num_accepted += 1
    return Judged(order.call, Verdict(num_accepted, choice_of(tokens, salt), COST))


salts = st.integers(0, 10_000)
thresholds = st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.1])


@settings(max_examples=60, deadline=None)
@given(
    salts,
    thresholds,
    st.integers(1, 20),
    st.integers(1, 5),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.lists(st.integers(0, 1), min_size=1, max_size=5),
    st.frozensets(st.integers(0, 6), max_size=2),
    st.sampled_from([1, 3, 32]),
)
def test_the_text_is_a_function_of_the_tokens_alone(
    salt: int, threshold: float, num_tokens: int, length: int, rate: float, order: list[int], faults: frozenset[int], longest: int
) -> None:
    """At every draft length, through every fault, however often it is checked, in whatever order things happen."""
    exits = Exits("token", threshold, audit_rate=rate)
    flown = fly(make_cascade(Plan("cascade", length), num_tokens, exits, met=longest), salt, order, faults)
    assert flown.final == text_of(salt, num_tokens, threshold)


@settings(max_examples=30, deadline=None)
@given(salts, st.integers(1, 20), st.integers(1, 5))
def test_above_one_it_is_the_clouds_text_and_at_zero_the_devices(salt: int, num_tokens: int, length: int) -> None:
    tokens = list(PROMPT)
    for source, threshold in ((choice_of, 1.1), (lambda ids, s: guess_of(ids, s)[0], 0.0)):
        tokens = list(PROMPT)
        while len(tokens) < len(PROMPT) + num_tokens and tokens[-1] != STOP:
            tokens.append(source(tokens, salt))
        flown = fly(make_cascade(Plan("cascade", length), num_tokens, Exits("token", threshold, 0.0)), salt)
        assert flown.final == tokens[len(PROMPT) :]
        assert set(flown.statuses) == {"final" if threshold > 1 else "unverified"}
        assert bool(flown.num_passes) == (threshold > 1)


@settings(max_examples=40, deadline=None)
@given(salts, st.integers(4, 30), st.integers(1, 5))
def test_a_final_token_is_the_targets_choice_and_every_other_one_says_so(salt: int, num_tokens: int, length: int) -> None:
    flown = fly(make_cascade(Plan("cascade", length), num_tokens, Exits("token", 0.5)), salt)
    tokens = list(PROMPT)
    for token, status in zip(flown.final, flown.statuses, strict=True):
        if status == "final":
            assert token == choice_of(tokens, salt)
        else:
            assert guess_of(tokens, salt) == (token, pytest.approx(guess_of(tokens, salt)[1]))
            assert guess_of(tokens, salt)[1] >= 0.5
        tokens.append(token)


@settings(max_examples=40, deadline=None)
@given(salts, st.integers(4, 40), st.integers(1, 5))
@example(salt=3, num_tokens=40, length=2)
def test_checks_find_what_diverged_and_only_that(salt: int, num_tokens: int, length: int) -> None:
    flown = fly(make_cascade(Plan("cascade", length), num_tokens, Exits("token", 0.5, audit_rate=1.0)), salt)
    tokens, num_sure, num_wrong = list(PROMPT), 0, 0
    for token in flown.final:
        if guess_of(tokens, salt)[1] >= 0.5:
            num_sure += 1
            num_wrong += token != choice_of(tokens, salt)
        tokens.append(token)
    assert sum(audit.num_audited for audit in flown.audits) <= num_sure
    assert sum(audit.num_diverged for audit in flown.audits) <= num_wrong
    if not num_wrong:
        assert sum(audit.num_audited for audit in flown.audits) == num_sure


def test_sure_guesses_need_no_call_and_ride_along_with_the_next() -> None:
    pilot = make_cascade(Plan("cascade", 2), 8, Exits("token", THRESHOLD, audit_rate=0.0))
    pilot.begin(0.0)
    scores = iter([SURE, SURE, UNSURE, SURE, UNSURE])
    for token in (1, 2, 3, 4, 5):
        [draft] = pilot.actions
        assert isinstance(draft, Draft)
        pilot.actions.clear()
        pilot.take(Drafted(draft.version, token, next(scores)), 0.0)
    [flight] = [action for action in pilot.actions if isinstance(action, Verify)]
    assert (flight.tokens, flight.draft_ids) == ([*PROMPT, 1, 2], [3, 4, 5])
    statuses = [(step.status, step.token_ids) for step in pilot.steps if isinstance(step, Round)]
    assert statuses == [("unverified", [1]), ("unverified", [2])]
    pilot.steps.clear()
    pilot.take(Judged(flight.call, Verdict(1, 77, COST)), 0.0)  # the sure guess that rode along is not the target's
    assert [(s.status, s.token_ids) for s in pilot.steps if isinstance(s, Round)] == [("final", [3]), ("unverified", [4])]
    assert [s for s in pilot.steps if isinstance(s, Audit)] == [Audit(1, 1)]
    assert pilot.tail == [5]


# Through every order of events


@dataclass
class CascadeWorld(World):
    """As World; the text is the cascade's."""

    sure: frozenset[int] = frozenset()

    def _look_at(self, step: Round) -> None:
        at = len(self.final)
        for number, token in enumerate(step.token_ids, at):
            own = self._choice(PROMPT + self.text[:number])
            assert token == own if step.status == "final" else number in self.sure

    def _choice(self, tokens: list[int]) -> int:
        at = len(tokens) - len(PROMPT)
        own = tokens[len(PROMPT) :] == self.text[:at]
        return OTHER if own and at in self.sure & self.wrong else target_after(tokens, self.text)

    def after(self, choice: str) -> CascadeWorld:
        world = super().after(choice)
        assert isinstance(world, CascadeWorld)
        return world

    def _tell(self, happening: Happening) -> None:
        if isinstance(happening, Drafted):
            at = len(self.pilot.tokens) + len(self.pilot.tail) - len(PROMPT)
            happening = Drafted(happening.version, happening.token_id, SURE if at in self.sure else UNSURE)
        super()._tell(happening)


def cascade_world(
    wrong: frozenset[int],
    sure: frozenset[int],
    num_tokens: int,
    scope: ExitScope = "token",
    plan: Plan | None = None,
    **options: Any,
) -> CascadeWorld:
    text = [WRONG if at in wrong & sure else token for at, token in enumerate([1, 2, 3, 4, 5, 6][:num_tokens])]
    pilot = make_cascade(Plan("cascade", 1), num_tokens, Exits(scope, THRESHOLD, **options))
    world = CascadeWorld(pilot, text, wrong, sure=sure)
    world.begin()
    return world


@pytest.mark.parametrize("sure", [(), (0, 1), (1, 3), (2, 3), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("wrong", [(), (1,), (2,), (0, 3)], ids=str)
def test_one_mishap_at_any_moment_changes_nothing(wrong: tuple[int, ...], sure: tuple[int, ...]) -> None:
    for rate in (0.0, 1.0):
        explore(cascade_world(frozenset(wrong), frozenset(sure), 4, audit_rate=rate))


class Changing:
    """Another mode after every token."""

    def plan(self, now_s: float, context_tokens: int) -> Plan:
        plans = [Plan("cascade", 1), Plan("speculative", 1, max_in_flight=2), Plan("cloud", 0)]
        return plans[context_tokens % 3]


def test_the_mode_may_change_at_any_moment() -> None:
    """Nothing is sure here, so that the text is the target's in every mode."""
    world = CascadeWorld(make_cascade(Plan("cascade", 1), 3, Exits("token", THRESHOLD)), [1, 2, 3], frozenset({1}))
    world.pilot._planner = Changing()
    world.begin()
    explore(world)


# Whole requests


@pytest.mark.parametrize("scope", ["before", "after"])
@pytest.mark.parametrize("wrong", [(), (1,)], ids=str)
def test_a_routed_request_goes_one_way_through_any_mishap(scope: ExitScope, wrong: tuple[int, ...]) -> None:
    """Sure of all tokens: the device's text. Sure of the last one alone: the target's."""
    for sure, device in ((frozenset(range(4)), True), (frozenset({3}), False)):
        pilot = make_cascade(Plan("speculative", 1, max_in_flight=1), 4, Exits(scope, THRESHOLD, audit_rate=1.0))
        text = [WRONG if at >= min((*wrong, 9)) and device else token for at, token in enumerate([1, 2, 3, 4])]
        world = RoutedWorld(pilot, text, frozenset(wrong), sure=sure)
        world.begin()
        explore(world)


@dataclass
class RoutedWorld(CascadeWorld):
    """Tokens are the device's and provisional, or all of them final."""

    def _look_at(self, step: Round) -> None:
        if step.token_ids:
            assert (step.mode, step.status) == (("edge", "provisional") if 0 in self.sure else ("speculative", "final"))


@pytest.mark.parametrize("num_sure", [0, OPENING_TOKENS])
def test_before_anything_goes_up_the_first_guesses_decide_and_no_others(num_sure: int) -> None:
    pilot = make_cascade(Plan("speculative", 2), 12, Exits("before", THRESHOLD))
    pilot.begin(0.0)
    for at in range(12 if num_sure else OPENING_TOKENS):
        [draft] = pilot.actions
        assert isinstance(draft, Draft)
        pilot.actions.clear()
        pilot.take(Drafted(draft.version, at, SURE if at < num_sure else UNSURE), 0.0)
    rounds = [step for step in pilot.steps if isinstance(step, Round)]
    if num_sure:
        assert pilot.finished
        assert {step.mode for step in rounds} == {"edge"}
        assert [token for step in rounds for token in step.token_ids] == list(range(12))
    else:
        assert not rounds
        [flight] = [action for action in pilot.actions if isinstance(action, Verify)]
        assert (flight.tokens, flight.draft_ids) == (PROMPT, list(range(OPENING_TOKENS)))


def test_an_answer_that_goes_up_after_all_goes_as_one_draft() -> None:
    pilot = make_cascade(Plan("speculative", 2), 6, Exits("after", THRESHOLD))
    pilot.begin(0.0)
    for token in (1, 2, 3, 4, 5, 6):
        [draft] = pilot.actions
        assert isinstance(draft, Draft)
        pilot.actions.clear()
        pilot.take(Drafted(draft.version, token, UNSURE), 0.0)
    [flight] = pilot.actions
    assert isinstance(flight, Verify)
    assert (flight.tokens, flight.draft_ids) == (PROMPT, [1, 2, 3, 4, 5])
    assert [step.token_ids for step in pilot.steps if isinstance(step, Guess)] == [[token] for token in (1, 2, 3, 4, 5, 6)]


def test_a_check_that_does_not_come_back_keeps_nobody_waiting() -> None:
    pilot = make_cascade(Plan("cascade", 1), 1, Exits("token", THRESHOLD, audit_rate=1.0))
    pilot.begin(0.0)
    [draft] = pilot.actions
    assert isinstance(draft, Draft)
    pilot.actions.clear()
    pilot.take(Drafted(draft.version, 1, SURE), 0.0)
    assert pilot.whole
    assert not pilot.finished
    assert [type(action).__name__ for action in pilot.actions] == ["Verify"]
    pilot.actions.clear()
    assert pilot.wake_s == 1.0  # when an answer is overdue
    pilot.take(Tick(), 1.0)
    assert pilot.finished
    assert [type(action).__name__ for action in pilot.actions] == ["Cancel"]
