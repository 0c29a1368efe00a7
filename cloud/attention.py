"""The attention function that lets a stock transformers model run on packed tokens and a paged cache.

Registered once under a name; a model loaded with `attn_implementation=PAGED_ATTENTION` calls it in every layer and hands
through the `paged_batch` that its forward was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own habit
from torch import Tensor, nn
from transformers import AttentionInterface

from edgecloud.cloud.pages import PageTable
from edgecloud.kernels.attention import Segment, Segments
from edgecloud.kernels.backend import backend_for

PAGED_ATTENTION = "edgecloud_paged"


class AttentionForm(NamedTuple):
    """What a layer asks of the attention."""

    heads: int
    kv_heads: int
    head_dim: int
    scaling: float
    sliding_window: int | None
    softcap: float | None

    @property
    def plain(self) -> bool:
        """Neither a sliding window nor a soft cap."""
        return self.sliding_window is None and self.softcap is None


class KVPool:
    """Keys and values of all sessions: per layer [kv_heads, slots, head_dim], zeros, made when a layer first writes.

    Behind the last slot lies a tile more: attention reads, and masks, up to that much beyond a context.
    Untouched slots cost no memory until they are written, where the allocator maps lazily (CPU); on other devices the pool is
    reserved at once.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.forms: dict[int, AttentionForm] = {}  # what each layer asked for
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store key and value rows ([kv_heads, rows, dim]) at `slots` and return the layer's whole pool."""
        if layer not in self._layers:
            num_slots = self.num_slots + backend_for(key.device.type).tile
            self._layers[layer] = (
                key.new_zeros(key.shape[0], num_slots, key.shape[2]),
                value.new_zeros(value.shape[0], num_slots, value.shape[2]),
            )
        keys, values = self._layers[layer]
        keys.index_copy_(1, slots, key)
        values.index_copy_(1, slots, value)
        return keys, values

    def copy(self, source: int, target: int, count: int) -> None:
        """Copy `count` slots from `source` on to `target` on, in every layer: part of one page, when a shared one is left."""
        with torch.inference_mode():  # as the layers were made
            for layer in self._layers.values():
                for pool in layer:
                    pool[:, target : target + count] = pool[:, source : source + count]

    @property
    def is_finite(self) -> bool:
        """Whether every key and value is."""
        return all(bool(t.isfinite().all()) for pair in self._layers.values() for t in pair)

    @property
    def num_layers(self) -> int:
        """Layers that have written."""
        return len(self._layers)

    @property
    def bytes_per_slot(self) -> int:
        """Bytes that one token takes, over all layers that have written."""
        return sum(t.element_size() * t.shape[0] * t.shape[2] for pair in self._layers.values() for t in pair)


class Entry(NamedTuple):
    """Rows that come into a pass at a layer: somebody else has taken them through those before it."""

    layer: int
    row: int  # the first of them; they are all that follow, up to those of the next entry
    segment: int  # theirs alike
    hidden: list[Tensor]  # [rows, width] each: what the layer takes


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """One pass: the packed tokens of several sessions and where their keys and values live."""

    input_ids: Tensor  # [1, rows]; of rows that enter later any
    position_ids: Tensor  # [1, rows]
    slots: Tensor  # [rows] int64: where each row's key and value go
    segments: Segments
    logits_rows: Tensor  # [choices] int64: rows whose logits are wanted
    pool: KVPool
    entries: tuple[Entry, ...] = ()  # by layer; the rows before the first one's enter at layer 0


class Rows(NamedTuple):
    """A session's part of a pass: its tokens from position `start` on, of which the last `num_choices` want logits."""

    table: PageTable
    start: int
    ids: Sequence[int]
    num_choices: int
    layer: int = 0  # where they enter
    hidden: Tensor | None = None  # in the place of what the ids say, where that is not layer 0


def pack(parts: Sequence[Rows], pool: KVPool, device: torch.device, *, bitwise: bool = True) -> PagedBatch:
    """One packed batch, without padding, of parts in the order of their layers.

    `bitwise`: the bits of a row shall depend on nothing but the row and its context.
    """
    input_ids: list[int] = []
    position_ids: list[int] = []
    slots: list[int] = []
    segments: list[Segment] = []
    logits_rows: list[int] = []
    entries: list[Entry] = []
    for table, start, ids, num_choices, layer, hidden in parts:
        first, stop = len(input_ids), start + len(ids)
        if hidden is not None:
            if not entries or entries[-1].layer != layer:
                entries.append(Entry(layer, first, len(segments), []))
            entries[-1].hidden.append(hidden)
        input_ids += ids
        position_ids += range(start, stop)
        slots += table.slots(start, stop)
        segments.append(Segment(first, len(input_ids), stop, table.runs(stop)))
        logits_rows += range(len(input_ids) - num_choices, len(input_ids))
    return PagedBatch(
        input_ids=tensor_ids(input_ids, device)[None],
        position_ids=tensor_ids(position_ids, device)[None],
        slots=tensor_ids(slots, device),
        segments=Segments(segments, bitwise=bitwise),
        logits_rows=tensor_ids(logits_rows, device),
        pool=pool,
        entries=tuple(entries),
    )


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    paged_batch: PagedBatch,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The signature that transformers calls. query: [1, heads, rows, head_dim] -> [1, rows, heads, head_dim].

    Rows beyond those of the batch are padding for the projections: nothing of them is stored or attended to.
    """
    assert attention_mask is None, "packed batches carry their own mask"
    assert dropout == 0.0, "the target is never trained here"
    layer: int = module.layer_idx  # type: ignore[assignment]  # transformers sets it on every attention module
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    form = AttentionForm(query.shape[1], key.shape[1], query.shape[3], scale, sliding_window, softcap)
    paged_batch.pool.forms[layer] = form
    rows, keys, values = (heads[0].transpose(0, 1) for heads in (query, key, value))
    return attend(layer, rows.contiguous(), keys, values, form, paged_batch).unsqueeze(0), None


def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, form: AttentionForm, batch: PagedBatch) -> Tensor:
    """Store the rows' keys and values in the layer's pool, and let them attend to their contexts there.

    query: [rows, heads, head_dim], every row contiguous; key, value: [rows, kv_heads, dim]  -> [rows, heads, value_dim]
    """
    num_rows = len(batch.slots)
    extra = query.shape[0] - num_rows
    if extra:
        query, key, value = query[:num_rows], key[:num_rows], value[:num_rows]
    keys, values = batch.pool.write(layer, batch.slots, key.transpose(0, 1), value.transpose(0, 1))
    kernel = backend_for(query.device.type).ragged_paged_attention
    out = kernel(query, keys, values, batch.segments, form.scaling, form.sliding_window, form.softcap)
    return F.pad(out, (0, 0, 0, 0, 0, extra)) if extra else out


def register() -> None:
    """Make the function known to transformers. Calling it again changes nothing."""
    AttentionInterface.register(PAGED_ATTENTION, paged_attention)


def tensor_ids(ids: list[int], device: torch.device) -> Tensor:
    """Ids as int64 on the device."""
    return torch.tensor(ids, dtype=torch.int64, device=device)
