"""Sequences of token ids in groups of like length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def by_length(sequences: dict[int, list[int]], max_tokens: int) -> list[list[int]]:
    """Their numbers in groups of like length, of so many tokens each at most, padding included."""
    groups: list[list[int]] = []
    for number in sorted(sequences, key=lambda number: len(sequences[number])):
        if groups and (len(groups[-1]) + 1) * len(sequences[number]) <= max_tokens:
            groups[-1].append(number)
        else:
            groups.append([number])
    return groups


def padded(sequences: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """With zeros on the right, where a causal model does not look.  -> [sequences, tokens]"""
    ids = np.zeros((len(sequences), max(map(len, sequences))), np.int64)
    for row, sequence in zip(ids, sequences, strict=True):
        row[: len(sequence)] = sequence
    return torch.from_numpy(ids).to(device)
