"""Which tokens the entries of a row of logits stand for: all ids from 0 on, or those that a trimmed draft keeps.

What the noise of these tokens needs is worked out once, so that a choice costs what the entries cost, not the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

LANES = 4  # tokens that share a counter of the noise

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Entries:
    """Entry i stands for token `ids[i]`, or for i where `ids` is None. Made by `all_entries` and `kept_entries`."""

    ids: Ids | None  # ascending, so that the first of equal entries is the lowest token
    blocks: npt.NDArray[np.uint64]  # counters that the noise of these tokens comes from
    lanes: Ids | slice  # where each entry's noise is among that of all blocks, in a row

    def tokens(self, places: Ids) -> Ids:
        """The tokens at these places of the row."""
        return places if self.ids is None else self.ids[places]

    def token(self, place: int) -> int:
        """The token at one place."""
        return place if self.ids is None else int(self.ids[place])

    def places(self, tokens: Ids, num_entries: int) -> Ids:
        """Where those of `tokens` (ascending) stand that have an entry."""
        if self.ids is None:
            return tokens[: np.searchsorted(tokens, num_entries)]
        found = np.searchsorted(self.ids, tokens)
        inside = found < len(self.ids)
        inside[inside] = self.ids[found[inside]] == tokens[inside]
        return found[inside]


def kept_entries(token_ids: Sequence[int]) -> Entries:
    """For logits of these tokens only. Raises ValueError where they are not ascending from 0 or more."""
    ids = np.asarray(token_ids, np.int64)
    if not len(ids) or ids[0] < 0 or not (np.diff(ids) > 0).all():
        raise ValueError(f"kept token ids must ascend from 0 or more: {list(token_ids[:4])}...")
    blocks, where = np.unique(ids // LANES, return_inverse=True)
    return Entries(ids, blocks.astype(np.uint64), where * LANES + ids % LANES)


@lru_cache(maxsize=4)  # a process has a model or two
def all_entries(num_entries: int) -> Entries:
    """For logits of a whole vocabulary."""
    return Entries(None, np.arange((num_entries + LANES - 1) // LANES, dtype=np.uint64), slice(num_entries))
