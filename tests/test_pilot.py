"""The pilot through every order of events: whatever comes late, twice, out of order or never, the text is the target's."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

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
    Met,
    Streamed,
    Tick,
    Verify,
)
from edgecloud.edge.pilot import Pilot
from edgecloud.edge.plan import Fixed, Plan
from edgecloud.edge.retry import Retry, Timeout
from edgecloud.errors import CloudAuthError, CloudUnavailableError, ContextMissingError
from edgecloud.types import CallCost, Guess, LossPolicy, ModeChanged, Round, Verdict

PROMPT = [100, 101]
TEXT = [1, 2, 3, 4, 5, 6, 7, 8]
WRONG = 50  # a guess that the target does not confirm
STOP = 99
COST = CallCost()


class Steady:
    """Answers are late after a second, the cloud is lost after two."""

    def overdue_s(self, num_new_tokens: int, streaming: bool) -> float:
        return 1.0

    def lost_s(self, num_new_tokens: int, streaming: bool) -> float:
        return 2.0


class Counts:
    """Remembers how guesses turned out."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, bool]] = []

    def add(self, position: int, accepted: bool) -> None:
        self.seen.append((position, accepted))


def make_pilot(
    plan: Plan, num_tokens: int = len(TEXT), on_loss: LossPolicy = "continue", met: int | None = 32, timeout: Timeout | None = None
) -> Pilot:
    return Pilot(
        PROMPT,
        Fixed(plan),
        Retry(timeout or Timeout(), None, "cloud"),
        Steady(),
        Counts(),
        max_new_tokens=num_tokens,
        stop_token_ids={STOP},
        on_loss=on_loss,
        met=met,
    )


def target_after(tokens: list[int], text: list[int]) -> int:
    """The target's choice; nonsense after a context that is not its own text."""
    generated = tokens[len(PROMPT) :]
    return text[len(generated)] if generated == text[: len(generated)] and len(generated) < len(text) else 200 + len(tokens)


def guess_after(tokens: list[int], text: list[int], wrong: frozenset[int]) -> int:
    """The device's guess: wrong at these positions, and behind any wrong guess."""
    at = len(tokens) - len(PROMPT)
    return WRONG if at in wrong or tokens[len(PROMPT) :] != text[:at] or at >= len(text) else text[at]


def copy_of(pilot: Pilot) -> Pilot:
    """Another one in the same state."""
    other = copy.copy(pilot)
    for name, value in vars(pilot).items():
        if isinstance(value, list):
            setattr(other, name, list(value))
    other.actions, other.steps = [], []
    other._flights = [copy.copy(flight) for flight in pilot._flights]
    other._stream, other._retry, other._calls = copy.copy(pilot._stream), copy.copy(pilot._retry), copy.copy(pilot._calls)
    return other


