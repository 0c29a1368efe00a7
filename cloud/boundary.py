"""Rows of a boundary tensor, as they come over the wire and as a pass takes them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from edgecloud.cloud.work import Boundary
from edgecloud.errors import ConfigError

# What is beyond is no residual stream (the largest known stay below 2**20), and its squares must not overflow: whatever goes into
# the cache has to be finite, for others read it masked. tail_trial.py tries it.
LARGEST = {torch.float32: 2.0**24, torch.bfloat16: 2.0**24, torch.float16: 2.0**14}


def check_rows(boundary: Boundary, width: int, dtype: torch.dtype) -> None:
    """Raises ConfigError: values that a target of `dtype` cannot take."""
    rows = np.frombuffer(boundary.rows, "<f4").reshape(-1, width)
    sound = (np.abs(rows) <= LARGEST[dtype]).all(axis=1)  # no NaN is
    if not sound.all():
        raise ConfigError(f"boundary row {int(sound.argmin())} holds a value that is not finite or is beyond {LARGEST[dtype]:g}")


def decoded(rows: bytearray, codec: str, width: int, device: torch.device) -> Tensor:
    """What the encoded rows stand for.  -> [rows, width] float32"""
    return torch.frombuffer(rows, dtype=torch.float32).view(-1, width).to(device)
