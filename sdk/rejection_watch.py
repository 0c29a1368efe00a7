"""Looks on as a generation goes by, and notes where the target chose another token than the device had guessed.

It sees what the caller's screen sees, guesses and rounds, and takes no part in anything.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from edgecloud.rejections import Passage
from edgecloud.tokens import common_prefix
from edgecloud.types import Guess, Round

logger = logging.getLogger(__name__)

MAX_IDS = 512  # of a passage
NUM_KEPT_IDS = 128  # with which the passage after a full one begins


class RejectionWatch:
    """Watches one generation.

    Args:
        prompt: tokens before the answer; of a long one the last are kept.
        temperature: at which tokens are chosen; 0: greedy.
        keep: takes a passage in which a guess was refused.
    """

    def __init__(self, prompt: Sequence[int], temperature: float, keep: Callable[[Passage], None]) -> None:
        self._ids = list(prompt[NUM_KEPT_IDS - MAX_IDS :])
        self._answer_start = len(self._ids)
        self._rejected: list[tuple[int, int]] = []
        self._guessed: list[int] = []  # behind the ids, not settled yet
        self._temperature = temperature
        self._keep = keep

    def look(self, step: object) -> None:
        """Take in a step of the generation."""
        if isinstance(step, Guess):
            self._guessed += step.token_ids
        elif isinstance(step, Round) and step.status == "final":
            self._settle(step.token_ids)
        elif isinstance(step, Round) and step.token_ids:
            self._skip(step.token_ids)

    def finish(self) -> None:
        """The generation has ended, or was broken off: hand over what there is."""
        self._hand_over()
        self._rejected.clear()

    def _settle(self, ids: Sequence[int]) -> None:
        same = common_prefix(ids, self._guessed)
        if same < min(len(ids), len(self._guessed)):
            self._rejected.append((len(self._ids) + same, self._guessed[same]))
        self._take(ids, same)

    def _skip(self, ids: Sequence[int]) -> None:
        """Tokens that nobody verified: what follows has them as context, and nothing can be learned of themselves."""
        self._hand_over()
        self._take(ids, common_prefix(ids, self._guessed))
        self._begin_anew()

    def _take(self, ids: Sequence[int], same: int) -> None:
        self._guessed = self._guessed[same:] if same == len(ids) else []
        self._ids += ids
        if len(self._ids) >= MAX_IDS:
            self._hand_over()
            self._begin_anew()

    def _begin_anew(self) -> None:
        del self._ids[:-NUM_KEPT_IDS]
        self._answer_start = len(self._ids)
        self._rejected.clear()

    def _hand_over(self) -> None:
        if not self._rejected:
            return
        passage = Passage(tuple(self._ids), self._answer_start, tuple(self._rejected), self._temperature)
        try:
            self._keep(passage)
        except OSError as error:  # a full disk is no reason to lose an answer
            logger.warning("a passage was not kept in the rejection log: %s", error)
