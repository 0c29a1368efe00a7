"""A few passes over a fresh target, to see what it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from edgecloud.cloud.attention import AttentionForm, KVPool, PagedBatch, Rows, pack
from edgecloud.cloud.pages import PagePool, PageTable
from edgecloud.kernels.attention import Segment
from edgecloud.kernels.backend import backend_for

NUM_TOKENS = 24
PACKINGS = ((24,), (1, 6, 17))  # the same tokens in other chunks
# Of a long context, tried on random numbers: (first position, rows, where its slots begin)
LONG = 700
STRETCHES = ((0, 128, 0), (128, 128, 0), (250, 9, 800), (290, 33, 0), (512, 3, 800), (600, 100, 0))


class Trial:
    """Some ids, and what a target says of them."""

    def __init__(self, forward: Callable[[PagedBatch], Tensor], vocab_size: int, device: torch.device) -> None:
        self.ids = [(7919 * i + 13) % vocab_size for i in range(NUM_TOKENS)]
        self._forward = forward
        self._device = device
        self.pool = KVPool(3 * NUM_TOKENS)
        self._pages = PagePool(3 * NUM_TOKENS, 1)

    def logits(self, chunks: Sequence[int], others: Sequence[int] = ()) -> Tensor:
        """After every token, computed in such chunks; `others` are another session's in every pass.  -> [tokens, vocab]"""
        table, neighbour = PageTable(self._pages), PageTable(self._pages)
        got = []
        start = 0
        for chunk in chunks:
            parts = [Rows(table, start, self.ids[start : start + chunk], chunk)]
            if others:
                parts.insert(0, Rows(neighbour, 0, others, 1))
            for rows in parts:
                rows.table.reserve(rows.start + len(rows.ids))
            got.append(self._forward(pack(parts, self.pool, self._device))[-chunk:])
            start += chunk
        table.release()
        neighbour.release()
        return torch.cat(got)

    def spread(self, window: int) -> None:
        """Passes over several rows and over one, which lie as far from each other as positions go; what they say is of no use."""
        positions = torch.linspace(0, window - 1, NUM_TOKENS, dtype=torch.float64).long().to(self._device)
        for rows in (slice(0, NUM_TOKENS - 1), slice(NUM_TOKENS - 1, None)):
            table = PageTable(self._pages)
            ids = self.ids[rows]
            table.reserve(len(ids))
            batch = pack([Rows(table, 0, ids, len(ids))], self.pool, self._device)
            self._forward(replace(batch, position_ids=positions[None, rows]))
            table.release()

    def is_invariant(self, logits: Tensor) -> bool:
        """Whether other chunks, company and places in the pool give the same bits, over short contexts and long ones."""
        dtype = logits.dtype
        return all(torch.equal(self.logits(chunks, self.ids[:3]), logits) for chunks in PACKINGS) and all(
            form.plain and _is_invariant(form, dtype, self._device) for form in set(self.pool.forms.values())
        )


def _is_invariant(form: AttentionForm, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a row attends to a long context with the same bits alone and among others."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    query = random(LONG, form.heads, form.head_dim)
    pools = random(form.kv_heads, 2000, form.head_dim), random(form.kv_heads, 2000, form.head_dim)
    for pool in pools:
        pool[:, 800 : 800 + LONG] = pool[:, :LONG]
    kernel = backend_for(device.type).ragged_paged_attention

    def attend(rows: Tensor, segment: Segment) -> Tensor:
        return kernel(rows, *pools, [segment], form.head_dim**-0.5, None, None)

    for start, count, slot in STRETCHES:
        stop = start + count
        together = attend(query[start:stop], Segment(0, count, stop, ((slot, slot + stop),)))
        for row in {0, count // 2, count - 1}:
            length = start + row + 1
            alone = attend(query[length - 1 : length], Segment(0, 1, length, ((0, length),)))
            if not torch.equal(alone[0], together[row]):
                return False
    return True
