"""What a pass takes: a + b * new tokens + c * context, fitted to the passes as they come."""

from __future__ import annotations

import numpy as np

from edgecloud.cloud.work import PassCost

MEMORY = 0.98  # weight of a pass relative to the one after it: the fit follows the last fifty
CONTEXT_UNIT = 1000.0  # keeps the three columns of like size
NUM_TRUSTED = 8  # passes before the fit is believed
SLOWEST_SHARE = 3.0  # a pass counts for at most this many times what was expected: another process took the machine


class PassCostFit:
    """Recursive least squares with forgetting."""

    def __init__(self) -> None:
        self._weights = np.zeros(3)
        self._covariance = np.eye(3) * 1e4
        self._num_seen = 0

    @property
    def is_trusted(self) -> bool:
        """Whether enough passes were seen."""
        return self._num_seen >= NUM_TRUSTED

    @property
    def cost(self) -> PassCost:
        """The fit in milliseconds; no term is negative."""
        a, b, c = np.maximum(self._weights, 0.0).tolist()
        return PassCost(a, b, c / CONTEXT_UNIT)

    def predict_ms(self, num_new_tokens: int, num_context_tokens: int) -> float:
        """Of a pass over so many rows that attend to so many tokens in all."""
        cost = self.cost
        return cost.base_ms + cost.per_token_ms * num_new_tokens + cost.per_context_token_ms * num_context_tokens

    def observe(self, num_new_tokens: int, num_context_tokens: int, took_ms: float) -> None:
        """Learn from a pass."""
        row = np.array([1.0, num_new_tokens, num_context_tokens / CONTEXT_UNIT])
        expected_ms = float(row @ self._weights)
        if self.is_trusted and expected_ms > 0:
            took_ms = min(took_ms, SLOWEST_SHARE * expected_ms)
        spread = self._covariance @ row
        gain = spread / (MEMORY + row @ spread)
        self._weights = self._weights + gain * (took_ms - expected_ms)
        self._covariance = (self._covariance - np.outer(gain, spread)) / MEMORY
        # Where every pass is alike nothing new is learned, and forgetting alone would grow without bound.
        self._covariance *= min(1.0, 3e4 / float(np.trace(self._covariance)))
        self._num_seen += 1
