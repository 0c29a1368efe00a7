"""A text that the target will say, and a draft's guesses of it, known beforehand."""

from __future__ import annotations

from collections.abc import Sequence

WRONG = 1_000_000  # a token from here on is a wrong guess


class Text:
    """Tokens are their own positions: 1, 2, 3, ...

    Args:
        num_prompt_tokens: of them, those before the answer.
        right: whether the draft, given all before, guesses the answer's token i.
    """

    def __init__(self, num_prompt_tokens: int, right: Sequence[bool]) -> None:
        self.tokens = list(range(1, num_prompt_tokens + len(right) + 1))
        self.num_prompt_tokens = num_prompt_tokens
        self._right = right

    @property
    def prompt(self) -> list[int]:
        return self.tokens[: self.num_prompt_tokens]

    @property
    def answer(self) -> list[int]:
        return self.tokens[self.num_prompt_tokens :]

    def guess(self, tokens: Sequence[int]) -> int:
        """The draft's guess of what follows; behind a wrong guess all are wrong."""
        at = len(tokens)
        if tokens[-1] >= WRONG or not self._right[at - self.num_prompt_tokens]:
            return WRONG + at
        return self.tokens[at]
