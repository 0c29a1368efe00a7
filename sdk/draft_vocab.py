"""The tokens that a trimmed draft may propose: `draft_vocab.json` in its model folder, and beside its graph in a bundle.

Its head has a row for each of these only. What it reads, the context, may hold any token.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

DRAFT_VOCAB = "draft_vocab.json"
KEY = "token_ids"


@dataclass(frozen=True, slots=True)
class DraftVocab:
    """Ascending ids; the row of the head for an id is its place in this list."""

    token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        ids = self.token_ids
        if not ids:
            raise ValueError(f"{KEY} is empty; list the tokens that the draft may propose")
        if wrong := next((found for found in ids if type(found) is not int), None):
            raise ValueError(f"{KEY} holds {wrong!r}; every entry is a whole number")
        if ids[0] < 0:
            raise ValueError(f"{KEY} holds {ids[0]}; a token id is 0 or more")
        for before, after in itertools.pairwise(ids):
            if after <= before:
                what = "twice" if after == before else f"after {before}"
                raise ValueError(f"{KEY} holds {after} {what}; list each id once, in ascending order")

    @classmethod
    def read(cls, path: Path) -> DraftVocab:
        """From a file. Raises ValueError, whatever is wrong with it; the message does not name the file."""
        try:
            content = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"it cannot be read as JSON: {error}") from error
        match content:
            case {"token_ids": [*ids], **others} if not others:
                return cls(tuple(ids))
        raise ValueError(f'it must hold {{"{KEY}": [...]}} and nothing else')

    def require(self, num_tokens: int, stop_token_ids: list[int]) -> None:
        """Raises ValueError: an id is no token of the model, or the draft could not propose to stop."""
        if self.token_ids[-1] >= num_tokens:
            raise ValueError(f"{KEY} holds {self.token_ids[-1]}; the model has {num_tokens} tokens, from 0 on")
        kept = set(self.token_ids)
        if missing := [token for token in stop_token_ids if token not in kept]:
            raise ValueError(f"{KEY} lacks {missing[0]}, which ends a text; add it, or the draft would never stop")

    def __len__(self) -> int:
        return len(self.token_ids)

    def fingerprint(self) -> str:
        """SHA-256 of the list, hexadecimal."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """The text of the file."""
        return json.dumps({KEY: list(self.token_ids)}) + "\n"
