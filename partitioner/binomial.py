"""What a count of wrong answers says of the rate behind it: exact binomial bounds (Clopper and Pearson, 1934)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import special


def upper_bounds(num_wrong: Sequence[int], num: Sequence[int], delta: float) -> list[float]:
    """The rate behind each count is above its bound with probability delta at most.  -> 0 to 1; 1 where all are wrong"""
    wrong, right = np.asarray(num_wrong, np.float64), np.asarray(num, np.float64) - num_wrong
    bounds = special.betaincinv(wrong + 1, np.maximum(right, 1), 1.0 - delta)
    return [float(bound) for bound in np.where(right > 0, bounds, 1.0)]


def upper_bound(num_wrong: int, num: int, delta: float) -> float:
    """Of one count."""
    return upper_bounds([num_wrong], [num], delta)[0]


def interval(num_wrong: int, num: int, delta: float) -> tuple[float, float]:
    """The rate lies outside with probability delta at most, half of it on either side."""
    return 1.0 - upper_bound(num - num_wrong, num, delta / 2), upper_bound(num_wrong, num, delta / 2)
