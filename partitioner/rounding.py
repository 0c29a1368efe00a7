"""Weights as int4 keeps them, so that a draft can learn with the errors that it will be shipped with.

The rule is that of ONNX Runtime's symmetric quantizer, with which `edgecloud partition` writes drafts: a scale for each block of
inputs, such that the entry furthest from zero becomes -8; scales in fp16.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own habit
from torch import Tensor

BLOCK = 32  # weights that share a scale
LOWEST, HIGHEST = -8, 7


def rounded(weights: Tensor) -> Tensor:
    """[out, in] -> the same, each entry a whole number of its block's scale. Rounding again changes nothing."""
    codes, scales = in_blocks(weights)
    found: Tensor = codes.mul_(scales.half()[..., None]).flatten(1)[:, : weights.shape[1]]
    return found


def in_blocks(weights: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] -> whole numbers from -8 to 7 as floats [out, blocks, 32], zeros behind the last input; and scales [out, blocks]"""
    blocks = F.pad(weights, (0, -weights.shape[1] % BLOCK)).reshape(len(weights), -1, BLOCK)
    furthest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scales = furthest / LOWEST
    codes = (blocks / torch.where(scales == 0, 1, scales)).round_().clamp_(LOWEST, HIGHEST)
    return codes, scales[..., 0]


@contextmanager
def rounded_for_now(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Within, the matrices among them are rounded; behind, they are what they were.

    What is learnt within is learnt at the rounded weights and applied to the exact ones (straight-through, Bengio et al. 2013).
    """
    matrices = [parameter for parameter in parameters if parameter.ndim == 2]
    exact = [matrix.detach().clone() for matrix in matrices]
    with torch.no_grad():
        for matrix, weights in zip(matrices, exact, strict=True):
            matrix.copy_(rounded(weights))
    try:
        yield
    finally:
        with torch.no_grad():
            for matrix, weights in zip(matrices, exact, strict=True):
                matrix.copy_(weights)