@dataclass
class World:
    """A pilot, a session of the service, and what is on its way between them. Copied at every branch."""

    pilot: Pilot
    text: list[int]
    wrong: frozenset[int]
    now_s: float = 0.0
    draft: Draft | None = None
    requests: list[Verify | Decode] = field(default_factory=list)
    replies: list[Happening] = field(default_factory=list)
    session: list[int] = field(default_factory=list)  # the service's tokens
    final: list[int] = field(default_factory=list)
    guessed: list[int] = field(default_factory=list)
    trouble_left: int = 1
    hedged: bool = False  # every request goes to another service, too, with all of its context: no guess is refused
    path: tuple[str, ...] = ()

    def begin(self) -> World:
        self.pilot.begin(self.now_s)
        self._read()
        return self

    def choices(self) -> Iterator[str]:
        """What may happen next."""
        if self.draft is not None:
            yield "draft"
        for i in range(len(self.requests)):
            yield f"arrive {i}"
        for i, reply in enumerate(self.replies):
            if not (
                isinstance(reply, Streamed) and any(r.call == reply.call for r in self.replies[:i])
            ):  # a stream keeps its order
                yield f"reply {i}"
        if self.trouble_left:
            for i in range(len(self.requests)):
                yield f"lose {i}"
            for i in range(len(self.replies)):
                yield f"twice {i}"
            if self.session:
                yield "forget"
        quiet = not (self.draft or self.requests or self.replies)
        if (quiet or (self.trouble_left and self.requests + self.replies)) and self.pilot.wake_s is not None:
            yield "wait"

    def after(self, choice: str) -> World:
        """The world in which that has happened."""
        world = copy.copy(self)
        world.pilot = copy_of(self.pilot)
        for name in ("requests", "replies", "session", "final", "guessed"):
            setattr(world, name, list(getattr(self, name)))
        world.path = (*self.path, choice)
        world.now_s += 1e-3
        word, _, number = choice.partition(" ")
        match word:
            case "draft":
                assert world.draft is not None
                order, world.draft = world.draft, None
                world._tell(Drafted(order.version, guess_after(order.tokens, world.text, world.wrong)))
            case "arrive":
                world._serve(world.requests.pop(int(number)))
            case "reply":
                world._tell(world.replies.pop(int(number)))
            case "twice":
                world.trouble_left -= 1
                world._tell(world.replies[int(number)])
            case "lose":
                world.trouble_left -= 1
                call = world.requests.pop(int(number)).call
                world.replies.append(Failed(call, CloudUnavailableError("lost")))
            case "forget":
                world.trouble_left -= 1
                world.session = []
            case "wait":
                assert world.pilot.wake_s is not None
                world.trouble_left -= bool(world.requests or world.replies)  # an answer that is late
                world.now_s = max(world.now_s, world.pilot.wake_s)
                world._tell(Tick())
        return world

    def key(self) -> str:
        """Worlds of one key have one future."""
        pilot = {
            name: value for name, value in vars(self.pilot).items() if name not in {"_planner", "_retry", "_patience", "_tally"}
        }
        for name in ("wake_s", "_resting_until_s"):  # only whether there is one
            pilot[name] = pilot[name] is not None
        pilot["_flights"] = [(f.call, f.start, f.draft_ids, f.verdict) for f in self.pilot._flights]
        pilot["_stream"] = self.pilot._stream and (self.pilot._stream.call, self.pilot._stream.num_heard)
        pilot.pop("_check", None)  # one of the flights
        rest = self.draft, self.requests, sorted(map(str, self.replies)), self.session, self.final, self.guessed, self.trouble_left
        return str((sorted(pilot.items()), rest))

    def _tell(self, happening: Happening) -> None:
        self.pilot.take(happening, self.now_s)
        self._read()

    def _read(self) -> None:
        """Carry out the actions, and look at the steps as a caller does."""
        for action in self.pilot.actions:
            self._carry_out(action)
        self.pilot.actions.clear()
        for step in self.pilot.steps:
            if isinstance(step, Guess):
                self.guessed += step.token_ids
            elif isinstance(step, Round):
                self._look_at(step)
                if step.token_ids != self.guessed[: len(step.token_ids)]:
                    self.guessed = []
                del self.guessed[: len(step.token_ids)]
                self.final += step.token_ids
        self.pilot.steps.clear()
        assert self.final == self.pilot.tokens[len(PROMPT) :] == self.text[: len(self.final)], self.path
        assert self.guessed == self.pilot.tail, self.path

    def _look_at(self, step: Round) -> None:
        assert step.status == "final"

    def _choice(self, tokens: list[int]) -> int:
        """The target's."""
        return target_after(tokens, self.text)

    def _carry_out(self, action: Action) -> None:
        match action:
            case Draft():
                assert self.draft is None
                self.draft = action
            case Verify() | Decode():
                self.requests.append(action)
            case Hedge():  # there is no other service
                pass
            case Cancel(call):  # it may overtake the request, or come too late for the reply
                self.requests = [request for request in self.requests if request.call != call]
            case _:
                raise AssertionError(action)

    def _serve(self, request: Verify | Decode) -> None:
        """As the engine does, one request after another; a context that it does not have is refused."""
        conditional = isinstance(request, Verify) and request.num_assumed is not None
        if conditional and not self.hedged and self.session[: len(request.tokens)] != request.tokens:
            self.replies.append(Failed(request.call, ContextMissingError("?", 0)))
            return
        tokens = list(request.tokens)
        if isinstance(request, Decode):
            tokens.append(self._choice(tokens))
            self.replies.append(Streamed(request.call, len(tokens) - 1, tokens[-1:], COST))
            self.session = tokens
            if request.max_new_tokens > 1:
                self.requests.append(Decode(request.call, tokens, request.max_new_tokens - 1))
            return
        num_accepted = 0
        for guess in request.draft_ids:
            if guess != self._choice(tokens):
                break
            tokens.append(guess)
            num_accepted += 1
        self.session = [*tokens, self._choice(tokens)]
        self.replies.append(Judged(request.call, Verdict(num_accepted, self.session[-1], COST)))


