"""The boundary codec: NumPy, torch and plain Python give the same bytes and floats, errors are bounded, strangers harmless."""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from plain_codec import GROUPS, INT4_LEVELS, KNOWN_ANSWERS, in_range, known_row, plain_encode, row_blocks, steps_of, widths

from edgecloud.errors import ConfigError
from edgecloud.kernels import codec, codec_torch
from edgecloud.kernels.codec import CODECS, decode, encode, row_bytes, rows_from_wire

Rows = npt.NDArray[np.float32]
codecs = st.sampled_from(CODECS)
INTEGERS = ["int8", "int4"]


def through(rows: Rows, name: str) -> Rows:
    return decode(encode(rows, name), name, rows.shape[1])


# The bytes


@pytest.mark.parametrize("name", CODECS)
def test_known_answers(name: str) -> None:
    data = encode(known_row(), name)
    assert data.tobytes().hex() == KNOWN_ANSWERS[name]
    assert codec_torch.encode(torch.from_numpy(known_row()), name).numpy().tobytes() == data.tobytes()


@given(row_blocks(), st.sampled_from(INTEGERS))
@settings(max_examples=60)
def test_the_bytes_are_those_of_the_definition(rows: Rows, name: str) -> None:
    assert [row.tobytes() for row in encode(rows, name)] == [plain_encode(row.tolist(), name) for row in rows]


@given(row_blocks(), codecs)
def test_torch_gives_the_same_bytes_and_the_same_floats(rows: Rows, name: str) -> None:
    rows = in_range(rows, name)
    data = encode(rows, name)
    assert torch.equal(codec_torch.encode(torch.from_numpy(rows), name), torch.from_numpy(data))
    decoded = codec_torch.decode(torch.from_numpy(data), name, rows.shape[1])
    assert decoded.numpy().tobytes() == decode(data, name, rows.shape[1]).tobytes()


@pytest.mark.parametrize("name", INTEGERS)
def test_quotients_half_way_and_next_to_it(name: str) -> None:
    """Every half-way point, and the floats below and above it: a quotient in float32 could be on the wrong side."""
    top = 127.0 if name == "int8" else 98.0
    levels = np.arange(128.0) if name == "int8" else np.array(INT4_LEVELS, float)
    middles = ((levels[1:] + levels[:-1]) / 2).astype(np.float32)
    for step in (1.0, 1.0078125, 1.9921875, 2.0**-100):
        near = (middles * np.float32(step)).astype(np.float32)
        for x in (near, np.nextafter(near, np.float32(0)), np.nextafter(near, np.float32(np.inf))):
            for chunk in np.split(x, range(GROUPS[name] - 2, len(x), GROUPS[name] - 2)):
                row = np.array([[2 * top * step, top * step, *chunk]], np.float32)
                row = np.concatenate([row, -row])
                assert [r.tobytes() for r in encode(row, name)] == [plain_encode(r.tolist(), name) for r in row]
                assert torch.equal(codec_torch.encode(torch.from_numpy(row), name), torch.from_numpy(encode(row, name)))


@given(row_blocks(), codecs, st.data())
def test_a_row_is_encoded_by_itself(rows: Rows, name: str, data: st.DataObject) -> None:
    rows = in_range(rows, name)
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=4) if len(rows) else st.just([]))
    assert np.array_equal(encode(rows[chosen], name), encode(rows, name)[chosen])
    assert np.array_equal(encode(np.asfortranarray(rows), name), encode(rows, name))


# The values


@given(row_blocks(), st.sampled_from(INTEGERS))
@settings(max_examples=60)
def test_an_error_is_at_most_half_the_way_to_the_next_level(rows: Rows, name: str) -> None:
    decoded = through(rows, name).astype(np.float64)
    for x, y in zip(rows.astype(np.float64), decoded, strict=True):
        step = np.array(steps_of(x.tolist(), name))
        largest_gap = 1 if name == "int8" else 20
        bound = np.where(step > 0, step * largest_gap / 2, 128 * codec.SMALLEST_STEP * 256)
        assert (np.abs(x - y) <= bound).all()


