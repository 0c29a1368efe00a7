"""The pilot in virtual time: through outages the text stays and every guess is settled; undisturbed it takes what was promised."""

from __future__ import annotations

from random import Random
from typing import cast

import pytest
from screen import Screen
from simpy import Environment
from virtual import VirtualGeneration
from virtual_cloud import Company, PassTimes, VirtualCloud
from virtual_device import VirtualDevice
from virtual_link import VirtualLink, later
from virtual_text import WRONG, Text

from edgecloud.cost import overlapped, survival
from edgecloud.edge.controller import Controller
from edgecloud.edge.estimates import Estimates
from edgecloud.edge.link_config import Outage
from edgecloud.edge.patience import EstimatedPatience
from edgecloud.edge.pilot import Pilot
from edgecloud.edge.plan import Fixed, Plan, Planner
from edgecloud.edge.retry import Retry, Timeout
from edgecloud.edge.tokenizer import TextStream
from edgecloud.generation import Generation
from edgecloud.types import CloudBack, CloudLost, Event, Guess, ModeChanged, Round, Step

STOP = 7_000_000
LONG = Timeout(retry_s=600.0, max_attempts=10_000)  # nobody gives up


class Letters:
    """A tokenizer's stream: every token is a letter."""

    def copy(self) -> Letters:
        return self

    def push(self, token_id: int) -> str:
        return chr(ord("a") + token_id % 26)


class Rough(Text):
    """Behind a wrong guess anything may come: what is right there, a stop token, nonsense."""

    def __init__(self, random: Random, num_prompt_tokens: int, right: list[bool], *, stops: bool) -> None:
        super().__init__(num_prompt_tokens, right)
        self._random = random
        if stops:
            self.tokens[-1] = STOP

    def guess(self, tokens: list[int]) -> int:  # type: ignore[override]
        if list(tokens) == self.tokens[: len(tokens)] and self._right[len(tokens) - self.num_prompt_tokens]:
            return self.tokens[len(tokens)]
        at = len(tokens)
        kinds = [WRONG + at, WRONG + at, STOP]
        if list(tokens) != self.tokens[:at]:
            kinds.append(self.tokens[at])
        return next(token for token in self._random.sample(kinds, len(kinds)) if token != self.tokens[at] or len(kinds) == 4)


class Flight:
    """One generation in virtual time, and what its caller sees."""

    def __init__(
        self,
        text: Text,
        *,
        planner: Planner | None = None,
        rtt_ms: float = 40.0,
        jitter_ms: float = 0.0,
        step_ms: float = 20.0,
        times: PassTimes | None = None,
        company: int = 0,
        outages: tuple[Outage, ...] = (),
        restarts_s: tuple[float, ...] = (),
        met: int | None = 32,
        timeout: Timeout = LONG,
        request_s: float = 30.0,
        on_loss: str = "continue",
        seed: int = 0,
    ) -> None:
        random = Random(seed)
        num_tokens = len(text.tokens) - text.num_prompt_tokens
        self.text, self.env, self.estimates = text, Environment(), Estimates.unknown()
        estimates = self.estimates
        link = VirtualLink(self.env, lambda _: rtt_ms + random.uniform(0, jitter_ms), outages=outages)
        self.cloud = VirtualCloud(self.env, text, times or PassTimes({1: 50.0, 8: 60.0}), lambda _: Company(company), 2.0)
        self.cloud.open(text, frozenset({STOP}))
        device = VirtualDevice(self.env, text, step_ms, 1.0, estimates)
        for at_s in restarts_s:
            later(self.env, at_s, link.interrupt, 0.5)
            later(self.env, at_s, self.cloud.restart)
        self.pilot = Pilot(
            text.prompt,
            planner or Controller(estimates),
            Retry(timeout, None, "virtual"),
            EstimatedPatience(estimates, 0.0),
            estimates.acceptance,
            max_new_tokens=num_tokens,
            stop_token_ids=(STOP,),
            on_loss=on_loss,  # type: ignore[arg-type]
            met=met,
        )
        self.generation = Generation(text.num_prompt_tokens, cast("TextStream", Letters()), num_tokens, (STOP,), ())
        self.screen = Screen()
        self.tokens_s: list[float] = []  # when each became final
        self.steps: list[tuple[float, Step]] = []
        flight = VirtualGeneration(
            self.env, self.pilot, device, link, self.cloud, estimates, self._show, stop_token_ids=(STOP,), request_s=request_s
        )
        flight.begin()
        self.env.run(self.env.any_of([flight.ended, self.env.timeout(3600.0)]))

    @property
    def tpot_ms(self) -> float:
        return (self.tokens_s[-1] - self.tokens_s[0]) * 1e3 / (len(self.tokens_s) - 1)

    def _show(self, step: Step, now_s: float) -> None:
        self.steps.append((now_s, step))
        events: list[Event] = []
        match step:
            case Round():
                events = self.generation.add(step)
                self.tokens_s += [now_s] * len(step.token_ids)
            case Guess():
                events = self.generation.guess(step.token_ids)
            case ModeChanged():
                events = [self.generation.announce(step)]
            case CloudLost() | CloudBack():
                events = [step]
        for event in events:
            self.screen.show(event)


