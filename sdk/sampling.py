"""How the next token is chosen: the settings that, with target, tokens and seed, determine every token."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real

from edgecloud.errors import ConfigError

MIN_TEMPERATURE = 1e-6  # above 0; far below it, dividing the logits would overflow float64


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
        t, k, p, penalty = self.temperature, self.top_k, self.top_p, self.repetition_penalty
        # NaN fails every comparison, infinity one of two.
        _require(_is_real(t) and (t == 0 or MIN_TEMPERATURE <= t <= 100), "temperature", t, "0 (greedy), or 1e-6 to 100")
        _require(_is_int(k) and 0 <= k < 2**31, "top_k", k, "a whole number from 0 (off) to 2**31 - 1")
        _require(_is_real(p) and 0 < p <= 1, "top_p", p, "a number above 0 and at most 1 (off)")
        _require(_is_real(penalty) and 0.01 <= penalty <= 100, "repetition_penalty", penalty, "0.01 to 100, 1 is off")
        _require(_is_int(self.seed) and 0 <= self.seed < 2**64, "seed", self.seed, "a whole number from 0 to 2**64 - 1")

    @property
    def greedy(self) -> bool:
        """Whether no noise is drawn."""
        return self.temperature == 0.0


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"{name} is {_shown(value)}; it takes {allowed}")


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        text = "an integer of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."