@given(row_blocks())
def test_a_groups_largest_channel_costs_the_others_nothing_up_to_256_times_their_size(rows: Rows) -> None:
    """In int8 the others keep half a step of 1/127 of the largest among themselves, whatever one channel does."""
    rows = np.clip(rows[:, :72], -1, 1)
    with_peak = rows.copy()
    with_peak[:, 0] = 200.0 * np.abs(rows).max(initial=1e-3)
    off = np.abs(through(with_peak, "int8") - with_peak)[:, 1:]
    assert (off <= np.abs(rows[:, 1:]).max(axis=1, initial=0.0, keepdims=True) / 253 + with_peak[:, :1] / 32000).all()


@given(row_blocks())
def test_float32_is_lossless_and_float16_is_numpys(rows: Rows) -> None:
    assert through(rows, "float32").tobytes() == rows.tobytes()
    rows = np.clip(rows, -65504, 65504)
    assert through(rows, "float16").tobytes() == rows.astype(np.float16).astype(np.float32).tobytes()


@given(row_blocks(), codecs)
def test_what_was_decoded_encodes_to_itself(rows: Rows, name: str) -> None:
    """Unless one channel is so large that it sets the step: then its own rounding may move it."""
    rows = np.clip(rows, -60000, 60000)
    once = through(rows, name)
    if name in GROUPS:
        padded = np.pad(np.abs(once), ((0, 0), (0, -once.shape[1] % GROUPS[name])))
        ordered = np.sort(padded.reshape(-1, GROUPS[name]), axis=1)
        assume((ordered[:, -1] <= 250 * ordered[:, -2]).all())
    assert np.array_equal(through(once, name), once)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("width", [1, 71, 73, 576])
def test_zeros_one_element_and_no_rows(name: str, width: int) -> None:
    assert not through(np.zeros((2, width), np.float32), name).any()
    assert encode(np.zeros((0, width), np.float32), name).shape == (0, row_bytes(name, width))
    assert through(np.zeros((0, width), np.float32), name).shape == (0, width)
    one = np.zeros((1, width), np.float32)
    one[0, width // 2] = -3.0
    assert np.abs(through(one, name) - one).max() <= 3 / 20_000
    tiny = np.full((1, width), 1e-42, np.float32)  # subnormal
    assert np.abs(through(tiny, name)).max() <= 2e-42


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CODECS)
def test_torch_decodes_to_the_dtype_of_the_model(name: str, dtype: torch.dtype) -> None:
    rows = np.random.default_rng(0).standard_t(2, size=(3, 145)).astype(np.float32)
    data = torch.from_numpy(encode(rows, name))
    decoded = codec_torch.decode(data, name, 145, dtype)
    assert decoded.dtype == dtype
    assert torch.equal(decoded, torch.from_numpy(through(rows, name)).to(dtype))
    wide = torch.empty(3, data.shape[1] + 1, dtype=torch.uint8)
    wide[:, 1:] = data
    assert torch.equal(codec_torch.decode(wide[:, 1:], name, 145, dtype), decoded)  # a view, at odd addresses


# The rate


def test_bytes_of_a_row() -> None:
    assert [row_bytes(name, 576) for name in CODECS] == [2304, 1152, 608, 360]
    for width in (576, 896, 960, 1536, 2048, 4096, 8192):
        assert row_bytes("int8", width) <= 0.53 * row_bytes("float16", width)
        assert row_bytes("int4", width) <= 0.32 * row_bytes("float16", width)


@given(widths, codecs)
def test_every_row_has_as_many_bytes_as_promised(width: int, name: str) -> None:
    data = encode(np.ones((2, width), np.float32), name)
    assert data.dtype == np.uint8
    assert data.shape == (2, row_bytes(name, width))


# What is refused


@pytest.mark.parametrize("name", ["int3", "", "INT8"])
def test_an_unknown_codec_is_named(name: str) -> None:
    for call in (
        lambda: row_bytes(name, 8),
        lambda: encode(np.zeros((1, 8), np.float32), name),
        lambda: decode(np.zeros((1, 8), np.uint8), name, 8),
        lambda: rows_from_wire(b"", name, 8),
        lambda: codec_torch.encode(torch.zeros(1, 8), name),
        lambda: codec_torch.decode(torch.zeros(1, 8, dtype=torch.uint8), name, 8),
    ):
        with pytest.raises(ConfigError, match=re.escape(f"codec is {name!r}; it takes one of float32, float16, int8, int4")):
            call()


