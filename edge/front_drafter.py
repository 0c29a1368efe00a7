"""The front of a split target as a drafter: an exit head reads the rows that are sent anyway, so no second model is needed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import cached_property

from edgecloud.edge.exit_head import ExitHead
from edgecloud.edge.front_rows import FrontRows
from edgecloud.kernels.choice_numpy import choose
from edgecloud.sampling import SamplingSettings


class FrontDrafter:
    """Implements `protocols.Drafter`. Shares rows with the courier that sends them: each token goes through the front once.

    Args:
        rows: of the front.
        load: makes the head, when it is first needed.
    """

    def __init__(self, rows: FrontRows, load: Callable[[], ExitHead]) -> None:
        self._rows = rows
        self._load = load

    @cached_property
    def _head(self) -> ExitHead:
        return self._load()

    def draft(
        self, tokens: Sequence[int], num_draft_tokens: int, sampling: SamplingSettings, stop_token_ids: Collection[int]
    ) -> list[int]:
        """Guess one token after another. Raises ContextLengthError when the front's window is full."""
        head, guessed = self._head, list(tokens)
        for _ in range(num_draft_tokens):
            guessed.append(choose(head.logits(self._rows.last_row(guessed)), guessed, sampling, head.entries))
            if guessed[-1] in stop_token_ids:
                break
        return guessed[len(tokens) :]
