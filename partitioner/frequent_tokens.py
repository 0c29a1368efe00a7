"""Which tokens a draft may propose: the frequent ones, so that its head is small."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

from edgecloud.draft_vocab import DraftVocab


def frequent_tokens(sequences: Iterable[Iterable[int]], num_kept: int, vocab_size: int, always: Collection[int]) -> DraftVocab:
    """The `num_kept` most frequent ids, those of `always` among them.

    Ids that never occur come in the order of their numbers: tokenizers made by merging number the frequent ones first.
    """
    counts = Counter(token for sequence in sequences for token in sequence)
    ranked = sorted(range(vocab_size), key=lambda token: (token not in always, -counts[token], token))
    return DraftVocab(tuple(sorted(ranked[: max(num_kept, len(always))])))