@pytest.mark.parametrize("width", [0, -1])
def test_a_row_has_a_channel(width: int) -> None:
    with pytest.raises(ConfigError, match=f"a row of {width} channels"):
        row_bytes("int8", width)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", CODECS)
def test_what_is_not_finite_is_not_encoded(name: str, value: float) -> None:
    rows = np.zeros((2, 80), np.float32)
    rows[1, 77] = value
    for call in (lambda: encode(rows, name), lambda: codec_torch.encode(torch.from_numpy(rows), name)):
        with pytest.raises(ConfigError, match="the model that computed the rows is broken"):
            call()


@pytest.mark.parametrize(("name", "largest"), [("float16", 65504.0), ("int8", 2.0**127), ("int4", 2.0**127)])
def test_a_value_beyond_the_range_is_refused_and_the_largest_is_not(name: str, largest: float) -> None:
    rows = np.full((1, 3), largest, np.float32)
    assert np.isfinite(through(rows, name)).all()
    rows[0, 1] = np.nextafter(rows[0, 1], np.float32(np.inf))
    with pytest.raises(ConfigError, match=f"{name} takes values up to"):
        encode(rows, name)


@pytest.mark.parametrize("rows", [np.zeros(8, np.float32), np.zeros((1, 8)), np.zeros((1, 0), np.float32)])
def test_rows_of_another_shape_or_dtype_are_refused(rows: Rows) -> None:
    for call in (lambda: encode(rows, "int8"), lambda: codec_torch.encode(torch.from_numpy(rows), "int8")):
        with pytest.raises(ConfigError, match="rows are"):
            call()


@pytest.mark.parametrize("data", [np.zeros((2, 13), np.uint8), np.zeros(12, np.uint8), np.zeros((2, 12), np.int8)])
def test_data_of_another_shape_or_dtype_is_refused(data: npt.NDArray[np.uint8]) -> None:
    for call in (lambda: decode(data, "int8", 8), lambda: codec_torch.decode(torch.from_numpy(data), "int8", 8)):
        with pytest.raises(ConfigError, match=re.escape("uint8 [n, 12]")):
            call()


@given(codecs, widths, st.integers(0, 3), st.randoms(use_true_random=False))
def test_a_strangers_bytes_are_decoded_alike_or_refused(name: str, width: int, num_rows: int, random: object) -> None:
    data = random.randbytes(num_rows * row_bytes(name, width))  # type: ignore[attr-defined]
    rows = np.frombuffer(data, np.uint8).reshape(num_rows, -1) if num_rows else encode(np.zeros((0, width), np.float32), name)
    decoded = decode(rows, name, width)
    by_torch = codec_torch.decode(torch.from_numpy(rows.copy()), name, width).numpy()
    assert decoded.shape == (num_rows, width)
    assert np.array_equal(decoded, by_torch, equal_nan=True)
    for largest in (codec.MAX_FLOAT32, 65504.0):
        if (np.abs(decoded) <= largest).all():
            assert np.array_equal(rows_from_wire(data, name, width, largest), rows)
        else:
            with pytest.raises(ConfigError, match="boundary row"):
                rows_from_wire(data, name, width, largest)


@given(row_blocks(), codecs, st.integers(1, 9))
def test_the_wire_takes_whole_rows_only(rows: Rows, name: str, too_many: int) -> None:
    rows = in_range(rows, name)
    data = encode(rows, name).tobytes()
    assert rows_from_wire(data, name, rows.shape[1]).tobytes() == data
    if too_many % row_bytes(name, rows.shape[1]):
        with pytest.raises(ConfigError, match="no whole number"):
            rows_from_wire(data + bytes(too_many), name, rows.shape[1])


def test_the_broken_row_is_named() -> None:
    data = bytearray(encode(np.ones((3, 8), np.float32), "int8").tobytes())
    data[2 * row_bytes("int8", 8) + 1] = 0x7F
    data[2 * row_bytes("int8", 8)] = 0x80  # its step is infinity
    with pytest.raises(ConfigError, match="boundary row 2 holds a value that is not finite"):
        rows_from_wire(bytes(data), "int8", 8)
