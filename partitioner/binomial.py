"""What a count of wrong answers says of the rate behind it: exact binomial bounds (Clopper and Pearson, 1934)."""

from __future__ import annotations

from scipy import stats


def upper_bound(num_wrong: int, num: int, delta: float) -> float:
    """The rate is above it with probability delta at most: the least rate whose test `rate <= r` would not reject.  -> 0 to 1"""
    if num_wrong >= num:
        return 1.0
    return float(stats.beta.ppf(1.0 - delta, num_wrong + 1, num - num_wrong))


def interval(num_wrong: int, num: int, delta: float) -> tuple[float, float]:
    """The rate lies outside with probability delta at most, half of it on either side."""
    low = 0.0 if num_wrong == 0 else float(stats.beta.ppf(delta / 2, num_wrong, num - num_wrong + 1))
    return low, upper_bound(num_wrong, num, delta / 2)
