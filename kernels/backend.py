"""Which version of the kernels runs on a device: Triton on CUDA, torch everywhere else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from edgecloud.errors import ConfigError
from edgecloud.kernels import attention_torch, choice_torch, codec_torch
from edgecloud.kernels.attention import Segment
from edgecloud.kernels.choice_torch import ChoiceRow


@dataclass(frozen=True, slots=True)
class Backend:
    """The hot operations, with the signatures of attention_torch, choice_torch and codec_torch."""

    ragged_paged_attention: Callable[[Tensor, Tensor, Tensor, Sequence[Segment], float, int | None, float | None], Tensor]
    choose: Callable[[Tensor, Sequence[ChoiceRow]], list[int]]
    decode_rows: Callable[[Tensor, str, int, torch.dtype], Tensor]
    tile: int  # tokens of a context, cut at absolute positions, that the attention reads best from one run of slots; 1: no matter


@cache
def backend_for(device_type: str) -> Backend:
    """The kernels for tensors on `torch.device.type`.

    Raises:
        ConfigError: the device is CUDA and Triton is not installed.
    """
    if device_type != "cuda":
        return Backend(attention_torch.ragged_paged_attention, choice_torch.choose, codec_torch.decode, attention_torch.TILE)
    try:
        from edgecloud.kernels import attention_triton, choice_triton, codec_triton  # a server without a GPU has no Triton
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "triton":
            raise
        raise ConfigError("device cuda needs triton, which is not installed; pip install edgecloud[cuda]") from error
    return Backend(attention_triton.ragged_paged_attention, choice_triton.choose, codec_triton.decode, 1)
