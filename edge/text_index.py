"""Where the end of a text has stood in it before: chains of earlier places under a hash of two tokens, as zlib finds matches.

A token costs a bounded amount of work, however long the text and the vocabulary, and a text can be cut back as fast as it grew:
that is what guesses need, which come and go.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

SHORTEST = 2  # tokens: a single one has stood nearly anywhere
LONGEST = 32  # longer matches are not told apart
MOST_TRIED = 32  # earlier places of the same two tokens, the latest first


@dataclass(frozen=True, slots=True)
class Match:
    """The text's last `length` tokens stood before `position`, too. Length 0: they never did."""

    length: int
    position: int  # of the token that followed there


NO_MATCH = Match(0, 0)


class TextIndex:
    """A text that grows and is cut back at its end."""

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self.tokens: list[int] = []
        self._latest: dict[tuple[int, int], int] = {}  # two tokens -> position behind their latest place
        self._earlier: list[int] = []  # [i]: position behind the place before, of the two tokens that end the first i + 1; 0: none
        for token in tokens:
            self.push(token)

    def __len__(self) -> int:
        return len(self.tokens)

    def push(self, token: int) -> None:
        """Add a token."""
        self.tokens.append(token)
        end = len(self.tokens)
        if end < SHORTEST:
            self._earlier.append(0)
            return
        pair = self.tokens[-2], token
        self._earlier.append(self._latest.get(pair, 0))
        self._latest[pair] = end

    def crop_to(self, length: int) -> None:
        """Forget the tokens past `length`."""
        while len(self.tokens) > length:
            earlier = self._earlier.pop()
            if len(self.tokens) >= SHORTEST:
                pair = self.tokens[-2], self.tokens[-1]
                if earlier:
                    self._latest[pair] = earlier
                else:
                    del self._latest[pair]
            self.tokens.pop()

    def longest(self) -> Match:
        """The longest match of the text's end, of equals the latest."""
        if not self.tokens:
            return NO_MATCH
        best, position = NO_MATCH, self._earlier[-1]
        for _ in range(MOST_TRIED):
            if not position or best.length == LONGEST:
                break
            length = self._length(position)
            if length > best.length:
                best = Match(length, position)
            position = self._earlier[position - 1]
        return best

    def _length(self, position: int) -> int:
        """Of the match that ends before `position`, where two tokens are known to agree."""
        tokens, end = self.tokens, len(self.tokens)
        length, most = SHORTEST, min(LONGEST, position)
        while length < most and tokens[position - length - 1] == tokens[end - length - 1]:
            length += 1
        return length
