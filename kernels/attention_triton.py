"""Ragged paged attention in Triton: one launch for every session of a pass. See attention.py for the contract.

Has run only in Triton's interpreter and been compiled for CUDA; it has never been run on a GPU.

Online softmax over blocks of keys (Dao et al., "FlashAttention", NeurIPS 2022). Blocks of keys and tiles of rows are cut at
absolute positions, so neither chunks nor company nor pages change a row's order of reduction: it gets the same bits every time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from edgecloud.kernels.attention import Segment

TILE_ROWS = 16  # rows of a tile, each one query head at one position: the least that a tensor core takes
BLOCK_KEYS = 32  # key positions of a step; both are constants, for another size would round differently


@dataclass(frozen=True, slots=True)
class Plan:
    """A pass as the kernel reads it: where each context lies, and who computes what."""

    slots: Tensor  # [sum of lengths] int32: the slot of every position, one context after the other
    tiles: Tensor  # [tiles, 5] int32: tile number, first position, length, row of position 0, where the context begins in `slots`


def ragged_paged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    segments: Sequence[Segment],
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Shapes as in the reference: [rows, heads, head_dim] -> [rows, heads, value_dim]. float32, bfloat16 or float16."""
    heads, head_dim = query.shape[1:]
    kv_heads, _, value_dim = values.shape
    group = heads // kv_heads
    plan = _plan(tuple(segments), group, query.device)
    out = query.new_empty(query.shape[0], heads, value_dim)
    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]  # Triton launches on the current device
        _attend[(len(plan.tiles), kv_heads)](
            query,
            keys,
            values,
            out,
            plan.slots,
            plan.tiles,
            *query.stride(),
            *keys.stride(),
            *values.stride(),
            scaling,
            sliding_window or 0,
            softcap or 0.0,
            HEAD_DIM=head_dim,
            VALUE_DIM=value_dim,
            HEAD_BLOCK=max(16, triton.next_power_of_2(head_dim)),
            VALUE_BLOCK=max(16, triton.next_power_of_2(value_dim)),
            GROUP=group,
            TILE_ROWS=TILE_ROWS,
            BLOCK_KEYS=BLOCK_KEYS,
            WINDOWED=sliding_window is not None,
            CAPPED=softcap is not None,
            # Entries of 16 bits are exact in TF32, and weights need no more digits: one version of the kernel serves all.
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        )
    return out


@lru_cache(maxsize=4)  # every layer of a pass asks for the same one
def _plan(segments: tuple[Segment, ...], group: int, device: torch.device) -> Plan:
    slots, tiles, at = [], [], 0
    for segment in segments:
        first = segment.length - segment.num_rows
        slots += [np.arange(start, stop, dtype=np.int32) for start, stop in segment.runs]
        for tile in range(first * group // TILE_ROWS, (segment.length * group - 1) // TILE_ROWS + 1):
            tiles.append((tile, first, segment.length, segment.start - first, at))
        at += segment.length
    table = torch.tensor(tiles, dtype=torch.int32, device=device)
    return Plan(torch.from_numpy(np.concatenate(slots)).to(device), table)


@triton.jit
def _attend(
    query: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    out: tl.tensor,
    slots: tl.tensor,
    tiles: tl.tensor,
    query_row_stride: tl.tensor,
    query_head_stride: tl.tensor,
    query_stride: tl.tensor,
    key_head_stride: tl.tensor,
    key_slot_stride: tl.tensor,
    key_stride: tl.tensor,
    value_head_stride: tl.tensor,
    value_slot_stride: tl.tensor,
    value_stride: tl.tensor,
    scaling: tl.tensor,
    window: tl.tensor,
    softcap: tl.tensor,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """One tile of a segment and one kv head: consecutive positions, each with the head's group of query heads."""
    tile = tl.load(tiles + 5 * tl.program_id(0))
    first = tl.load(tiles + 5 * tl.program_id(0) + 1)
    length = tl.load(tiles + 5 * tl.program_id(0) + 2)
    row_of_zero = tl.load(tiles + 5 * tl.program_id(0) + 3)
    context = slots + tl.load(tiles + 5 * tl.program_id(0) + 4)
    kv_head = tl.program_id(1).to(tl.int64)

    place = tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
    position = place // GROUP
    head = kv_head * GROUP + place % GROUP
    row = (row_of_zero + position).to(tl.int64)
    present = (position >= first) & (position < length)  # the ends of a tile may belong to other passes
    dim = tl.arange(0, HEAD_BLOCK)
    value_dim = tl.arange(0, VALUE_BLOCK)

    query_at = query + row[:, None] * query_row_stride + head[:, None] * query_head_stride + dim[None, :] * query_stride
    q = tl.load(query_at, mask=present[:, None] & (dim < HEAD_DIM)[None, :], other=0.0).to(tl.float32)
    highest = tl.full([TILE_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([TILE_ROWS], tl.float32)
    attended = tl.zeros([TILE_ROWS, VALUE_BLOCK], tl.float32)

    stop = tl.minimum(length, (tile * TILE_ROWS + TILE_ROWS - 1) // GROUP + 1)
    start = 0
    if WINDOWED:  # at a border of blocks, so that a row's blocks are the same in whatever tile
        lowest = tl.maximum(first, tile * TILE_ROWS // GROUP) - window + 1
        start = tl.maximum(lowest, 0) // BLOCK_KEYS * BLOCK_KEYS
    for block in range(start, stop, BLOCK_KEYS):
        key_position = block + tl.arange(0, BLOCK_KEYS)
        written = key_position < stop  # what lies behind was perhaps never written
        slot = tl.load(context + key_position, mask=written, other=0).to(tl.int64)
        key_at = keys + kv_head * key_head_stride + slot[None, :] * key_slot_stride + dim[:, None] * key_stride
        k = tl.load(key_at, mask=written[None, :] & (dim < HEAD_DIM)[:, None], other=0.0).to(tl.float32)
        scores = tl.dot(q, k, input_precision=PRECISION) * scaling
        if CAPPED:
            shrunk = tl.exp(-2 * tl.abs(scores / softcap))  # tanh by hand: tl.math has none
            scores = tl.where(scores < 0, -softcap, softcap) * ((1 - shrunk) / (1 + shrunk))
        seen = key_position[None, :] <= position[:, None]
        if WINDOWED:
            seen = seen & (key_position[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        base = tl.where(new_highest == float("-inf"), 0.0, new_highest)  # a row may see nothing of a block
        weights = tl.exp(scores - base[:, None])
        rescale = tl.exp(highest - base)
        value_at = values + kv_head * value_head_stride + slot[:, None] * value_slot_stride + value_dim[None, :] * value_stride
        v = tl.load(value_at, mask=written[:, None] & (value_dim < VALUE_DIM)[None, :], other=0.0).to(tl.float32)
        total = total * rescale + tl.sum(weights, 1)
        attended = attended * rescale[:, None] + tl.dot(weights, v, input_precision=PRECISION)
        highest = new_highest

    out_at = out + (row[:, None] * (tl.num_programs(1) * GROUP) + head[:, None]) * VALUE_DIM + value_dim[None, :]
    mask = present[:, None] & (value_dim < VALUE_DIM)[None, :]
    total = tl.where(present, total, 1.0)
    tl.store(out_at, (attended / total[:, None]).to(out.dtype.element_ty), mask=mask)