def bits(random: Random, rate: float, number: int) -> list[bool]:
    return [random.random() < rate for _ in range(number)]


@pytest.mark.parametrize("seed", range(200))
def test_outages_change_no_token_and_every_guess_is_settled_once(seed: int) -> None:
    random = Random(seed)
    text = Rough(
        random, random.randrange(1, 60), bits(random, random.uniform(0, 1), random.randrange(1, 150)), stops=random.random() < 0.5
    )
    outages: list[Outage] = []
    for _ in range(random.randrange(5)):
        start_s = random.uniform(0, 10)
        if all(start_s > o.end_s + 0.1 or start_s < o.start_s for o in outages):
            outages.append(Outage(start_s, random.choice([0.05, 0.5, 3.0, 40.0]), random.choice(["stall", "cut"])))
    plans = [None, *(Fixed(Plan("speculative", k)) for k in (1, 2, 4, 8)), Fixed(Plan("cloud", 0))]
    flown = Flight(
        text,
        planner=random.choice([None, random.choice(plans)]),
        rtt_ms=random.choice([0.0, 2.0, 60.0, 250.0]),
        jitter_ms=random.choice([0.0, 50.0]),
        step_ms=random.choice([2.0, 20.0, 100.0]),
        times=random.choice([PassTimes({1: 50.0, 8: 90.0}), PassTimes({1: 5.0})]),
        company=random.choice([0, 0, 7]),
        outages=tuple(outages),
        restarts_s=tuple(random.uniform(0, 10) for _ in range(random.randrange(3))),
        met=random.choice([None, 32, 3]),
        request_s=random.choice([1.0, 30.0]),
        on_loss=random.choice(["continue", "continue", "wait"]),
        seed=seed,
    )
    assert flown.pilot.finished, "it never ended"
    assert flown.pilot.tokens == text.tokens
    assert flown.screen.final == text.answer
    assert not flown.screen.provisional
    assert not flown.screen.lost
    assert flown.screen.text == flown.generation.reply().text


@pytest.mark.parametrize("num_draft_tokens", [1, 2, 4, 8])
@pytest.mark.parametrize("rtt_ms", [10.0, 60.0, 200.0])
def test_a_flight_takes_what_the_formula_says(num_draft_tokens: int, rtt_ms: float) -> None:
    text = Text(8, bits(Random(1), 0.7, 1500))
    flown = Flight(
        text, planner=Fixed(Plan("speculative", num_draft_tokens)), rtt_ms=rtt_ms - 2.0, step_ms=20.0, times=PassTimes({1: 60.0})
    )
    promised = overlapped(survival(0.7, 16), num_draft_tokens, 20.0, rtt_ms, 60.0, 4)
    assert flown.tpot_ms == pytest.approx(promised.ms_per_token, rel=0.07)
    assert flown.cloud.num_passes / len(text.answer) == pytest.approx(promised.passes_per_token, rel=0.05)


def test_a_stream_that_outlives_the_time_limit_of_a_call_is_no_lost_cloud() -> None:
    text = Text(8, bits(Random(1), 0.7, 400))
    flown = Flight(text, planner=Fixed(Plan("cloud", 0)), times=PassTimes({1: 50.0}), request_s=3.0)
    assert not any(isinstance(step, CloudLost) for _, step in flown.steps)
    assert flown.screen.final == text.answer
    assert flown.tpot_ms < 53.0
