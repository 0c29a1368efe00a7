"""Boundary codec in Triton, a program a group or a stretch of channels. See codec.py for the definition: the same bytes and floats.

No index comes out of the data, so no bytes of a stranger can make it read or write elsewhere. Tested in Triton's interpreter and
compiled for CUDA; it has not been run on a GPU. Codecs of plain floats are torch's own conversions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from edgecloud.kernels import codec_torch
from edgecloud.kernels.codec import FORMS, REACH

CHUNK = 1024  # channels that a program decodes


def encode(rows: Tensor, codec: str) -> Tensor:
    """Rows as bytes. rows: [n, width] float32 -> [n, row_bytes] uint8, on the same device

    Raises:
        ConfigError: as by the definition.
    """
    if codec not in FORMS:
        return codec_torch.encode(rows, codec)
    codec_torch.require_rows(rows, codec)
    form, (num_rows, width) = FORMS[codec], rows.shape
    data = torch.empty(num_rows, form.row_bytes(width), dtype=torch.uint8, device=rows.device)
    if num_rows:
        with torch.cuda.device_of(rows):  # type: ignore[no-untyped-call]  # Triton launches on the current device
            _encode_group[(num_rows, form.num_groups(width))](
                rows,
                data,
                width,
                *rows.stride(),
                form.unit,
                BITS=form.bits,
                GROUP=form.group,
                REACH=REACH,
                BLOCK=triton.next_power_of_2(form.group),
            )
    return data


def decode(data: Tensor, codec: str, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values that bytes stand for, rounded to `dtype`. data: [n, row_bytes] uint8 -> [n, width], on the same device

    Raises:
        ConfigError: as by the definition.
    """
    if codec not in FORMS:
        return codec_torch.decode(data, codec, width, dtype)
    codec_torch.require_data(data, codec, width)
    form, num_rows = FORMS[codec], len(data)
    rows = torch.empty(num_rows, width, dtype=torch.float32, device=data.device)
    if num_rows:
        with torch.cuda.device_of(data):  # type: ignore[no-untyped-call]  # torch's
            _decode_chunk[(num_rows, triton.cdiv(width, CHUNK))](
                data, rows, width, *data.stride(), BITS=form.bits, GROUP=form.group, CHUNK=CHUNK
            )
    return rows.to(dtype)


@triton.jit
def _encode_group(
    rows: tl.tensor,
    data: tl.tensor,
    width: tl.tensor,
    row_stride: tl.tensor,
    stride: tl.tensor,
    unit: tl.tensor,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    REACH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One group of one row: its step, its wide code, its narrow codes."""
    row = tl.program_id(0).to(tl.int64)
    group, num_groups = tl.program_id(1), tl.num_programs(1)
    i = tl.arange(0, BLOCK)
    inside = (i < GROUP) & (group * GROUP + i < width)
    x = tl.load(rows + row * row_stride + (group * GROUP + i) * stride, mask=inside, other=0.0).to(tl.float64)
    size = tl.abs(x)
    largest, at = tl.max(size, 0, return_indices=True)  # the first of equals
    second = tl.max(tl.where(i == at, 0.0, size), 0)
    step = (tl.maximum(second, largest / REACH) * unit).to(tl.float32)
    bits = step.to(tl.uint32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    bits = tl.where(bits < 0x80, 0, bits)
    step = (bits << 16).to(tl.float32, bitcast=True)
    quotient = x / tl.where(bits == 0, float("inf"), step).to(tl.float64)
    nearest = ((quotient + 6755399441055744.0) - 6755399441055744.0).to(tl.int32)  # 1.5 * 2**52 leaves no fraction: half to even
    wide = tl.sum(tl.where(i == at, nearest, 0), 0)
    if BITS == 8:
        codes = nearest
    else:
        codes = tl.zeros([BLOCK], tl.int32)
        for c in tl.static_range(7):
            codes += (tl.abs(quotient) > (c + 4) * (c + 4) - 12).to(tl.int32)
        codes = tl.where(quotient < 0, -codes, codes)
    codes = tl.where(i == at, -(1 << (BITS - 1)), codes)

    num_bytes = 4 * num_groups + (width * BITS + 7) // 8
    begin = data + row * num_bytes
    tl.store(begin + 2 * group, (bits & 0xFF).to(tl.uint8))
    tl.store(begin + 2 * group + 1, (bits >> 8).to(tl.uint8))
    tl.store(begin + 2 * (num_groups + group), (wide & 0xFF).to(tl.uint8))
    tl.store(begin + 2 * (num_groups + group) + 1, ((wide >> 8) & 0xFF).to(tl.uint8))
    if BITS == 8:
        tl.store(begin + 4 * num_groups + group * GROUP + i, (codes & 0xFF).to(tl.uint8), mask=inside)
    else:
        low, high = tl.split(tl.reshape(tl.where(inside, codes & 0xF, 0), [BLOCK // 2, 2]))
        j = tl.arange(0, BLOCK // 2)
        kept = (2 * j < GROUP) & (group * GROUP + 2 * j < width)
        tl.store(begin + 4 * num_groups + group * (GROUP // 2) + j, (low | (high << 4)).to(tl.uint8), mask=kept)


@triton.jit
def _decode_chunk(
    data: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    row_stride: tl.tensor,
    stride: tl.tensor,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """A stretch of one row's channels."""
    row = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    inside = v < width
    num_groups = (width + GROUP - 1) // GROUP
    group = v // GROUP
    begin = data + row * row_stride
    step = _two_bytes(begin, 2 * group, stride, inside)
    wide = _two_bytes(begin, 2 * (num_groups + group), stride, inside)
    wide = (wide ^ 0x8000).to(tl.int32) - 0x8000
    if BITS == 8:
        code = tl.load(begin + (4 * num_groups + v) * stride, mask=inside, other=0).to(tl.int32)
    else:
        code = tl.load(begin + (4 * num_groups + v // 2) * stride, mask=inside, other=0).to(tl.int32)
        code = (code >> (4 * (v % 2))) & 0xF
    half = 1 << (BITS - 1)
    code = (code ^ half) - half
    level = code
    if BITS == 4:
        level = code * (7 + tl.abs(code))
    level = tl.where(code == -half, wide, level)
    value = level.to(tl.float32) * (step << 16).to(tl.float32, bitcast=True)
    tl.store(rows + row * width + v, value, mask=inside)


@triton.jit
def _two_bytes(begin: tl.tensor, at: tl.tensor, stride: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """A little-endian number of 16 bits, which need not be aligned. -> uint32"""
    low = tl.load(begin + at * stride, mask=inside, other=0).to(tl.uint32)
    high = tl.load(begin + (at + 1) * stride, mask=inside, other=0).to(tl.uint32)
    return low | (high << 8)
