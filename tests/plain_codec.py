"""The boundary codec written again in plain Python, group by group on fractions, and examples to hold the kernels against it."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

GROUPS = {"int8": 72, "int4": 32}
UNITS = {"int8": Fraction(129, 2**14), "int4": Fraction(669, 2**16)}
INT4_LEVELS = [0, 8, 18, 30, 44, 60, 78, 98]


def known_row() -> npt.NDArray[np.float32]:
    """Two groups of int4: a huge channel, equals, half-way points, a value of next to nothing; then a group of one."""
    row = [24_000.0, -3.5, 0.0, 127.0, -127.0, 63.5, -0.5, 1.5, 2.5, 1e-40] + [float(i % 7 - 3) for i in range(22)] + [-65.0]
    return np.array([row], np.float32)


KNOWN_ANSWERS = {  # hexadecimal
    "float32": "0080bb46000060c0000000000000fe420000fec200007e42000000bf0000c03f00002040c2160100"
    + "000040c0000000c0000080bf000000000000803f0000004000004040" * 3
    + "000040c0000082c2",
    "float16": "dc7500c30000f057f0d7f05300b8003e00410000" + "00c200c000bc0000003c00400042" * 3 + "00c210d4",
    "int8": "803f" "c05d" "80fc007f8140000202" + "00fdfeff00010203fdfeff00010203fdfeff00010203fdbf",
    "int4": "a63f2a3b" "4a481e9e" "0870490000" "000000000000000000000008",
}  # fmt: skip


def to_bfloat16(value: Fraction) -> int:
    """The bits of a value that is not negative, through float32."""
    as_double = float(value)
    assert Fraction(as_double) == value, "the definition promises that float64 holds it"
    [bits] = struct.unpack("<I", struct.pack("<f", as_double))
    low, kept = bits & 0xFFFF, bits >> 16
    rounded: int = kept + (low > 0x8000 or (low == 0x8000 and kept % 2 == 1))
    return rounded if rounded >= 0x80 else 0


def from_bfloat16(bits: int) -> Fraction:
    [value] = struct.unpack("<f", struct.pack("<I", bits << 16))
    return Fraction(value)


def plain_group(x: Sequence[Fraction], codec: str) -> tuple[int, int, list[int]]:
    """-> bits of the step, wide code, narrow codes"""
    num_bits = int(codec.removeprefix("int"))
    at = max(range(len(x)), key=lambda i: (abs(x[i]), -i))
    others = max((abs(v) for i, v in enumerate(x) if i != at), default=Fraction(0))
    step_bits = to_bfloat16(max(others, abs(x[at]) / 256) * UNITS[codec])
    step = from_bfloat16(step_bits)
    wide = round(x[at] / step) if step else 0  # Python rounds a fraction half to even
    codes = [narrow_code(v / step, codec) if step else 0 for v in x]
    codes[at] = -(2 ** (num_bits - 1))
    return step_bits, wide, codes


def narrow_code(quotient: Fraction, codec: str) -> int:
    if codec == "int8":
        return round(quotient)
    code = min(range(8), key=lambda c: (abs(abs(quotient) - INT4_LEVELS[c]), c))
    return -code if quotient < 0 else code


def plain_encode(row: Sequence[float], codec: str) -> bytes:
    """One row of int8 or int4."""
    size = GROUPS[codec]
    x = [Fraction(v) for v in row]
    groups = [plain_group(x[i : i + size], codec) for i in range(0, len(x), size)]
    codes = [code for _, _, narrow in groups for code in narrow]
    if codec == "int4":
        codes += [0] * (len(codes) % 2)
        codes = [low & 0xF | (high & 0xF) << 4 for low, high in zip(codes[::2], codes[1::2], strict=True)]
    steps = struct.pack(f"<{len(groups)}H", *(step for step, _, _ in groups))
    return steps + struct.pack(f"<{len(groups)}h", *(wide for _, wide, _ in groups)) + bytes(code & 0xFF for code in codes)


def steps_of(row: Sequence[float], codec: str) -> list[float]:
    """The step of every channel: what it is off by is at most half of it."""
    size = GROUPS[codec]
    x = [Fraction(v) for v in row]
    groups = [(x[i : i + size]) for i in range(0, len(x), size)]
    return [float(from_bfloat16(plain_group(group, codec)[0])) for group in groups for _ in group]


# Rows like a residual stream, rows of few values (ties, zeros), rows of anything a codec takes.
widths = st.sampled_from([1, 2, 3, 31, 32, 33, 64, 71, 72, 73, 145])
heavy = st.builds(lambda tail, scale: tail * scale, st.floats(-8, 8, width=32), st.sampled_from([1.0, 1.0, 1.0, 1.0, 64.0, 4096.0]))
few = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 2.0, 127.0, 2.0**-130])
values = st.one_of(few, heavy, st.floats(-(2.0**120), 2.0**120, width=32))


@st.composite
def row_blocks(draw: st.DrawFn, max_rows: int = 3) -> npt.NDArray[np.float32]:
    """-> [n, width] float32, n from 0 on"""
    width, num_rows = draw(widths), draw(st.integers(0, max_rows))
    kind = draw(st.sampled_from([few, heavy, values]))
    seed, sizes = draw(st.integers(0, 2**32 - 1)), draw(st.lists(kind, min_size=1, max_size=12))
    chosen = np.random.default_rng(seed).choice(np.array(sizes, np.float32), size=(num_rows, width))
    noise = np.random.default_rng(seed + 1).uniform(0.5, 1.0, size=chosen.shape) if draw(st.booleans()) else 1.0
    return (chosen * noise).astype(np.float32)


def in_range(rows: npt.NDArray[np.float32], codec: str) -> npt.NDArray[np.float32]:
    """Cut to what the codec takes."""
    return np.clip(rows, -65504, 65504) if codec == "float16" else rows
