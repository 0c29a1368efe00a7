"""How the next token is chosen: the settings that, with target, tokens and seed, determine every token."""

from __future__ import annotations

import math
from dataclasses import dataclass

from edgecloud.errors import ConfigError


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """Names and order of steps are those of `transformers.GenerationConfig`; the defaults are greedy.

    Raises:
        ConfigError: a value is outside its range, NaN or infinite.
    """

    temperature: float = 0.0  # 0: argmax of the logits
    top_k: int = 0  # keep the k largest logits and their ties; 0: off
    top_p: float = 1.0  # keep the smallest set of tokens that reaches this probability; 1.0: off
    repetition_penalty: float = 1.0  # divides positive and multiplies negative logits of tokens seen; 1.0: off
    seed: int = 0  # 64 bits, keys the noise

    def __post_init__(self) -> None:
        """Check every value once, for the user's arguments and for the wire alike."""
        _require(math.isfinite(self.temperature) and 0.0 <= self.temperature <= 100.0, "temperature", self.temperature, "0 to 100")
        _require(_is_int(self.top_k) and 0 <= self.top_k < 2**31, "top_k", self.top_k, "a whole number from 0 (off)")
        _require(math.isfinite(self.top_p) and 0.0 < self.top_p <= 1.0, "top_p", self.top_p, "above 0 and at most 1 (off)")
        _require(
            math.isfinite(self.repetition_penalty) and 0.01 <= self.repetition_penalty <= 100.0,
            "repetition_penalty", self.repetition_penalty, "0.01 to 100, 1 is off",
        )  # fmt: skip
        _require(_is_int(self.seed) and 0 <= self.seed < 2**64, "seed", self.seed, "a whole number from 0 to 2**64 - 1")

    @property
    def greedy(self) -> bool:
        """Whether no noise is drawn."""
        return self.temperature == 0.0


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"{name} is {value!r}; it takes {allowed}")