def explore(first: World) -> int:
    """Through every world.  -> how many there are"""
    seen, ahead = {first.key()}, [first]
    num_finished = 0
    while ahead:
        world = ahead.pop()
        if world.pilot.finished:
            assert world.final == world.text, world.path
            assert world.guessed == [], world.path
            num_finished += 1
            continue
        choices = list(world.choices())
        assert choices, f"nothing can happen any more: {world.path}"
        for choice in choices:
            following = world.after(choice)
            if (key := following.key()) not in seen:
                seen.add(key)
                ahead.append(following)
    assert num_finished
    return len(seen)


@pytest.mark.parametrize("wrong", [(), (0,), (1,), (2,), (0, 1), (1, 3), (0, 1, 2, 3)], ids=str)
def test_two_drafts_on_their_way_and_one_mishap_at_any_moment(wrong: tuple[int, ...]) -> None:
    plan = Plan("speculative", 1, max_in_flight=2)
    num = explore(World(make_pilot(plan, 4), TEXT[:4], frozenset(wrong)).begin())
    assert num > 100
    print(num, "worlds")


@pytest.mark.parametrize("wrong", [(), (2,)], ids=str)
def test_a_stream_and_one_mishap_at_any_moment(wrong: tuple[int, ...]) -> None:
    explore(World(make_pilot(Plan("cloud", 0), 3), TEXT[:3], frozenset(wrong)).begin())


@pytest.mark.parametrize("wrong", [(0,), (1,), (1, 3)], ids=str)
def test_a_verdict_on_a_wrong_guess_never_counts(wrong: tuple[int, ...]) -> None:
    """A second service that is told all of the context judges what the first one would have refused."""
    pilot = make_pilot(Plan("speculative", 1, max_in_flight=2), 4)
    assert explore(World(pilot, TEXT[:4], frozenset(wrong), hedged=True).begin()) > 100


class Alternating:
    """Another mode after every token."""

    def plan(self, now_s: float, context_tokens: int) -> Plan:
        return Plan("cloud", 0) if context_tokens % 2 else Plan("speculative", 1, max_in_flight=2)


@pytest.mark.parametrize("wrong", [(), (1,)], ids=str)
def test_the_mode_may_change_at_any_moment(wrong: tuple[int, ...]) -> None:
    pilot = make_pilot(Plan("cloud", 0), 4)
    pilot._planner = Alternating()
    explore(World(pilot, TEXT[:4], frozenset(wrong)).begin())


def test_two_mishaps_and_a_stop_token_within_a_draft() -> None:
    text = [1, 2, STOP]
    pilot = make_pilot(Plan("speculative", 2, max_in_flight=2), 8)
    explore(World(pilot, text, frozenset({1}), trouble_left=2).begin())


# Without the cloud


