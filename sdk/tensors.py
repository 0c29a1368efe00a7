"""Tensors of a cut graph as bytes: what travels in a `Tensor` message, written once for device and cloud.

Without a codec the elements are little-endian, in C order; with one (kernels/codec.py) they are rows of the last dimension.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edgecloud.errors import ConfigError
from edgecloud.graph_bundle import DTYPES
from edgecloud.kernels import codec as rows_codec

Array = npt.NDArray[np.generic]
MAX_RANK = 16


def to_bytes(array: Array, codec: str = "") -> bytes:
    """The data of a tensor. Raises ConfigError: the codec cannot hold a value, or takes no such dtype."""
    if codec:
        rows = array.reshape(math.prod(array.shape[:-1]), array.shape[-1] if array.ndim else 0)
        return rows_codec.encode(rows.astype(np.float32, copy=False), codec).tobytes()
    return array.astype(array.dtype.newbyteorder("<"), order="C", copy=False).tobytes()


def from_bytes(dtype: str, shape: Sequence[int], codec: str, data: bytes) -> Array:
    """The tensor, read-only where no codec has to be undone. The length of `data` must have been checked (`num_bytes`).

    Raises:
        ConfigError: a codec's row that holds a value which is not finite, or a bool that is neither 0 nor 1.
    """
    if codec:
        width = shape[-1]
        encoded = np.frombuffer(data, np.uint8).reshape(-1, rows_codec.row_bytes(codec, width))
        rows = rows_codec.decode(encoded, codec, width)
        if not np.isfinite(rows).all():
            raise ConfigError(f"{codec} rows hold a value that is not finite; send the elements as they are, without a codec")
        return rows.reshape(shape)
    if dtype == "bool":
        raw = np.frombuffer(data, np.uint8)
        if raw.size and int(raw.max()) > 1:
            raise ConfigError(f"a bool tensor holds a byte of {int(raw.max())}; it takes 0 or 1")
        return raw.view(np.bool_).reshape(shape)
    array: Array = np.frombuffer(data, np.dtype(dtype).newbyteorder("<")).astype(dtype, copy=False).reshape(shape)
    return array


def num_bytes(dtype: str, shape: Sequence[int], codec: str) -> int:
    """Bytes of a tensor's data.

    Raises:
        ConfigError: a dtype, shape or codec that no tensor has.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype[:40]!r}; it takes one of {', '.join(sorted(DTYPES))}")
    if len(shape) > MAX_RANK or any(size < 1 for size in shape):
        raise ConfigError(f"shape is {list(shape[: MAX_RANK + 1])}; it takes at most {MAX_RANK} sizes, each at least 1")
    if not codec:
        return math.prod(shape) * np.dtype(dtype).itemsize
    if dtype != "float32" or not shape:
        raise ConfigError(f"codec {codec[:40]!r} takes float32 with a last dimension, not {dtype} {list(shape)}")
    return math.prod(shape[:-1]) * rows_codec.row_bytes(codec, shape[-1])
