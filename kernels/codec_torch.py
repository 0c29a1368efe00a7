"""Boundary codec in torch, on any device. See codec.py for the definition: the same bytes, the same floats."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from edgecloud.errors import ConfigError
from edgecloud.kernels.codec import FORMS, INT4_BORDERS, REACH, SMALLEST_STEP, Form, require_codec, require_range, row_bytes


def encode(rows: Tensor, codec: str) -> Tensor:
    """Rows as bytes. rows: [n, width] float32 -> [n, row_bytes] uint8, on the same device

    Raises:
        ConfigError: as by the definition.
    """
    require_rows(rows, codec)
    if codec in FORMS:
        return _encode_grouped(rows, FORMS[codec])
    return _copy(rows.to(torch.float32 if codec == "float32" else torch.float16)).view(torch.uint8)


def decode(data: Tensor, codec: str, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values that bytes stand for, rounded to `dtype`. data: [n, row_bytes] uint8 -> [n, width], on the same device

    Raises:
        ConfigError: as by the definition.
    """
    require_data(data, codec, width)
    if codec in FORMS:
        return _decode_grouped(data, FORMS[codec], width).to(dtype)
    return _copy(data).view(torch.float32 if codec == "float32" else torch.float16).to(torch.float32).to(dtype)


def require_rows(rows: Tensor, codec: str) -> None:
    """Raises ConfigError if they cannot be encoded."""
    require_codec(codec)
    if rows.ndim != 2 or rows.shape[1] < 1 or rows.dtype != torch.float32:
        raise ConfigError(f"rows are {rows.dtype} of shape {list(rows.shape)}; the codec takes torch.float32 [n, width]")
    require_range(rows.abs().max().item() if len(rows) else 0.0, codec)


def require_data(data: Tensor, codec: str, width: int) -> None:
    """Raises ConfigError if it cannot be decoded."""
    num_bytes = row_bytes(codec, width)
    if data.ndim != 2 or data.shape[1] != num_bytes or data.dtype != torch.uint8:
        raise ConfigError(
            f"data is {data.dtype} of shape {list(data.shape)}; {codec} rows of {width} channels are torch.uint8 [n, {num_bytes}]"
        )


def _copy(tensor: Tensor) -> Tensor:
    """With its rows one after another from an aligned address on: only so can it be viewed as another dtype."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _encode_grouped(rows: Tensor, form: Form) -> Tensor:
    num_rows, width = rows.shape
    num_groups = form.num_groups(width)
    x = pad(rows.to(torch.float64), (0, num_groups * form.group - width)).reshape(num_rows, num_groups, form.group)
    size = x.abs()
    largest, at = size.max(dim=2, keepdim=True)  # the first of equals
    second = size.scatter(2, at, 0.0).amax(dim=2, keepdim=True)
    step = (torch.maximum(second, largest / REACH) * form.unit).to(torch.float32).to(torch.bfloat16)
    step = step.where(step >= SMALLEST_STEP, 0.0)
    x = x / step.to(torch.float64).where(step > 0, torch.inf)
    wide = x.gather(2, at).round().to(torch.int16)
    codes = _nearest_levels(x, form.bits).scatter(2, at, form.marker).reshape(num_rows, num_groups * form.group)
    packed = codes.to(torch.int8) if form.bits == 8 else codes[:, 0::2] & 0xF | codes[:, 1::2] << 4
    packed = packed.to(torch.uint8)[:, : form.row_bytes(width) - form.codes_start(width)]
    return torch.cat([_copy(step[..., 0]).view(torch.uint8), _copy(wide[..., 0]).view(torch.uint8), packed], dim=1)


def _decode_grouped(data: Tensor, form: Form, width: int) -> Tensor:
    num_rows, num_groups, start = len(data), form.num_groups(width), form.codes_start(width)
    steps = _copy(data[:, : start // 2]).view(torch.bfloat16).to(torch.float32)
    wide = _copy(data[:, start // 2 : start]).view(torch.int16)
    packed = data[:, start:].to(torch.int16)
    if form.bits == 4:
        packed = torch.stack([packed & 0xF, packed >> 4], dim=2).reshape(num_rows, 2 * packed.shape[1])
    codes = (packed ^ -form.marker) + form.marker
    codes = pad(codes[:, :width], (0, num_groups * form.group - width)).reshape(num_rows, num_groups, form.group)
    levels = codes if form.bits == 8 else codes * (7 + codes.abs())
    values = levels.where(codes != form.marker, wide[..., None]).to(torch.float32) * steps[..., None]
    return values.reshape(num_rows, num_groups * form.group)[:, :width].contiguous()


def _nearest_levels(quotients: Tensor, bits: int) -> Tensor:
    """Narrow codes."""
    if bits == 8:
        return quotients.round().to(torch.int16)
    borders = torch.tensor(INT4_BORDERS, dtype=torch.float64, device=quotients.device)
    codes = torch.bucketize(quotients.abs(), borders).to(torch.int16)
    return torch.where(quotients < 0, -codes, codes)
