"""Guesses that no model makes: what followed when the text's last tokens stood in it before.

They cost the device nothing, so a draft may go on with them beyond its length. How far a copy is trusted is counted online, by
the length of the match: at every token that becomes final, whether a copy would have been right.
After prompt lookup decoding (Saxena, 2023) and SuffixDecoding (Oliaro et al., 2024).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from edgecloud.edge.text_index import TextIndex
from edgecloud.tokens import common_prefix

LENGTHS = (2, 3, 4, 6, 9, 16)  # matches of these lengths, and up to the next, are counted together
PRIOR_CHANCE = (0.50, 0.63, 0.73, 0.81, 0.87, 0.94)  # measured with benchmarks/lookup.py
PRIOR_WEIGHT = 20.0  # as of so many tokens
MEMORY_TOKENS = 200.0  # of one class; then an observation counts 1/e
PRIOR_MODEL = 0.7  # the model's acceptance, before it is known
LESS_WRONG = 0.5  # where the text repeats itself the model errs less than elsewhere, by this factor
FREE_CHANCE = 0.6  # of a copy beyond the draft's length
FREE_SURVIVAL = 0.25  # of all copies in a row: about what the fourth token of a model's draft has


class _Share:
    """How often something was so, of late."""

    def __init__(self, prior: float) -> None:
        self.value = prior
        self._weight = PRIOR_WEIGHT

    def add(self, yes: bool) -> None:
        self._weight = min(self._weight + 1, MEMORY_TOKENS)
        self.value += (yes - self.value) / self._weight


class Trust:
    """What copies, and the model's guesses, have been worth to one client."""

    def __init__(self) -> None:
        self._copies = [_Share(chance) for chance in PRIOR_CHANCE]
        self._model = _Share(PRIOR_MODEL)

    def chance(self, length: int) -> float:
        """That a copy after a match of this length is right."""
        return self._copies[bisect_right(LENGTHS, length) - 1].value if length >= LENGTHS[0] else 0.0

    @property
    def least(self) -> float:
        """The chance from which on a copy is as good as the model's guess."""
        return 1.0 - LESS_WRONG * (1.0 - self._model.value)

    def copied(self, length: int, right: bool) -> None:
        """A copy after a match of this length would have been right, or not."""
        if length >= LENGTHS[0]:
            self._copies[bisect_right(LENGTHS, length) - 1].add(right)

    def guessed(self, right: bool) -> None:
        """A guess of the model's was right, or not."""
        self._model.add(right)


class Lookup:
    """Copies for one generation.

    Args:
        prompt: tokens before the answer.
        trust: of the client; is added to.
        alone: there is no model, so that any copy is better than none.
    """

    def __init__(self, prompt: Sequence[int], trust: Trust, *, alone: bool = False) -> None:
        self.alone = alone
        self._trust = trust
        self._index = TextIndex(prompt)
        self._num_final = len(prompt)

    def copies(self, tail: Sequence[int], num_missing: int, most: int) -> list[int]:
        """Up to `most` tokens that follow the final ones and `tail`, the device's guesses.

        The first `num_missing` are given only where a copy is as good as the model's guess; those beyond cost nothing, and are
        given while they are likely enough to be right.
        """
        index = self._index
        guessed = self._num_final + common_prefix(index.tokens[self._num_final :], tail)
        index.crop_to(guessed)
        for token in tail[guessed - self._num_final :]:
            index.push(token)
        copied: list[int] = []
        survival = 1.0
        while len(copied) < most:
            match = index.longest()
            chance = self._trust.chance(match.length)
            survival *= chance
            free = len(copied) >= num_missing
            least = FREE_CHANCE if free else 0.0 if self.alone else self._trust.least
            if not match.length or chance < least or (free and survival < FREE_SURVIVAL):
                break
            copied.append(index.tokens[match.position])
            index.push(copied[-1])
        return copied

    def settle(self, token_ids: Sequence[int]) -> None:
        """These tokens have become final: learns what a copy would have been worth at each."""
        index = self._index
        index.crop_to(self._num_final)
        for token in token_ids:
            match = index.longest()
            self._trust.copied(match.length, index.tokens[match.position] == token)
            index.push(token)
        self._num_final = len(index)

    def judge(self, right: bool) -> None:
        """A guess of the model's has turned out right, or not."""
        self._trust.guessed(right)
