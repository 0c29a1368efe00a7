"""Boundary codec, the definition in NumPy, as the device runs it: rows of a residual stream as bytes, each row by itself.

The stream is heavy-tailed: one channel can be fifty times its neighbours. So every group of channels has a step (bfloat16) and one
wide code (16 bits) for its largest channel, the others have narrow codes; the narrow code that no value uses marks the place of the
wide one. `codec_torch` (cloud) and `codec_triton` (cloud on CUDA) give the same bytes and the same floats.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgecloud.errors import ConfigError

CODECS: tuple[str, ...] = ("float32", "float16", "int8", "int4")

SMALLEST_STEP = 2.0**-126  # a group whose step would be smaller is zeros: nobody computes with subnormal steps
MAX_FLOAT32 = float(np.finfo(np.float32).max)
LARGEST = {"float32": MAX_FLOAT32, "float16": 65504.0, "int8": 2.0**127, "int4": 2.0**127}  # what encode takes

Bytes = npt.NDArray[np.uint8]
Rows = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int16]


@dataclass(frozen=True, slots=True)
class Form:
    """An integer codec. For a group of x, the first of the largest |x| being X and the largest of the others Y:

    step = bfloat16(float32(max(Y, X / REACH) * unit)), or 0 if that is below SMALLEST_STEP; all roundings are half to even
    wide code of X = the integer nearest to X / step, half to even; 0 if the step is 0
    narrow code of x = that of the level nearest to x / step, half-way the even one in int8, the lower in int4; 0 if the step is 0
    row = every group's step, every group's wide code (int16), every channel's narrow code (two's complement; that of X is `marker`)

    int8 has the levels 0, 1 .. 127; int4 has c * (7 + c), which lie closer where a heavy-tailed group has more values: 0, 8, 18 ..
    98. All little-endian, the low nibble first. x becomes level * step, which float32 holds exactly.
    """

    bits: int  # of a narrow code
    group: int  # channels, an even number; the last group of a row may have fewer
    unit: float  # 1 / the highest level, in so few bits that a product with a float32 is exact in float64

    @property
    def marker(self) -> int:
        """The narrow code that stands for the wide one; the others lie between its negative and itself."""
        return -(1 << (self.bits - 1))

    def num_groups(self, width: int) -> int:
        """Of a row of `width` channels."""
        return -(-width // self.group)

    def codes_start(self, width: int) -> int:
        """Where a row's narrow codes begin, in bytes; steps begin at 0, wide codes half-way."""
        return 4 * self.num_groups(width)

    def row_bytes(self, width: int) -> int:
        """Of a row of `width` channels."""
        return self.codes_start(width) + -(-width * self.bits // 8)


REACH = 256  # a wide code goes as many times further than the highest level, and still fits 16 bits
INT4_BORDERS = tuple(float((c + 4) ** 2 - 12) for c in range(7))  # half-way between the levels of c and c + 1
FORMS = {"int8": Form(8, 72, 129 / 2**14), "int4": Form(4, 32, 669 / 2**16)}
_INT4_CODES = np.searchsorted(INT4_BORDERS, np.arange(99)).astype(np.int16)  # of a quotient rounded up: borders are whole numbers


def row_bytes(codec: str, width: int) -> int:
    """Bytes of an encoded row, whatever is in it.

    Raises:
        ConfigError: an unknown codec, or a width below 1.
    """
    require_codec(codec)
    if width < 1:
        raise ConfigError(f"a row of {width} channels cannot be encoded; it takes 1 or more")
    if codec in FORMS:
        return FORMS[codec].row_bytes(width)
    return width * (4 if codec == "float32" else 2)


def encode(rows: Rows, codec: str) -> Bytes:
    """Rows as bytes; a row's bytes depend on nothing but the row. rows: [n, width] float32 -> [n, row_bytes]

    Raises:
        ConfigError: an unknown codec, rows of another dtype or shape, a value that is not finite or larger than the codec takes.
    """
    require_codec(codec)
    if rows.ndim != 2 or rows.shape[1] < 1 or rows.dtype != np.float32:
        raise ConfigError(f"rows are {rows.dtype} of shape {list(rows.shape)}; the codec takes float32 [n, width]")
    require_range(float(np.abs(rows).max(initial=0.0)), codec)
    if codec in FORMS:
        return _encode_grouped(rows, FORMS[codec])
    return rows.astype("<f4" if codec == "float32" else "<f2", order="C").view(np.uint8)


def decode(data: Bytes, codec: str, width: int) -> Rows:
    """The values that bytes stand for: of bytes that `encode` did not make, any, also infinity and NaN. -> [n, width] float32

    Raises:
        ConfigError: an unknown codec, a width below 1, or data that is not uint8 [n, row_bytes].
    """
    num_bytes = row_bytes(codec, width)
    if data.ndim != 2 or data.shape[1] != num_bytes or data.dtype != np.uint8:
        raise ConfigError(
            f"data is {data.dtype} of shape {list(data.shape)}; {codec} rows of {width} channels are uint8 [n, {num_bytes}]"
        )
    with np.errstate(invalid="ignore", over="ignore"):  # of a stranger's bytes; rows_from_wire refuses what comes of them
        if codec in FORMS:
            return _decode_grouped(data, FORMS[codec], width)
        return np.ascontiguousarray(data).view("<f4" if codec == "float32" else "<f2").astype(np.float32)


def rows_from_wire(data: bytes, codec: str, width: int, largest: float = MAX_FLOAT32) -> Bytes:
    """Bytes from a stranger as rows that may be decoded. -> [n, row_bytes], read-only

    Raises:
        ConfigError: an unknown codec, a width below 1, no whole number of rows, or a value that is not finite or beyond `largest`
            (of the dtype that computes on).
    """
    num_bytes = row_bytes(codec, width)
    if len(data) % num_bytes:
        raise ConfigError(f"{len(data)} bytes are no whole number of {codec} rows of {width} channels, {num_bytes} bytes each")
    rows = np.frombuffer(data, np.uint8).reshape(-1, num_bytes)
    sound = (np.abs(decode(rows, codec, width)) <= largest).all(axis=1)  # no NaN is
    if not sound.all():
        raise ConfigError(f"boundary row {int(sound.argmin())} holds a value that is not finite or is beyond {largest:g}")
    return rows


def require_codec(codec: str) -> None:
    """Raises ConfigError on an unknown codec."""
    if codec not in CODECS:
        raise ConfigError(f"codec is {codec!r}; it takes one of {', '.join(CODECS)}")


def require_range(magnitude: float, codec: str) -> None:
    """Raises ConfigError if the largest |value| of some rows is not finite, or larger than the codec takes."""
    if not magnitude <= LARGEST[codec]:
        mend = "take a codec of wider range" if np.isfinite(magnitude) else "the model that computed the rows is broken"
        raise ConfigError(f"a row holds {magnitude:g}, and {codec} takes values up to {LARGEST[codec]:g}; {mend}")


def _encode_grouped(rows: Rows, form: Form) -> Bytes:
    num_rows, width = rows.shape
    padded = np.zeros((num_rows, form.num_groups(width) * form.group))
    padded[:, :width] = rows
    x = padded.reshape(num_rows, form.num_groups(width), form.group)
    size = np.abs(x)
    at = size.argmax(axis=2, keepdims=True)  # the first of equals
    largest = np.take_along_axis(size, at, axis=2)
    np.put_along_axis(size, at, 0.0, axis=2)
    bits = _bfloat16_bits(np.maximum(size.max(axis=2, keepdims=True), largest / REACH) * form.unit)
    step = _from_bfloat16(bits).astype(np.float64)
    x /= np.where(step == 0, np.inf, step)
    wide = np.rint(np.take_along_axis(x, at, axis=2)).astype("<i2")
    codes = _nearest_levels(x, form.bits)
    np.put_along_axis(codes, at, form.marker, axis=2)
    packed = _pack(codes.reshape(padded.shape), form.bits)
    parts = [bits[..., 0].astype("<u2").view(np.uint8), wide[..., 0].view(np.uint8)]
    return np.concatenate([*parts, packed[:, : form.row_bytes(width) - form.codes_start(width)]], axis=1)


def _decode_grouped(data: Bytes, form: Form, width: int) -> Rows:
    num_rows, num_groups, start = len(data), form.num_groups(width), form.codes_start(width)
    steps = _from_bfloat16(np.ascontiguousarray(data[:, : start // 2]).view("<u2"))[..., None]
    wide = np.ascontiguousarray(data[:, start // 2 : start]).view("<i2")[..., None]
    padded = np.zeros((num_rows, num_groups * form.group), np.int16)
    padded[:, :width] = _unpack(data[:, start:], form.bits)[:, :width]
    codes = padded.reshape(num_rows, num_groups, form.group)
    values = np.where(codes == form.marker, wide, _levels(codes, form.bits)) * steps
    return np.ascontiguousarray(values.reshape(padded.shape)[:, :width])


def _nearest_levels(quotients: npt.NDArray[np.float64], bits: int) -> Integers:
    """Narrow codes."""
    if bits == 8:
        return np.rint(quotients).astype(np.int16)
    codes = _INT4_CODES.take(np.ceil(np.abs(quotients)).astype(np.intp), mode="clip")
    return np.where(quotients < 0, -codes, codes)


def _levels(codes: Integers, bits: int) -> Integers:
    return codes if bits == 8 else codes * (7 + np.abs(codes))


def _bfloat16_bits(values: npt.NDArray[np.float64]) -> npt.NDArray[np.uint16]:
    """Through float32, each time to the nearest, half to even; below SMALLEST_STEP to zero."""
    exact = values.astype(np.float32).view(np.uint32)
    bits = (exact + 0x7FFF + ((exact >> 16) & 1)) >> 16
    return np.where(bits < 0x80, 0, bits).astype(np.uint16)  # 0x80 is SMALLEST_STEP


def _from_bfloat16(bits: npt.NDArray[np.uint16]) -> Rows:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _pack(codes: Integers, bits: int) -> Bytes:
    if bits == 8:
        return codes.astype(np.uint8)
    return (codes[:, 0::2] & 0xF | codes[:, 1::2] << 4).astype(np.uint8)


def _unpack(packed: Bytes, bits: int) -> Integers:
    if bits == 8:
        return packed.view(np.int8).astype(np.int16)
    nibbles = np.stack([packed & 0xF, packed >> 4], axis=2).reshape(len(packed), 2 * packed.shape[1]).astype(np.int16)
    return (nibbles ^ 8) - 8
