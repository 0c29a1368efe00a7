"""Ragged paged attention in torch. See attention.py for the contract.

A row gets the same bits alone, in company, in a chunk of any length and from pages that lie anywhere: keys are taken in tiles
cut at absolute positions, every product has one of a few widths, and whatever lies beyond a row's position is masked. A tile
that lies in one run of slots is read as a view of the pool; only one that a border of two runs cuts is put together first. Equality
rests on two properties of torch's flash attention on CPUs, which cloud/trial.py checks at start-up: the bits of a row do not
depend on how many rows come with it, nor on masked keys up to the width.

Grouped query heads become rows of their kv head, so keys are never repeated in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from edgecloud.kernels.attention import Segment, Segments

TILE = 512  # keys in a tile; torch's kernel takes as many at a time
ROW_BLOCK = 128  # rows in a product: it goes through every key up to its last row's, masked or not
FEWEST_ROWS = 8  # of a product: fewer take other code in some matrix libraries
# A tile's last keys are padded to one of these: some matrix libraries add in another order from 257 keys on.
WIDTHS = (64, 128, 192, 256, TILE)

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def ragged_paged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    segments: Sequence[Segment],
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Shapes as in the reference: [rows, heads, head_dim] -> [rows, heads, value_dim].

    Slots behind a context are read and masked, so they must hold finite numbers.
    """
    num_rows, heads, head_dim = query.shape
    kv_heads, num_slots, _ = keys.shape
    group = heads // kv_heads
    grouped = query.view(num_rows, kv_heads, group, head_dim)
    if not isinstance(segments, Segments):
        segments = Segments(segments)
    pools = keys.unsqueeze(0), values.unsqueeze(0)
    plain = softcap is None and keys.shape[2] == values.shape[2]
    parts: list[Tensor] = []  # [rows, kv_heads, group, value_dim]
    singles: list[_Block] = []  # not yet in parts
    for segment, blocks in zip(segments, _plan(segments, group, num_slots, query.dtype, query.device), strict=True):
        scored = not plain or (sliding_window is not None and segment.length > sliding_window)
        if segment.num_rows == 1 and not scored:
            singles.append(blocks[0])
            continue
        if singles:
            parts.append(_single_rows(grouped, *pools, singles, scaling, segments.bitwise))
            singles = []
        if scored:
            rows = query[segment.start : segment.stop]
            parts.append(_scored(rows, keys, values, segment, scaling, sliding_window, softcap))
        else:
            parts += [_several_rows(grouped, *pools, block, scaling) for block in blocks]
    if singles:
        parts.append(_single_rows(grouped, *pools, singles, scaling, segments.bitwise))
    attended = parts[0] if len(parts) == 1 else torch.cat(parts)
    return attended.reshape(num_rows, heads, -1)


def _single_rows(grouped: Tensor, keys: Tensor, values: Tensor, blocks: Sequence[_Block], scaling: float, bitwise: bool) -> Tensor:
    """Blocks of a row each, one behind the other.  -> [rows, kv_heads, group, value_dim]"""
    group = grouped.shape[2]
    rows = grouped[blocks[0].row : blocks[-1].row + 1]
    if bitwise:  # a copy, for a product's rows may not all be the same memory
        rows = rows.unsqueeze(2).expand(-1, -1, _times(group), -1, -1).flatten(2, 3).contiguous()
    each = torch.split_with_sizes(rows, [1] * len(blocks))
    parts = [_over_tiles(row, keys, values, block, scaling) for row, block in zip(each, blocks, strict=True)]
    attended = parts[0] if len(parts) == 1 else torch.cat(parts)
    return attended[:, :, :group]


