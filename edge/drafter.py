"""The draft model as a drafter: it guesses with the same coupled choice that the target decides by."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import cached_property

from edgecloud.edge.model import DraftModel
from edgecloud.kernels.choice_numpy import choose
from edgecloud.kernels.confidence import top_probability
from edgecloud.sampling import SamplingSettings


class ModelDrafter:
    """Implements `protocols.Drafter` on a DraftModel, loaded when it is first needed. Remembers nothing but the model's cache."""

    def __init__(self, load: Callable[[], DraftModel], vocab_size: int) -> None:
        self._load = load
        self._vocab_size = vocab_size  # ids that both models know; a padded one knows more

    @cached_property
    def _model(self) -> DraftModel:
        return self._load()

    def draft(
        self, tokens: Sequence[int], num_draft_tokens: int, sampling: SamplingSettings, stop_token_ids: Collection[int]
    ) -> list[int]:
        """Guess one token after another. Raises ContextLengthError when the draft model's window is full."""
        guessed = list(tokens)
        for _ in range(num_draft_tokens):
            logits = self._model.extend_to(guessed)[: self._vocab_size]
            guessed.append(choose(logits, guessed, sampling, self._model.entries))
            if guessed[-1] in stop_token_ids:
                break
        return guessed[len(tokens) :]

    def guess(self, tokens: Sequence[int], sampling: SamplingSettings) -> tuple[int, float]:
        """One token, and the probability of the most likely one. Raises as `draft`."""
        logits = self._model.extend_to(list(tokens))[: self._vocab_size]
        return choose(logits, tokens, sampling, self._model.entries), top_probability(logits, sampling)
