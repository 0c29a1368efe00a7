"""A few passes over a fresh target whose rows enter at every layer, to see whether it can be entered there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from edgecloud.cloud.attention import KVPool, PagedBatch, Rows, pack
from edgecloud.cloud.pages import PagePool, PageTable
from edgecloud.cloud.stages import Stages

CHUNKS = (3, 1)  # tokens of each session, in a pass and one more
NUM_TOKENS = sum(CHUNKS)


def why_not_entered(
    forward: Callable[[PagedBatch], Tensor],
    stages: Stages,
    ids: Sequence[int],
    is_right: Callable[[Tensor], bool],
    largest: float,
    device: torch.device,
) -> str | None:
    """What keeps rows that enter at a layer from coming out as if they had been there from the first; None: nothing, at any layer.

    Every cut has a session, all in one pass with one of ids, as much alike as can be: what a layer takes, seen in a pass over ids
    alone, is what the others bring to it. `is_right` judges logits [tokens, vocab] after the first of `ids`. Besides, values up to
    `largest` must leave nothing in the cache that is not finite: whoever gets those slots next would read it, masked.
    """
    try:
        trial = _Trial(forward, len(stages), device)
        taken = trial.taken(stages, ids[:NUM_TOKENS])
        if len(taken) != len(stages) or not stages:
            return "its layers are not one list, each called once"
        for layer, logits in enumerate(trial.logits(ids[:NUM_TOKENS], taken)):
            if not is_right(logits):
                return f"logits are others where rows enter at layer {layer}"
        loud = largest * _patterns(taken[0].shape[-1], device)
        finite = all(bool(logits.isfinite().all()) for logits in trial.logits(ids[:NUM_TOKENS], [loud] * len(stages)))
    except (AttributeError, TypeError, ValueError, IndexError, RuntimeError) as error:  # its layers are called in another way
        return f"{type(error).__name__}: {error}"
    return None if finite and trial.pool.is_finite else f"values up to {largest:g} overflow"


def _patterns(width: int, device: torch.device) -> Tensor:
    """Rows of ones: all, every second one negative, one alone, none.  -> [tokens, width]"""
    rows = torch.zeros(NUM_TOKENS, width, device=device)
    rows[0] = 1.0
    rows[1, 0::2], rows[1, 1::2] = 1.0, -1.0
    rows[2, width // 2] = 1.0
    return rows


class _Trial:
    """Sessions, one for each layer that rows may enter at."""

    def __init__(self, forward: Callable[[PagedBatch], Tensor], num_layers: int, device: torch.device) -> None:
        self._forward = forward
        self._num_layers = num_layers
        self._device = device
        self.pool = KVPool(num_layers * NUM_TOKENS)

    def taken(self, stages: Stages, ids: Sequence[int]) -> list[Tensor]:
        """What every layer takes in a pass over `ids`.  -> [tokens, width] float32 each"""
        table = PageTable(PagePool(NUM_TOKENS, 1))
        table.reserve(NUM_TOKENS)
        with stages.recorded() as taken:
            self._forward(pack([Rows(table, 0, ids, 1)], self.pool, self._device))
        return [hidden[0, :NUM_TOKENS].float() for hidden in taken]

    def logits(self, ids: Sequence[int], taken: Sequence[Tensor]) -> Iterator[Tensor]:
        """Of a session of ids, and of one that enters at each further layer.  -> [tokens, vocab] each"""
        pages = PagePool(self._num_layers * NUM_TOKENS, 1)
        tables = [PageTable(pages) for _ in range(self._num_layers)]
        got: list[list[Tensor]] = [[] for _ in tables]
        for start, stop in pairwise(accumulate(CHUNKS, initial=0)):
            parts = []
            for layer, table in enumerate(tables):
                table.reserve(stop)
                hidden = taken[layer][start:stop] if layer else None
                parts.append(Rows(table, start, ids[start:stop], stop - start, layer, hidden))
            logits = self._forward(pack(parts, self.pool, self._device))
            for chunks, chunk in zip(got, torch.split(logits, stop - start), strict=True):
                chunks.append(chunk)
        return (torch.cat(chunks) for chunks in got)
