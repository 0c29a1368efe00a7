"""How many rows of prompts go into a pass beside short requests."""

from __future__ import annotations

import math
import statistics
import sys
from collections import deque

from edgecloud.cloud.pass_cost import PassCostFit
from edgecloud.cloud.projections import padded_rows

STRETCH = 1.4  # prompts may make the pass of others this much longer
SMALLEST_CHUNK_ROWS = 8  # and get on by at least so much
UNTRIED_CHUNK_ROWS = 64  # while it is not known what a row costs
GROWTH = 1.25  # of passes, from one that kept the bound to the next: beyond what was tried, rows may cost more than they did
NUM_ALONE = 5  # passes of short requests alone whose median is believed
UNMEASURED_PASSES = 32  # with prompts, then one without: what others' passes take alone is measured again and again


class PromptRoom:
    """Keeps passes within `stretch` of what they would take without prompts; with an infinite one prompts take all the room.

    What they would take is measured, not fitted: after some passes with prompts a line through all goes through those, and is wrong
    about passes of few rows. What they take with prompts is fitted to such passes only, and tried step by step.
    """

    def __init__(self, fit: PassCostFit, stretch: float = STRETCH) -> None:
        self._stretch = stretch
        self._fit = fit  # to all passes: believed where nothing better is known
        self._beside = PassCostFit()
        self._alone: deque[tuple[int, float]] = deque(maxlen=NUM_ALONE)  # rows and milliseconds
        self._num_beside = 0  # passes with prompts since one without
        self._most_rows = 0  # of a pass

    def rows(self, num_short: int, num_context: int, prompt_context: int) -> int:
        """For prompts that have read `prompt_context` tokens, beside `num_short` rows that attend to `num_context` tokens in all.

        0: they wait for one pass.
        """
        if math.isinf(self._stretch):
            return sys.maxsize
        if self._num_beside >= UNMEASURED_PASSES:
            return 0
        if not self._fit.is_trusted:
            return UNTRIED_CHUNK_ROWS
        fit = self._beside if self._beside.is_trusted else self._fit
        spare_ms = self._stretch * self._alone_ms(num_short, num_context) - fit.predict_ms(num_short, num_context + prompt_context)
        cost = fit.cost
        per_row_ms = cost.per_token_ms + cost.per_context_token_ms  # a row attends to itself as well
        num_rows = min(self._most_rows, num_short + int(spare_ms / max(per_row_ms, 1e-3)))
        return max(SMALLEST_CHUNK_ROWS, _unpadded(num_rows) - num_short)

    def observe(self, num_short: int, num_prompt: int, num_context: int, took_ms: float) -> None:
        """Learn from a pass of so many rows of either kind."""
        if num_short and num_prompt:
            num_rows = num_short + num_prompt
            self._beside.observe(num_rows, num_context, took_ms)
            self._num_beside += 1
            kept = took_ms <= self._stretch * self._alone_ms(num_short, num_context)
            self._most_rows = max(padded_rows(num_rows + 1), int(GROWTH * num_rows)) if kept else int(num_rows / GROWTH)
        elif num_short:
            self._alone.append((num_short, took_ms))
            self._num_beside = 0
            self._most_rows = int(self._most_rows / GROWTH)

    def _alone_ms(self, num_short: int, num_context: int) -> float:
        """As measured lately; if nothing like it was, as fitted."""
        like_it = [took_ms for num_rows, took_ms in self._alone if padded_rows(num_rows) == padded_rows(num_short)]
        return statistics.median(like_it) if like_it else self._fit.predict_ms(num_short, num_context)


def _unpadded(num_rows: int) -> int:
    """At most so many, and a number that is padded with none."""
    while num_rows > 0 and padded_rows(num_rows) != num_rows:
        num_rows -= 1
    return num_rows