def _several_rows(grouped: Tensor, keys: Tensor, values: Tensor, block: _Block, scaling: float) -> Tensor:
    """A block's rows, with their group's heads as rows of one product.  -> [rows, kv_heads, group, value_dim]"""
    kv_heads, group, head_dim = grouped.shape[1:]
    rows = grouped[block.row : block.row + block.count]
    if block.padded > block.count:
        rows = torch.cat([rows, rows[-1:].expand(block.padded - block.count, -1, -1, -1)])
    q = rows.transpose(0, 1).reshape(1, kv_heads, block.padded * group, head_dim)
    attended = _over_tiles(q, keys, values, block, scaling)
    return attended[0].view(kv_heads, block.padded, group, -1).transpose(0, 1)[: block.count]


@dataclass(frozen=True, slots=True)
class _Tile:
    """Keys to attend to: `count` positions from `start` on, read as `width`; in one run from `slot` on, or in several."""

    start: int
    count: int
    width: int
    slot: int | None
    bias: Tensor | None  # [rows * group, width], added to the scores; None: all is seen


@dataclass(frozen=True, slots=True)
class _Block:
    """Rows that lie in one tile, cut at absolute positions, and the tiles that they attend to: their own first."""

    segment: Segment
    row: int
    count: int
    padded: int  # rows of the product
    tiles: tuple[_Tile, ...]


