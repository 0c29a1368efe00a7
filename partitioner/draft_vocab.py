"""Which tokens a draft may propose: the frequent ones, so that its head is small. Contexts and texts keep the full vocabulary."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path

DRAFT_VOCAB = "draft_vocab.json"


def frequent_ids(sequences: Iterable[Iterable[int]], num_kept: int, vocab_size: int, always: Collection[int]) -> list[int]:
    """The `num_kept` most frequent ids, those of `always` among them, ascending.

    Ids that never occur come in the order of their numbers: tokenizers made by merging number the frequent ones first.
    """
    counts = Counter(token for sequence in sequences for token in sequence)
    ranked = sorted(range(vocab_size), key=lambda token: (token not in always, -counts[token], token))
    return sorted(ranked[: max(num_kept, len(always))])


def write_draft_vocab(folder: Path, token_ids: Collection[int]) -> None:
    """Beside the weights of a draft."""
    (folder / DRAFT_VOCAB).write_text(json.dumps({"token_ids": sorted(token_ids)}) + "\n", "utf-8")
