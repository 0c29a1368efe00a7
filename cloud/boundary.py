"""Rows of boundary tensors, from what came over the wire to what a pass takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edgecloud.cloud.work import Boundary
from edgecloud.kernels.backend import backend_for
from edgecloud.kernels.codec import row_bytes, rows_from_wire

# What is beyond is no residual stream (the largest known stay below 2**20), and its squares must not overflow: whatever goes into
# the cache has to be finite, for others read it masked. tail_trial.py tries it.
LARGEST = {torch.float32: 2.0**24, torch.bfloat16: 2.0**24, torch.float16: 2.0**14}


def check_rows(boundary: Boundary, width: int, dtype: torch.dtype) -> None:
    """Raises ConfigError: they hold values that a target of `dtype` cannot compute on."""
    rows_from_wire(boundary.rows, boundary.codec, width, LARGEST[dtype])


def decoded(each: Sequence[bytearray], codec: str, width: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """What the rows of several sessions hold, decoded at once.  -> [rows, width] of `dtype` each"""
    num_bytes = row_bytes(codec, width)
    together = torch.frombuffer(bytearray().join(each), dtype=torch.uint8).view(-1, num_bytes).to(device)
    hidden = backend_for(device.type).decode_rows(together, codec, width, dtype)
    return list(torch.split_with_sizes(hidden, [len(rows) // num_bytes for rows in each]))
