"""Ragged paged attention in torch. See attention.py for the contract.

A row gets the same bits alone, in company, in a chunk of any length and from pages that lie anywhere: keys are taken in tiles
cut at absolute positions, every product has one of a few widths, and whatever lies beyond a row's position is masked. A tile
that lies in one run of slots is read as a view of the pool; only one that a border of two runs cuts is put together first. Equality
rests on two properties of torch's flash attention on CPUs, which cloud/trial.py checks at start-up: the bits of a row do not
depend on how many rows come with it, nor on masked keys up to the width.

Grouped query heads become rows of their kv head, so keys are never repeated in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache

import torch
from torch import Tensor

from edgecloud.kernels.attention import Segment

TILE = 512  # keys in a tile; torch's kernel takes as many at a time
ROW_BLOCK = 128  # rows in a product: it goes through every key up to its last row's, masked or not
FEWEST_ROWS = 8  # of a product: fewer take other code in some matrix libraries
# A tile's last keys are padded to one of these widths: some matrix libraries add in another order from 257 keys on.
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
    kv_heads = keys.shape[0]
    group = heads // kv_heads
    grouped = query.view(num_rows, kv_heads, group, head_dim)
    times = -(-FEWEST_ROWS // group)
    single = grouped.unsqueeze(2).expand(-1, -1, times, -1, -1).reshape(num_rows, kv_heads, times * group, head_dim)
    plain = softcap is None and keys.shape[2] == values.shape[2]
    pools = keys.unsqueeze(0), values.unsqueeze(0)
    parts = []  # [rows, kv_heads, group, value_dim]
    for segment in segments:
        if not plain or (sliding_window is not None and segment.length > sliding_window):
            rows = query[segment.start : segment.stop]
            parts.append(_scored(rows, keys, values, segment, scaling, sliding_window, softcap))
        elif segment.num_rows == 1:
            attended = _over_tiles(single[segment.start : segment.stop], *pools, segment, segment.length - 1, group, scaling)
            parts.append(attended[:, :, :group])
        else:
            parts += _blocks(grouped, pools, segment, scaling)
    attended = parts[0] if len(parts) == 1 else torch.cat(parts)
    return attended.reshape(num_rows, heads, -1)


def _blocks(grouped: Tensor, pools: tuple[Tensor, Tensor], segment: Segment, scaling: float) -> list[Tensor]:
    """Several rows, in blocks cut at absolute positions."""
    kv_heads, group, head_dim = grouped.shape[1:]
    parts = []
    position, row = segment.length - segment.num_rows, segment.start
    while row < segment.stop:
        count = min(segment.stop - row, ROW_BLOCK - position % ROW_BLOCK)
        rows = grouped[row : row + count]
        padded = _padded(count, group)
        if padded > count:
            rows = torch.cat([rows, rows[-1:].expand(padded - count, -1, -1, -1)])
        q = rows.transpose(0, 1).reshape(1, kv_heads, padded * group, head_dim)
        attended = _over_tiles(q, *pools, segment, position, group, scaling, count)
        parts.append(attended[0].view(kv_heads, padded, group, -1).transpose(0, 1)[:count])
        position, row = position + count, row + count
    return parts


def _padded(count: int, group: int) -> int:
    """Rows to make of `count`: no product, nor the rest after whole blocks of 32 in torch's kernel, is of few rows."""
    if count * group <= 32:
        return max(count, -(-FEWEST_ROWS // group))
    return -(-count // FEWEST_ROWS) * FEWEST_ROWS


def _over_tiles(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    segment: Segment,
    position: int,
    group: int,
    scaling: float,
    count: int = 1,
) -> Tensor:
    """Rows from `position` on, in one tile, over it and those before it.  [1, kv_heads, rows * group, dim] -> the same"""
    last_tile, offset = divmod(position, TILE)
    num_keys = offset + count
    width = next(width for width in WIDTHS if width >= num_keys)
    num_rows = q.shape[2]
    mask = _bias(group if count > 1 else 1, offset, num_rows, count == 1, width, q.dtype, q.device)
    k, v = _tile(keys, values, segment, last_tile * TILE, num_keys, width)
    attended, log_sum = _flash(q, k, v, 0.0, False, attn_mask=mask, scale=scaling)
    every: list[tuple[Tensor, Tensor]] = [(attended, log_sum)]
    for tile in range(last_tile):
        k, v = _tile(keys, values, segment, tile * TILE, TILE, TILE)
        every.append(_flash(q, k, v, 0.0, False, scale=scaling))
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


def _tile(keys: Tensor, values: Tensor, segment: Segment, start: int, count: int, width: int) -> tuple[Tensor, Tensor]:
    """Keys and values of `count` positions from `start` on, and what follows them up to `width`.  -> [1, kv_heads, width, dim]"""
    at = 0
    for first, last in segment.runs:
        length = last - first
        if start < at + length:
            slot = first + start - at
            if start + count <= at + length and slot + width <= keys.shape[2]:
                return keys.narrow(2, slot, width), values.narrow(2, slot, width)
            break
        at += length
    return _assembled(keys, segment, start, count, width), _assembled(values, segment, start, count, width)


def _assembled(pool: Tensor, segment: Segment, start: int, count: int, width: int) -> Tensor:
    """A tile that lies in several runs, or at the pool's end, copied to where it is one."""
    tile = pool.new_zeros(1, pool.shape[1], width, pool.shape[3])
    at = 0
    for first, last in segment.runs:
        begin, end = max(start, at), min(start + count, at + last - first)
        if begin < end:
            tile[:, :, begin - start : end - start] = pool[:, :, first + begin - at : first + end - at]
        at += last - first
    return tile


@lru_cache(4096)
def _bias(group: int, offset: int, num_rows: int, repeated: bool, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A view of `causal_bias` for rows from `offset` in a tile on; `repeated`: one row, several times.  -> [num_rows, width]"""
    bias = causal_bias(group, dtype, device)[offset * group :, :width]
    return bias[:1].expand(num_rows, -1) if repeated else bias[:num_rows]


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
