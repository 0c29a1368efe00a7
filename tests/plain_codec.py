"""The boundary codec written again in plain Python, group by group on fractions, and examples to hold the kernels against it."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

GROUPS = {"int8": 72, "int4": 32}
UNITS = {"int8": Fraction(129, 2**14), "int4": Fraction(585, 2**12)}


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
    step_bits = to_bfloat16(max(others, abs(x[at]) / 2 ** (16 - num_bits)) * UNITS[codec])
    step = from_bfloat16(step_bits)
    codes = [round(v / step) if step else 0 for v in x]  # Python rounds a fraction half to even
    wide, codes[at] = codes[at], -(2 ** (num_bits - 1))
    assert all(abs(code) <= 2 ** (num_bits - 1) - 1 for i, code in enumerate(codes) if i != at)
    return step_bits, wide, codes


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
