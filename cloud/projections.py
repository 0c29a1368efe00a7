"""The target's projections and norms as plain functions, with weights blocked for the CPU's matrix library.

Blocked weights are read faster by passes of few rows, and a row of the product gets the same bits whatever rows come with it,
which `pack` checks on every shape that it meets.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own habit
from torch import Tensor, nn

PACKED_DTYPES = (torch.float32, torch.bfloat16)
HINTED_ROWS = 16  # rows that the blocks are laid out for: few, as passes over drafts have
PROBED_ROWS = (1, 2, 3, 5, 8, 15, 16, 17, 33, 64, 65)
PROBED_SUMS = 40_000  # for each number of rows: of 16 bits most differences are rounded away
NO_ACTIVATION: tuple[str, list[Any], str] = ("none", [], "")

_packed_linear = torch.ops.mkldnn._linear_pointwise.default

RowsProbe = dict[tuple[int, int, torch.dtype], int | None]


def pack(model: nn.Module) -> bool:
    """Put a plain function in the place of every linear layer and every norm that torch has.

    A pass over one row calls 270 of them in a model of 30 layers, each through four Python frames: 3.5 % of the pass on a CPU.
    Norms that torch's own does not match bit by bit (one that adds 1 to its weight, or rounds elsewhere) stay as they are.

    -> whether the bits of a row depend on that row alone, in every projection
    """
    probed: RowsProbe = {}
    for name, module in list(model.named_modules()):
        if not name:
            continue
        if type(module) is nn.Linear:
            function = _projection(module, probed)
        elif (norm := _norm(module)) is not None:
            function = norm
        else:
            continue
        parent_name, _, attribute = name.rpartition(".")
        parent: Any = model.get_submodule(parent_name)
        delattr(parent, attribute)
        object.__setattr__(parent, attribute, function)
    return bool(probed) and None not in probed.values()


def _projection(module: nn.Linear, probed: RowsProbe) -> Callable[[Tensor], Tensor]:
    weight, bias = module.weight.detach(), module.bias
    if weight.device.type != "cpu" or weight.dtype not in PACKED_DTYPES or not torch._C._has_mkldnn:
        function: Any = partial(F.linear, weight=weight, bias=bias)
        probed[(*weight.shape, weight.dtype)] = None
    else:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, HINTED_ROWS)
        shape = (*weight.shape, weight.dtype)
        if shape not in probed:
            probed[shape] = _fewest_rows(packed, weight)
        function = partial(_two_rows if probed[shape] == 2 else _rows, packed=packed, bias=bias)
        weight = weight.new_empty(()).expand(weight.shape)  # the blocks hold the numbers; a tied embedding keeps its own
    function.weight, function.bias = weight, bias  # some architectures read a projection's weight.dtype
    return function  # type: ignore[no-any-return]


def _rows(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = _packed_linear(x, packed, bias, *NO_ACTIVATION)
    return out


def _two_rows(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """For a library that takes other code for a single row: it gets that row twice.  [..., rows, in] -> [..., rows, out]"""
    if x.shape[-2] > 1:
        return _rows(x, packed, bias)
    return _rows(x.expand(*x.shape[:-2], 2, -1).contiguous(), packed, bias)[..., :1, :]


def _fewest_rows(packed: Tensor, weight: Tensor) -> int | None:
    """From how many rows on a row's bits do not depend on how many there are: 1 or 2; None: they always may."""
    most = PROBED_ROWS[-1]
    x = torch.randn(most, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    with torch.inference_mode():
        every = _rows(x, packed, None)
        unlike = {
            num_rows
            for num_rows in PROBED_ROWS
            for at in range(0, min(most - num_rows + 1, -(-PROBED_SUMS // weight.shape[0])), num_rows)
            if not torch.equal(_rows(x[at : at + num_rows], packed, None), every[at : at + num_rows])
        }
    return 1 if not unlike else 2 if unlike == {1} else None


def _norm(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", None)
    if not isinstance(eps, float) or not isinstance(weight, nn.Parameter):
        return None
    function: Any = partial(torch.rms_norm, normalized_shape=weight.shape, weight=weight, eps=eps)
    function.weight = weight
    rows = 3 * torch.linspace(-3, 5, 8 * weight.numel(), device=weight.device).cos().view(8, -1).to(weight.dtype)
    with torch.inference_mode():
        return function if torch.equal(module(rows), function(rows)) else None
