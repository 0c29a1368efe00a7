"""Ways to encode a boundary row that were weighed against the codecs of kernels/codec.py, as float arithmetic without bytes.

Groups of channels with a bfloat16 step; outliers of a row kept beside it as float16 with an index; offsets; square roots; a
Hadamard transform of every group; a wide code for the largest channel of every group, which is what the codecs do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from edgecloud.kernels.codec import INT4_BORDERS, row_bytes
from edgecloud.partitioner.damage import through_codec

TINY = 1e-30


@dataclass(frozen=True, slots=True)
class Scheme:
    change: Callable[[Tensor], Tensor]  # rows [n, width] to what is left of them
    row_bytes: Callable[[int], int]


def grouped(rows: Tensor, group: int) -> Tensor:
    """-> [n, groups, group], padded with zeros"""
    num_groups = math.ceil(rows.shape[1] / group)
    return pad(rows, (0, num_groups * group - rows.shape[1])).reshape(len(rows), num_groups, group)


def rejoined(groups: Tensor, width: int) -> Tensor:
    return groups.flatten(1)[:, :width]


def rounded(groups: Tensor, step: Tensor, highest: int) -> Tensor:
    step = step.to(torch.bfloat16).float().clamp(min=TINY)
    return (groups / step).round().clamp(-highest, highest) * step


def plain(bits: int, group: int) -> Scheme:
    """A step a group, by its largest channel."""
    highest = 2 ** (bits - 1) - 1

    def change(rows: Tensor) -> Tensor:
        x = grouped(rows, group)
        return rejoined(rounded(x, x.abs().amax(2, keepdim=True) / highest, highest), rows.shape[1])

    return Scheme(change, lambda width: width * bits // 8 + 2 * math.ceil(width / group))


def offset(bits: int, group: int) -> Scheme:
    """A step and a lowest value a group."""

    def change(rows: Tensor) -> Tensor:
        x = grouped(rows, group)
        lowest = x.amin(2, keepdim=True).to(torch.bfloat16).float()
        return rejoined(
            rounded(x - lowest, (x.amax(2, keepdim=True) - lowest) / (2**bits - 1), 2**bits - 1) + lowest, rows.shape[1]
        )

    return Scheme(change, lambda width: width * bits // 8 + 4 * math.ceil(width / group))


def square_root(bits: int, group: int) -> Scheme:
    """Steps of the square root, so that small values have finer ones."""
    inner = plain(bits, group)

    def change(rows: Tensor) -> Tensor:
        root = inner.change(rows.sign() * rows.abs().sqrt())
        return root.sign() * root * root

    return Scheme(change, inner.row_bytes)


def hadamard(bits: int, group: int) -> Scheme:
    """Every group turned, so that a large channel is spread over all; `group` is a power of two."""
    inner, turn = plain(bits, group), torch.ones(1, 1)
    while len(turn) < group:
        turn = torch.cat([torch.cat([turn, turn], 1), torch.cat([turn, -turn], 1)]) / math.sqrt(2)

    def change(rows: Tensor) -> Tensor:
        turned = inner.change((grouped(rows, group) @ turn).flatten(1))
        return rejoined(grouped(turned, group) @ turn, rows.shape[1])

    return Scheme(change, inner.row_bytes)


def outliers(inner: Scheme, count: int) -> Scheme:
    """The `count` largest channels of a row as float16, each with an index of 16 bits; the rest by another scheme."""

    def change(rows: Tensor) -> Tensor:
        at = rows.abs().topk(count, dim=1).indices
        return inner.change(rows.scatter(1, at, 0.0)).scatter(1, at, rows.gather(1, at).half().float())

    return Scheme(change, lambda width: inner.row_bytes(width) + 4 * count)


def wide(bits: int, group: int, *, even: bool = True) -> Scheme:
    """The largest channel of a group has 16 bits; the others even levels, or those of the codec int4."""
    highest = 2 ** (bits - 1) - 1 if even else 98
    borders = torch.tensor(INT4_BORDERS)

    def change(rows: Tensor) -> Tensor:
        x = grouped(rows, group)
        largest, at = x.abs().max(2, keepdim=True)
        second = x.abs().scatter(2, at, 0.0).amax(2, keepdim=True)
        step = (torch.maximum(second, largest / 256) / highest).to(torch.bfloat16).float().clamp(min=TINY)
        quotient = x / step
        codes = torch.bucketize(quotient.abs(), borders)
        levels = quotient.round() if even else quotient.sign() * codes * (7 + codes)
        return rejoined(levels.scatter(2, at, quotient.gather(2, at).round()) * step, rows.shape[1])

    return Scheme(change, lambda width: width * bits // 8 + 4 * math.ceil(width / group))


def codec(name: str) -> Scheme:
    return Scheme(lambda rows: through_codec(rows, name), lambda width: row_bytes(name, width))


SCHEMES = {
    "int8: plain, 36": plain(8, 36),
    "int8: offset, 72": offset(8, 72),
    "int8: square root, 36": square_root(8, 36),
    "int8: Hadamard, 64": hadamard(8, 64),
    "int8: 4 outliers, 64": outliers(plain(8, 64), 4),
    "int8: Hadamard, 64, 4 outliers": outliers(hadamard(8, 64), 4),
    "int8: wide, 96": wide(8, 96),
    "int8: wide, 72 (the codec)": codec("int8"),
    "int4: plain, 16": plain(4, 16),
    "int4: offset, 32": offset(4, 32),
    "int4: square root, 16": square_root(4, 16),
    "int4: Hadamard, 32": hadamard(4, 32),
    "int4: 9 outliers, 32": outliers(plain(4, 32), 9),
    "int4: Hadamard, 32, 9 outliers": outliers(hadamard(4, 32), 9),
    "int4: wide, 32": wide(4, 32),
    "int4: wide, 64, closer levels": wide(4, 64, even=False),
    "int4: wide, 24, closer levels": wide(4, 24, even=False),
    "int4: wide, 32, closer (the codec)": codec("int4"),
}
