"""Comparing logs of tokens, or texts: what two sides have in common is what a cache is still good for."""

from __future__ import annotations

from collections.abc import Sequence


def common_prefix(a: Sequence[object], b: Sequence[object]) -> int:
    """Length of the longest common prefix. Slices compare fast, so the first difference is found by halving."""
    same, end = 0, min(len(a), len(b))
    middle = end  # nearly always all of it
    while same < end:
        if a[same:middle] == b[same:middle]:
            same = middle
        else:
            end = middle - 1
        middle = (same + end + 1) // 2
    return same
