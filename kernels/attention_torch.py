"""Ragged paged attention in torch. See attention.py for the contract.

A context that lies in one run goes through `scaled_dot_product_attention` on a view of the pool; one that lies in several is
scored run by run. Grouped query heads become rows or a broadcast dimension, so keys are never repeated in memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own habit
from torch import Tensor

from edgecloud.kernels.attention import Segment


def ragged_paged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    segments: Sequence[Segment],
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Shapes as in the reference: [rows, heads, head_dim] -> [rows, heads, value_dim]."""
    parts = []
    for segment in segments:
        rows = query[segment.start : segment.stop]
        windowed = sliding_window is not None and segment.length > sliding_window
        if len(segment.runs) == 1 and softcap is None and not windowed:
            parts.append(_one_run(rows, keys, values, segment, scaling))
        else:
            parts.append(_many_runs(rows, keys, values, segment, scaling, sliding_window, softcap))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _one_run(rows: Tensor, keys: Tensor, values: Tensor, segment: Segment, scaling: float) -> Tensor:
    first, last = segment.runs[0]
    num_rows, heads, head_dim = rows.shape
    kv_heads = keys.shape[0]
    k, v = keys[:, first:last], values[:, first:last]  # [kv_heads, length, dim]
    if num_rows == 1:  # a group's heads are rows of one product
        q = rows.view(1, kv_heads, heads // kv_heads, head_dim)
        attended = F.scaled_dot_product_attention(q, k.unsqueeze(0), v.unsqueeze(0), scale=scaling)
        return attended.reshape(1, heads, -1)
    group = heads // kv_heads
    q = rows.view(num_rows, kv_heads, group, head_dim).permute(1, 2, 0, 3)  # [kv_heads, group, rows, head_dim]
    k = k.unsqueeze(1).expand(-1, group, -1, -1)
    v = v.unsqueeze(1).expand(-1, group, -1, -1)
    if num_rows == segment.length:
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
    else:
        mask = causal_mask(segment, None, rows.device)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
    return attended.permute(2, 0, 1, 3).reshape(num_rows, heads, -1)


def _many_runs(
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    segment: Segment,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
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
    return attended.view(kv_heads, group, num_rows, -1).permute(2, 0, 1, 3).reshape(num_rows, heads, -1)


def causal_mask(segment: Segment, sliding_window: int | None, device: torch.device) -> Tensor:
    """Which context positions each row sees.  -> [rows, length] bool"""
    key_positions = torch.arange(segment.length, device=device)
    row_positions = key_positions[segment.length - segment.num_rows :, None]
    mask = key_positions <= row_positions
    if sliding_window is not None:
        mask &= key_positions > row_positions - sliding_window
    return mask