def _times(group: int) -> int:
    """How often a single row's group of heads goes into a product."""
    return -(-FEWEST_ROWS // group)


def _plan(segments: Segments, group: int, num_slots: int, dtype: torch.dtype, device: torch.device) -> list[list[_Block]]:
    """The blocks of every segment, which are the same in every layer of a pass."""
    key = (group, num_slots, dtype, device)
    if key not in segments.plans:
        segments.plans[key] = [list(_blocks(segment, segments.bitwise, *key)) for segment in segments]
    plan: list[list[_Block]] = segments.plans[key]
    return plan


def _blocks(
    segment: Segment, bitwise: bool, group: int, num_slots: int, dtype: torch.dtype, device: torch.device
) -> Iterator[_Block]:
    position, row = segment.length - segment.num_rows, segment.start
    while row < segment.stop:
        count = min(segment.stop - row, ROW_BLOCK - position % ROW_BLOCK)
        alone = segment.num_rows == 1
        padded = 1 if alone else _padded(count, group)
        last_tile, offset = divmod(position, TILE)
        num_keys = offset + count
        width = next(width for width in WIDTHS if width >= num_keys)
        bias: Tensor | None
        if alone and not bitwise:  # just the keys there are
            width, bias = num_keys, None
        elif alone:  # its group's heads, several times
            bias = causal_bias(1, dtype, device)[offset : offset + 1, :width].expand(_times(group) * group, -1)
        else:
            bias = causal_bias(group, dtype, device)[offset * group : (offset + padded) * group, :width]
        own = _Tile(last_tile * TILE, num_keys, width, _slot(segment, last_tile * TILE, num_keys, width, num_slots), bias)
        before = (
            _Tile(start, TILE, TILE, _slot(segment, start, TILE, TILE, num_slots), None)
            for start in range(0, last_tile * TILE, TILE)
        )
        yield _Block(segment, row, count, padded, (own, *before))
        position, row = position + count, row + count


def _padded(count: int, group: int) -> int:
    """Rows to make of `count`: no product, nor the rest after whole blocks of 32 in torch's kernel, is of few rows."""
    if count * group <= 32:
        return max(count, -(-FEWEST_ROWS // group))
    return -(-count // FEWEST_ROWS) * FEWEST_ROWS


def _slot(segment: Segment, start: int, count: int, width: int, num_slots: int) -> int | None:
    """Where positions from `start` on lie in one run, with room behind it for `width`; None: nowhere."""
    at = 0
    for first, last in segment.runs:
        length = last - first
        if start < at + length:
            slot = first + start - at
            return slot if start + count <= at + length and slot + width <= num_slots else None
        at += length
    raise AssertionError(f"position {start} is beyond the runs {segment.runs}")


def _over_tiles(q: Tensor, keys: Tensor, values: Tensor, block: _Block, scaling: float) -> Tensor:
    """A block's rows over all of its tiles.  [1, kv_heads, rows * group, dim] -> the same"""
    every: list[tuple[Tensor, Tensor]] = []
    for tile in block.tiles:
        if tile.slot is not None:
            k, v = keys.narrow(2, tile.slot, tile.width), values.narrow(2, tile.slot, tile.width)
        else:
            k, v = _assembled(keys, block.segment, tile), _assembled(values, block.segment, tile)
        every.append(_flash(q, k, v, 0.0, False, attn_mask=tile.bias, scale=scaling))
    return _merged(every)


def _merged(every: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Outputs over parts of the keys and the logarithms of their sums of weights, put together."""
    if len(every) == 1:
        return every[0][0]
    highest = every[0][1]
    for _, log_sum in every[1:]:
        highest = torch.maximum(highest, log_sum)
    total = weighted = torch.zeros((), dtype=torch.float32, device=highest.device)
    for attended, log_sum in every:
        weight = torch.exp(log_sum - highest).unsqueeze(-1)
        total = total + weight
        weighted = weighted + weight * attended
    return (weighted / total).to(every[0][0].dtype)


def _assembled(pool: Tensor, segment: Segment, tile: _Tile) -> Tensor:
    """A tile that lies in several runs, or at the pool's end, copied to where it is one.  -> [1, kv_heads, width, dim]"""
    together = pool.new_zeros(1, pool.shape[1], tile.width, pool.shape[3])
    at = 0
    for first, last in segment.runs:
        begin, end = max(tile.start, at), min(tile.start + tile.count, at + last - first)
        if begin < end:
            together[:, :, begin - tile.start : end - tile.start] = pool[:, :, first + begin - at : first + end - at]
        at += last - first
    return together


@cache
def causal_bias(group: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What is added to the scores of a tile: 0 up to a row's own position, -inf behind.  -> [(TILE + padding) * group, TILE]"""
    positions = torch.arange(TILE + FEWEST_ROWS, device=device).repeat_interleave(group)
    mask = torch.zeros(len(positions), TILE, dtype=dtype, device=device)
    return mask.masked_fill_(torch.arange(TILE, device=device) > positions[:, None], -torch.inf)


def _scored(
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    segment: Segment,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """Windows and soft caps, which torch's kernel does not know: the scores are written out.  -> [rows, kv_heads, group, dim]"""
    num_rows, heads, head_dim = rows.shape
    kv_heads = keys.shape[0]
    group = heads // kv_heads
    q = rows.view(num_rows, kv_heads, group, head_dim).permute(1, 2, 0, 3).reshape(kv_heads, group * num_rows, head_dim) * scaling
    scores = torch.cat([q @ keys[:, first:last].transpose(1, 2) for first, last in segment.runs], dim=2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if num_rows > 1 or sliding_window is not None:  # a single row sees all that there is
        mask = causal_mask(segment, sliding_window, rows.device)
        by_row = scores.view(kv_heads, group, num_rows, segment.length).masked_fill_(~mask, -torch.inf)
        scores = by_row.view(kv_heads, group * num_rows, segment.length)
    weights = torch.softmax(scores, dim=2, dtype=torch.float32).to(rows.dtype)
    attended = rows.new_zeros(kv_heads, group * num_rows, values.shape[2])
    at = 0
    for first, last in segment.runs:
        attended += weights[:, :, at : at + last - first] @ values[:, first:last]
        at += last - first
    return attended.view(kv_heads, group, num_rows, -1).permute(2, 0, 1, 3)


def causal_mask(segment: Segment, sliding_window: int | None, device: torch.device) -> Tensor:
    """Which context positions each row sees.  -> [rows, length] bool"""
    key_positions = torch.arange(segment.length, device=device)
    row_positions = key_positions[segment.length - segment.num_rows :, None]
    mask = key_positions <= row_positions
    if sliding_window is not None:
        mask &= key_positions > row_positions - sliding_window
    return mask