def drafting(
    pilot: Pilot, text: list[int] = TEXT, wrong: frozenset[int] = frozenset(), now_s: float = 0.0
) -> list[Verify | Decode]:
    """Let the device draft as long as it wants to.  -> calls that were made meanwhile"""
    calls: list[Verify | Decode] = []
    while pilot.actions:
        match pilot.actions.pop(0):
            case Draft(version, tokens):
                pilot.take(Drafted(version, guess_after(tokens, text, frozenset())), now_s)
            case Verify() | Decode() as call:
                calls.append(call)
    return calls


def shown_by(pilot: Pilot) -> list[str]:
    names = [type(step).__name__ for step in pilot.steps]
    pilot.steps.clear()
    return names


def opened(on_loss: LossPolicy = "continue", max_provisional_tokens: int = 256, timeout: Timeout | None = None) -> Pilot:
    """A pilot whose first draft is on its way."""
    pilot = make_pilot(Plan("speculative", 2, max_in_flight=1), on_loss=on_loss, timeout=timeout)
    pilot._max_provisional = max_provisional_tokens
    pilot.begin(0.0)
    [opening] = drafting(pilot)
    pilot.take(Judged(opening.call, Verdict(0, TEXT[0], COST)), 0.1)
    pilot.steps.clear()
    return pilot


def test_a_lost_cloud_leaves_the_device_at_work_and_the_backlog_goes_in_one_pass() -> None:
    pilot = opened()
    [call] = drafting(pilot)
    pilot.take(Failed(call.call, CloudUnavailableError("reset")), 0.2)
    assert "CloudLost" in shown_by(pilot)
    assert drafting(pilot) == []
    assert pilot.tail == TEXT[1:]  # to the end, without a verdict
    assert pilot.wake_s is not None
    pilot.take(Tick(), pilot.wake_s)
    [backlog] = drafting(pilot)
    assert isinstance(backlog, Verify)
    assert (backlog.tokens, backlog.draft_ids) == (PROMPT + TEXT[:1], TEXT[1:7])  # the last token is the target's own
    pilot.take(Judged(backlog.call, Verdict(3, 77, COST)), 9.0)
    assert shown_by(pilot)[-2:] == ["CloudBack", "Round"]
    assert pilot.tokens == [*PROMPT, *TEXT[:4], 77]
    assert pilot.tail == []


def test_no_more_guesses_than_allowed() -> None:
    pilot = opened(max_provisional_tokens=3)
    [call] = drafting(pilot)
    pilot.take(Failed(call.call, CloudUnavailableError("reset")), 0.2)
    drafting(pilot)
    assert len(pilot.tail) == 3


def test_a_silent_cloud_is_overdue_then_lost_and_its_late_answer_counts() -> None:
    pilot = opened()
    [call] = drafting(pilot, now_s=0.1)
    guessed = len(pilot.tail)
    assert pilot.wake_s == 1.1
    pilot.take(Tick(), 1.1)  # overdue: the device goes on, nobody is told
    drafting(pilot, now_s=1.1)
    assert len(pilot.tail) > guessed
    assert "CloudLost" not in shown_by(pilot)
    pilot.take(Tick(), 2.1)
    assert shown_by(pilot) == ["CloudLost"]
    pilot.take(Judged(call.call, Verdict(2, TEXT[3], COST)), 5.0)
    assert shown_by(pilot) == ["CloudBack", "Round"]
    assert pilot.tokens == PROMPT + TEXT[:4]
    assert pilot.tail == TEXT[4:]


def test_who_waits_gets_no_further_guesses_and_an_error_in_the_end() -> None:
    pilot = opened(on_loss="wait", timeout=Timeout(retry_s=5.0))
    [call] = drafting(pilot)
    guessed = len(pilot.tail)
    pilot.take(Failed(call.call, CloudUnavailableError("reset")), 0.2)
    drafting(pilot)
    assert len(pilot.tail) == guessed

    def keep_failing() -> None:
        for second in range(1, 20):
            pilot.take(Tick(), float(second))
            for again in drafting(pilot, now_s=float(second)):
                pilot.take(Failed(again.call, CloudUnavailableError("reset")), float(second))

    with pytest.raises(CloudUnavailableError):
        keep_failing()
    assert pilot.tokens == PROMPT + TEXT[:1]


