"""Tensors as bytes: what comes back is what went in, and its size is known before it is read."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from edgecloud.errors import ConfigError
from edgecloud.graph_bundle import DTYPES
from edgecloud.kernels.codec import CODECS
from edgecloud.tensors import from_bytes, num_bytes, to_bytes

shapes = st_numpy.array_shapes(min_dims=0, max_dims=5, min_side=1, max_side=4)


@given(st.sampled_from(sorted(DTYPES)).flatmap(lambda dtype: st_numpy.arrays(dtype, shapes)), st.booleans())
def test_elements_come_back_bit_by_bit(array: np.ndarray, strange: bool) -> None:
    shown = np.asfortranarray(array).astype(array.dtype.newbyteorder(">")) if strange else array
    data = to_bytes(shown)
    assert len(data) == num_bytes(str(array.dtype), array.shape, "")
    back = from_bytes(str(array.dtype), array.shape, "", data)
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    assert back.tobytes() == array.tobytes()


@given(st_numpy.arrays(np.float32, st_numpy.array_shapes(min_dims=1, max_dims=4, max_side=6), elements=st.floats(-8, 8, width=32)),
       st.sampled_from(CODECS))  # fmt: skip
def test_rows_of_the_last_dimension_go_through_a_codec(array: np.ndarray, codec: str) -> None:
    data = to_bytes(array, codec)
    assert len(data) == num_bytes("float32", array.shape, codec)
    back = from_bytes("float32", array.shape, codec, data)
    assert back.shape == array.shape
    assert np.abs(back - array).max() <= {"float32": 0, "float16": 0.01, "int8": 0.07, "int4": 1.3}[codec]


@pytest.mark.parametrize(
    ("dtype", "shape", "codec", "words"),
    [
        ("object", [1], "", "dtype is 'object'"),
        ("float32", [2, 0], "", r"shape is \[2, 0\]"),
        ("float32", [1] * 17, "", "at most 16 sizes"),
        ("float64", [1], "int8", "takes float32"),
        ("float32", [], "int8", "takes float32"),
        ("float32", [1], "int3", "codec is 'int3'"),
    ],
)
def test_what_no_tensor_is_is_refused(dtype: str, shape: list[int], codec: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        num_bytes(dtype, shape, codec)


def test_bytes_of_a_stranger() -> None:
    with pytest.raises(ConfigError, match="0 or 1"):
        from_bytes("bool", [2], "", b"\x00\x02")
    steps_of_nan = b"\xff" * num_bytes("float32", [1, 8], "int8")
    with pytest.raises(ConfigError, match="not finite"):
        from_bytes("float32", [1, 8], "int8", steps_of_nan)
    with pytest.raises(ConfigError, match="not finite"):
        from_bytes("float32", [1, 2], "float16", b"\xff" * 4)
    assert np.isnan(from_bytes("float32", [1], "", b"\xff" * 4)).all()  # as it is: the sender's own business
