"""What a pass takes: a + b * new tokens + c * context, fitted to the passes as they come."""

from __future__ import annotations

from edgecloud.cloud.work import PassCost

MEMORY = 0.98  # weight of a pass relative to the one after it: the fit follows the last fifty
TOKENS_UNIT, CONTEXT_UNIT = 16.0, 1000.0  # keep the three columns of like size
ANCHOR = 1e-3  # passes' worth of trust in the terms as they are: what passes say nothing about stays
NUM_TRUSTED = 8  # passes before the fit is believed
SLOWEST_SHARE = 3.0  # a pass counts for at most this many times what was expected: another process took the machine

Vector = tuple[float, float, float]


class PassCostFit:
    """Least squares with forgetting, from sums that only ever decay and grow: passes that are all alike cannot upset it.

    In plain Python: of three columns it takes a third of NumPy's time.
    """

    def __init__(self, memory: float = MEMORY, slowest_share: float = SLOWEST_SHARE) -> None:
        self._memory = memory
        self._slowest_share = slowest_share
        self._weights: Vector = (0.0, 0.0, 0.0)
        # Over all passes, by weight: the products of any two columns (upper triangle), and of each with the time.
        self._squares = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        self._times: Vector = (0.0, 0.0, 0.0)
        self._num_seen = 0

    @property
    def is_trusted(self) -> bool:
        """Whether enough passes were seen."""
        return self._num_seen >= NUM_TRUSTED

    @property
    def cost(self) -> PassCost:
        """The fit in milliseconds; no term is negative."""
        a, b, c = self._weights
        return PassCost(max(a, 0.0), max(b, 0.0) / TOKENS_UNIT, max(c, 0.0) / CONTEXT_UNIT)

    def predict_ms(self, num_new_tokens: int, num_context_tokens: int) -> float:
        """Of a pass over so many rows that attend to so many tokens in all."""
        cost = self.cost
        return cost.base_ms + cost.per_token_ms * num_new_tokens + cost.per_context_token_ms * num_context_tokens

    def observe(self, num_new_tokens: int, num_context_tokens: int, took_ms: float) -> None:
        """Learn from a pass."""
        expected_ms = self.predict_ms(num_new_tokens, num_context_tokens)
        if self.is_trusted and expected_ms > 0:
            took_ms = min(took_ms, self._slowest_share * expected_ms)
        x, y = num_new_tokens / TOKENS_UNIT, num_context_tokens / CONTEXT_UNIT
        a, b, c = self._weights
        n, sx, sy, xx, xy, yy = (self._memory * old for old in self._squares)
        n, sx, sy, xx, xy, yy = n + 1, sx + x, sy + y, xx + x * x, xy + x * y, yy + y * y
        t, tx, ty = (self._memory * old for old in self._times)
        t, tx, ty = t + took_ms, tx + took_ms * x, ty + took_ms * y
        left = (t - n * a - sx * b - sy * c, tx - sx * a - xx * b - xy * c, ty - sy * a - xy * b - yy * c)  # unexplained
        da, db, dc = _solved(n + ANCHOR, sx, sy, xx + ANCHOR, xy, yy + ANCHOR, left)
        self._weights = (a + da, b + db, c + dc)
        self._squares, self._times = (n, sx, sy, xx, xy, yy), (t, tx, ty)
        self._num_seen += 1


def _solved(p: float, q: float, r: float, s: float, t: float, u: float, right: Vector) -> Vector:
    """What the positive definite matrix ((p, q, r), (q, s, t), (r, t, u)) takes to `right`; by Cholesky's factors."""
    l11 = p**0.5
    l21, l31 = q / l11, r / l11
    l22 = (s - l21 * l21) ** 0.5
    l32 = (t - l21 * l31) / l22
    l33 = (u - l31 * l31 - l32 * l32) ** 0.5
    z1 = right[0] / l11
    z2 = (right[1] - l21 * z1) / l22
    z3 = (right[2] - l31 * z1 - l32 * z2) / l33
    c = z3 / l33
    b = (z2 - l32 * c) / l22
    return (z1 - l21 * b - l31 * c) / l11, b, c