def test_who_wants_no_waiting_gets_the_error_at_once() -> None:
    pilot = opened(on_loss="fail")
    [call] = drafting(pilot)
    with pytest.raises(CloudUnavailableError, match="reset"):
        pilot.take(Failed(call.call, CloudUnavailableError("reset")), 0.2)


def test_a_cloud_that_stays_away_leaves_the_rest_unverified() -> None:
    pilot = opened(timeout=Timeout(retry_s=5.0))
    [call] = drafting(pilot)
    pilot.take(Failed(call.call, CloudUnavailableError("reset")), 0.2)
    drafting(pilot)
    second = 0
    while not pilot.finished:
        second += 1
        pilot.take(Tick(), float(second))
        for again in drafting(pilot):
            pilot.take(Failed(again.call, CloudUnavailableError("reset")), float(second))
    rounds = [step for step in pilot.steps if isinstance(step, Round)]
    assert [(r.mode, r.status, r.token_ids) for r in rounds] == [("edge", "provisional", TEXT[1:])]
    assert any(isinstance(step, ModeChanged) and step.mode == "edge" for step in pilot.steps)
    assert 2 <= second <= 7  # a pause that would go beyond the budget ends it early


def test_what_asking_again_cannot_mend_is_raised() -> None:
    pilot = opened()
    [call] = drafting(pilot)
    with pytest.raises(CloudAuthError):
        pilot.take(Failed(call.call, CloudAuthError("who?")), 0.2)


def test_the_device_begins_before_the_handshake_and_ends_without_one() -> None:
    pilot = make_pilot(Plan("speculative", 2), met=None)
    pilot.begin(0.0)
    assert [type(action).__name__ for action in pilot.actions] == ["Meet", "Draft"]
    assert drafting(pilot) == []
    assert pilot.tail == TEXT
    pilot.take(Failed(None, CloudUnavailableError("refused")), 0.1)
    assert pilot.finished
    assert pilot.tokens == PROMPT + TEXT


def test_a_handshake_that_comes_late_has_the_guesses_verified() -> None:
    pilot = make_pilot(Plan("speculative", 2), met=None)
    pilot.begin(0.0)
    drafting(pilot)
    pilot.take(Met(4), 0.1)
    [first, *_] = drafting(pilot)
    assert isinstance(first, Verify)
    assert first.tokens == PROMPT
    assert len(first.draft_ids) <= 4


def test_every_guess_is_counted_by_its_place_after_the_last_wrong_one() -> None:
    pilot = opened()
    counts = pilot._tally
    assert isinstance(counts, Counts)
    [call] = drafting(pilot)
    pilot.take(Judged(call.call, Verdict(1, 77, COST)), 0.2)
    drafting(pilot, [*TEXT[:2], 77, *TEXT[3:]])
    assert counts.seen == [(0, True), (1, True), (2, False)]


@pytest.mark.parametrize("on_loss", ["wait", "continue"])
def test_a_call_under_way_is_not_given_up_however_late_it_is(on_loss: LossPolicy) -> None:
    """A call has a time limit of its own; a long prompt may take a slow cloud longer than `retry_s`."""
    pilot = opened(on_loss=on_loss, timeout=Timeout(retry_s=5.0))
    [call] = drafting(pilot, now_s=0.1)
    for second in (2.0, 10.0, 20.0):
        pilot.take(Tick(), second)
        assert drafting(pilot, now_s=second) == []
    pilot.take(Judged(call.call, Verdict(2, TEXT[3], COST)), 25.0)
    assert pilot.tokens == PROMPT + TEXT[:4]
