"""The target's projections and norms as plain functions, with weights blocked for the CPU's matrix library.

Blocked weights are read faster by passes of few rows, and a row of the product gets the same bits whatever rows come with it,
which `pack` checks on every shape that it meets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own habit
from torch import Tensor, nn

PACKED_DTYPES = (torch.float32, torch.bfloat16)
# Names of layers that read one input, in the order in which they are called: one product is cheaper than three.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
FEW_ROWS = 2  # up to here weights of float32 are read faster unblocked: 36 instead of 40 ms, at 5 rows 69 instead of 48
HINTED_ROWS = 16  # rows that the blocks are laid out for: few, as passes over drafts have
PROBED_ROWS = (1, 2, 3, 5, 8, 15, 16, 17, 33, 64, 65)
PROBED_SUMS = 40_000  # for each number of rows: of 16 bits most differences are rounded away
# Every number of rows is a product of its own to oneDNN: 1 ms to compile, 0.6 MB to keep. So a pass has one of a few numbers.
LARGEST_STEP = 32
UNLIKE = 1e-3  # share of a norm's entries whose last bit of 16 may be another; where a norm rounds elsewhere a quarter is
NO_ACTIVATION: tuple[str, list[Any], str] = ("none", [], "")

Function = Callable[[Tensor], Tensor]

_packed_linear = torch.ops.mkldnn._linear_pointwise.default


def pack(model: nn.Module, *, independent_rows: bool) -> bool:
    """Put a plain function in the place of every linear layer and every norm that torch has.

    A pass over one row calls 270 of them in a model of 30 layers, each through four Python frames: 3.5 % of the pass on a CPU.
    Norms that no function here matches, bit by bit (in bfloat16 nearly so), stay as they are: one that adds 1 to its weight.

    With `independent_rows` the bits of a row shall depend on that row alone. Without, passes of few rows read weights of float32
    as they were saved, which is faster, and these stay in memory beside the blocked ones.

    -> whether the bits of a row depend on that row alone, in every projection
    """
    packer = _Packer(independent_rows)
    for parent in list(model.modules()):
        children = dict(parent.named_children())
        linears = {name: child for name, child in children.items() if type(child) is nn.Linear}
        for names in SIBLINGS:
            if all(name in linears for name in names) and _alike(siblings := [linears[name] for name in names]):
                for name, function in zip(names, packer.together(siblings), strict=True):
                    _replace(parent, name, function, linears.pop(name))
        for name, linear in linears.items():
            _replace(parent, name, packer.alone(linear), linear)
        for name, child in children.items():
            if type(child) is not nn.Linear and (norm := _norm(child)) is not None:
                _replace(parent, name, norm, child)
    return packer.rows_are_independent


def padded_rows(num_rows: int) -> int:
    """The number of rows that a product over `num_rows` is made with: up to 8 as many, then at most a quarter more."""
    step = min(LARGEST_STEP, 1 << max(0, (num_rows - 1).bit_length() - 3))
    return -(-num_rows // step) * step


def joint(projections: Sequence[Any]) -> Function | None:
    """The one product that gives the columns of all of these, in this order, where `pack` has made one."""
    shared = getattr(projections[0], "shared", None)
    if shared is None or len(projections) != len(shared.widths):
        return None
    alike = all(getattr(part, "shared", None) is shared and part.index == index for index, part in enumerate(projections))
    product: Function = shared.product
    return product if alike else None


class _Packer:
    """Makes functions of linear layers, and knows what it has found out about their shapes."""

    def __init__(self, independent_rows: bool) -> None:
        self._independent_rows = independent_rows
        self._fewest_rows: dict[tuple[int, int, torch.dtype], int | None] = {}

    @property
    def rows_are_independent(self) -> bool:
        return bool(self._fewest_rows) and None not in self._fewest_rows.values()

    def alone(self, linear: nn.Linear) -> Function:
        return self._product(linear.weight.detach(), linear.bias)

    def together(self, linears: Sequence[nn.Linear]) -> list[Function]:
        weight = torch.cat([linear.weight.detach() for linear in linears])
        bias = None if linears[0].bias is None else torch.cat([linear.bias.detach() for linear in linears])
        shared = _Shared(self._product(weight, bias), [linear.out_features for linear in linears])
        return [_Part(shared, index) for index in range(len(linears))]

    def _product(self, weight: Tensor, bias: Tensor | None) -> Function:
        shape = (*weight.shape, weight.dtype)
        if weight.device.type != "cpu" or weight.dtype not in PACKED_DTYPES or not torch._C._has_mkldnn:
            self._fewest_rows[shape] = None
            return partial(F.linear, weight=weight, bias=bias)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, HINTED_ROWS)
        if not self._independent_rows:
            self._fewest_rows[shape] = None
            if weight.dtype == torch.float32:
                return partial(_few_or_many, weight=weight, packed=packed, bias=bias)
            return partial(_rows, packed=packed, bias=bias)
        if shape not in self._fewest_rows:
            self._fewest_rows[shape] = _fewest_rows(packed, weight)
        return partial(_two_rows if self._fewest_rows[shape] == 2 else _rows, packed=packed, bias=bias)


class _Shared:
    """Projections of one input: one product, when the first of them is called."""

    def __init__(self, product: Function, widths: list[int]) -> None:
        self.product = product
        self.widths = widths
        self._x: Tensor | None = None
        self._parts: Sequence[Tensor] = ()

    def part(self, x: Tensor, index: int) -> Tensor:
        """Columns of projection `index`.  [..., in] -> [..., widths[index]]"""
        if x is not self._x:
            self._x, self._parts = x, torch.split_with_sizes(self.product(x), self.widths, -1)
        part = self._parts[index]
        if index == len(self.widths) - 1:
            self._x, self._parts = None, ()
        return part


class _Part:
    """One of several projections of one input."""

    def __init__(self, shared: _Shared, index: int) -> None:
        self.shared = shared
        self.index = index

    def __call__(self, x: Tensor) -> Tensor:
        return self.shared.part(x, self.index)


def is_packed(part: Any) -> bool:
    """Whether `pack` has put this in the place of a module."""
    return not isinstance(part, nn.Module) and callable(part) and hasattr(part, "weight")


def _alike(linears: Sequence[nn.Linear]) -> bool:
    first = linears[0]
    return all(
        linear.in_features == first.in_features
        and linear.weight.dtype == first.weight.dtype
        and linear.weight.device == first.weight.device
        and (linear.bias is None) == (first.bias is None)
        for linear in linears
    )


def _replace(parent: Any, name: str, function: Any, module: nn.Module) -> None:
    """A function with the module's weight and bias as attributes, for some architectures read a projection's weight.dtype."""
    weight: Any = module.weight
    if weight.device.type == "cpu" and isinstance(module, nn.Linear):  # blocked: only what it looked like is kept
        weight = weight.new_empty(()).expand(weight.shape)
    function.weight, function.bias = weight, getattr(module, "bias", None)
    delattr(parent, name)
    object.__setattr__(parent, name, function)


def _rows(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = _packed_linear(x, packed, bias, *NO_ACTIVATION)
    return out


def _few_or_many(x: Tensor, weight: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """Each by the product that is faster.  [..., rows, in] -> [..., rows, out]"""
    return F.linear(x, weight, bias) if x.shape[-2] <= FEW_ROWS else _rows(x, packed, bias)


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


def _norm(module: nn.Module) -> Function | None:
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", None)
    if not isinstance(eps, float) or not isinstance(weight, nn.Parameter):
        return None
    rows = 3 * torch.linspace(-3, 5, 8 * weight.numel(), device=weight.device).cos().view(8, -1).to(weight.dtype)
    with torch.inference_mode():
        expected = module(rows)
        if weight.dtype == torch.bfloat16 and weight.device.type == "cpu":
            signs = torch.tensor([[1.0], [-1.0]], dtype=weight.dtype)
            of_both = partial(_norm_of_both_signs, signs=signs, weight=weight, eps=eps)
            got = of_both(rows)
            if torch.allclose(got, expected, rtol=2**-7, atol=0.0) and (got != expected).float().mean().item() < UNLIKE:
                return of_both
        for function in (
            partial(torch.rms_norm, normalized_shape=weight.shape, weight=weight, eps=eps),
            partial(_norm_in_float32, weight=weight, eps=eps),
        ):
            if torch.equal(expected, function(rows)):
                return function
    return None


def _norm_of_both_signs(x: Tensor, signs: Tensor, weight: Tensor, eps: float) -> Tensor:
    """A row beside its negative has mean 0, so its deviation is its root mean square: one kernel of torch's instead of seven.

    In the middle of a pass, where every kernel comes to cold caches, that is 5 % of one over a single row. Up to rounding of
    float32, which changes an entry of bfloat16 in 100,000. Rounded before it is weighted, as transformers does.
    [..., width] -> the same
    """
    both = torch.layer_norm(x.unsqueeze(-2) * signs, (2, x.shape[-1]), None, None, eps)
    return both.select(-2, 0) * weight


def _norm_in_float32(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Rounded before it is weighted, as transformers does.  [..., width] -> the same"""
    return weight * torch.rms_norm(x.float(), weight.shape, None, eps).to(x.dtype)
