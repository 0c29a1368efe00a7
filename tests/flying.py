"""A pilot driven step by step over a verifier of this process, in any order of what can happen next."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import cycle
from typing import Protocol

from edgecloud.edge.happenings import Cancel, Decode, Draft, Drafted, Failed, Happening, Hedge, Judged, Streamed, Verify
from edgecloud.edge.pilot import Pilot
from edgecloud.edge.plan import Fixed, Plan, Planner
from edgecloud.edge.retry import Retry, Timeout
from edgecloud.errors import ContextMissingError
from edgecloud.protocols import Drafter, Verifier
from edgecloud.sampling import SamplingSettings
from edgecloud.types import Round


class Unhurried:
    """Nothing is ever late."""

    def overdue_s(self, num_new_tokens: int, streaming: bool) -> float:
        return 1e9

    def lost_s(self, num_new_tokens: int, streaming: bool) -> float:
        return 1e9


class Uncounted:
    """Nobody counts the guesses."""

    def add(self, position: int, accepted: bool) -> None:
        pass


class KnowingVerifier(Verifier, Protocol):
    """A verifier that tells what its service has."""

    @property
    def known(self) -> list[int]: ...


def fly(
    prompt: Sequence[int],
    plan: Plan | Planner,
    drafter: Drafter,
    verifier: KnowingVerifier,
    sampling: SamplingSettings,
    max_new_tokens: int,
    stop_token_ids: Collection[int],
    order: Sequence[bool] = (),
) -> Iterator[Round]:
    """Yield the rounds. `order` says, in turn, whether the device comes first where it and the service both could; else it does."""
    planner = Fixed(plan) if isinstance(plan, Plan) else plan
    retry = Retry(Timeout(), None, "the service")
    limits = {"max_new_tokens": max_new_tokens, "stop_token_ids": stop_token_ids}
    pilot = Pilot(prompt, planner, retry, Unhurried(), Uncounted(), met=64, on_loss="wait", **limits)  # type: ignore[arg-type]
    drafts: list[Draft] = []
    calls: list[Verify | Iterator[Happening]] = []
    numbers: dict[int, Verify | Iterator[Happening]] = {}
    device_first = cycle(order or (True,))
    pilot.begin(0.0)
    while not pilot.finished:
        for action in pilot.actions:
            match action:
                case Draft():
                    drafts.append(action)
                case Verify(call):
                    calls.append(action)
                    numbers[call] = action
                case Decode(call, tokens, num_tokens):
                    stream = _stream(call, tokens, verifier.decode(tokens, num_tokens, sampling, stop_token_ids))
                    calls.append(stream)
                    numbers[call] = stream
                case Cancel(call):
                    calls = [other for other in calls if other is not numbers[call]]
                case Hedge():
                    raise AssertionError("nothing is ever late")
        pilot.actions.clear()
        yield from (step for step in pilot.steps if isinstance(step, Round))
        pilot.steps.clear()
        assert drafts or calls, "nothing can happen any more"
        if drafts and (not calls or next(device_first)):
            draft = drafts.pop()
            [token_id] = drafter.draft(draft.tokens, 1, sampling, stop_token_ids)
            pilot.take(Drafted(draft.version, token_id), 0.0)
        elif isinstance(call := calls[0], Verify):
            calls.pop(0)
            pilot.take(_verify(call, verifier, sampling), 0.0)
        elif (happening := next(call, None)) is None:
            calls.pop(0)
        else:
            pilot.take(happening, 0.0)
    yield from (step for step in pilot.steps if isinstance(step, Round))


def _verify(call: Verify, verifier: KnowingVerifier, sampling: SamplingSettings) -> Happening:
    if call.num_assumed is not None and verifier.known != call.tokens:
        return Failed(call.call, ContextMissingError("it was assumed to have more", 0))
    return Judged(call.call, verifier.submit(call.tokens, call.draft_ids, sampling).result())


def _stream(call: int, tokens: list[int], rounds: Iterator[Round]) -> Iterator[Happening]:
    start = len(tokens)
    for round_ in rounds:
        yield Streamed(call, start, round_.token_ids, round_.cost)
        start += len(round_.token_ids)
