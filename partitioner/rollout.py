"""What a token cascade would say: roll-outs of draft and target under an exit threshold, and what each got wrong.

Contexts are those that the cascade itself reaches, after tokens that were skipped and may be wrong. Roll-outs of one prompt share
every context that they have in common, so a dozen thresholds cost little more than two.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from edgecloud.errors import ModelError

NEVER = math.inf  # no score reaches it: the target's own answer
ALWAYS = 0.0  # every score does: the draft's own answer


class Guesser(Protocol):
    """The draft."""

    def guess(self, tokens: Sequence[int]) -> tuple[int, float]:
        """The token it would draft after `tokens`, and the score of that guess, 0 to 1."""
        ...


class Chooser(Protocol):
    """The target."""

    def choose(self, tokens: Sequence[int], first: int) -> list[int]:
        """Its choices after `tokens[:first]` and every longer part of them, in one pass.  -> [len(tokens) - first + 1]"""
        ...


@dataclass(slots=True)
class _Context:
    guess: int
    score: float
    choice: int | None  # None: the target was not asked yet


@dataclass(frozen=True, slots=True)
class Rollout:
    """One answer under one threshold. A token with a score of at least the threshold was skipped: it is the draft's guess."""

    token_ids: list[int]
    scores: list[float]  # of the draft's guess at each of them
    mismatched: list[bool]  # the guess is not the target's choice in this context

    def counts(self, threshold: float) -> tuple[int, int, int]:
        """Tokens; those with such a score; of these, the mismatched."""
        exits = [wrong for score, wrong in zip(self.scores, self.mismatched, strict=True) if score >= threshold]
        return len(self.token_ids), len(exits), sum(exits)


class Rollouts:
    """All roll-outs of one prompt."""

    def __init__(
        self, prompt: Sequence[int], draft: Guesser, target: Chooser, max_new_tokens: int, stop_token_ids: Collection[int]
    ) -> None:
        self._prompt = list(prompt)
        self._draft = draft
        self._target = target
        self._max_new_tokens = max_new_tokens
        self._stop_token_ids = stop_token_ids
        self._contexts: dict[tuple[int, ...], _Context] = {}
        self._known: dict[tuple[int, ...], int] = {}  # choices of the target that came with others

    def expect(self, answer: Sequence[int]) -> None:
        """An answer that the target is likely to give: its choices along it are had in one pass, and are the target's own."""
        answer = list(answer[: self._max_new_tokens])
        choices = self._target.choose(self._prompt + answer, len(self._prompt))
        self._known |= {tuple(answer[:at]): choice for at, choice in enumerate(choices)}

    def roll(self, threshold: float) -> Rollout:
        """Skip every guess with a score of at least `threshold`; elsewhere take the target's choice."""
        log: list[int] = []
        while len(log) < self._max_new_tokens and (not log or log[-1] not in self._stop_token_ids):
            context = self._context(log)
            if context.score >= threshold:
                log.append(context.guess)
            else:
                log.append(self._choice(log))
        return self._judged(log)

    def _judged(self, log: list[int]) -> Rollout:
        unjudged = [at for at in range(len(log)) if self._context(log[:at]).choice is None]
        if unjudged:
            self._ask(log[: unjudged[-1]], unjudged[0])
        contexts = [self._context(log[:at]) for at in range(len(log))]
        mismatched = [context.guess != context.choice for context in contexts]
        return Rollout(log, [context.score for context in contexts], mismatched)

    def _context(self, log: list[int]) -> _Context:
        key = tuple(log)
        if (found := self._contexts.get(key)) is None:
            guess, score = self._draft.guess(self._prompt + log)
            found = self._contexts[key] = _Context(guess, score, self._known.get(key))
        return found

    def _choice(self, log: list[int]) -> int:
        if (choice := self._context(log).choice) is None:
            self._ask(log, len(log))
            choice = self._context(log).choice
        if choice is None:
            raise ModelError(f"the target made no choice after {len(log)} tokens of an answer")
        return choice

    def _ask(self, log: list[int], first: int) -> None:
        """The target's choices after `log[:first]` and all that is longer."""
        choices = self._target.choose(self._prompt + log, len(self._prompt) + first)
        for at, choice in enumerate(choices, first):
            self._known[tuple(log[:at])] = choice
            if (context := self._contexts.get(tuple(log[:at]))) is not None:
                context.choice = choice
