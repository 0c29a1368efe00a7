"""How near to the cloud's text an answer has to be: option `quality` of a generation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from edgecloud.errors import ConfigError
from edgecloud.types import ExitScope


@dataclass(frozen=True, slots=True)
class Risk:
    """Of what the device answers by itself, a share of at most `risk` may differ from the target's choice, as calibrated.

    `scope`: `token`: single tokens are skipped. `before`: a request goes one way as a whole, by the first of its guesses; `after`:
    by the device's whole answer.
    """

    risk: float
    scope: ExitScope = "token"

    def __post_init__(self) -> None:
        """Check both. Raises ConfigError."""
        if not isinstance(self.risk, int | float) or isinstance(self.risk, bool) or not 0 < self.risk < 1:
            raise ConfigError(f"risk is {self.risk!r}; it takes a share above 0 and below 1")
        if self.scope not in get_args(ExitScope):
            raise ConfigError(f"scope is {self.scope!r}; it takes {', '.join(get_args(ExitScope))}")


@dataclass(frozen=True, slots=True)
class CloudShare:
    """About so large a share of requests goes to the cloud, the least sure ones; nothing bounds how far the others diverge.

    `scope`: `before` the answer, by the first of its guesses, or `after` it, by the device's whole answer.
    """

    share: float
    scope: ExitScope = "before"

    def __post_init__(self) -> None:
        """Check both. Raises ConfigError."""
        if not isinstance(self.share, int | float) or isinstance(self.share, bool) or not 0 <= self.share <= 1:
            raise ConfigError(f"cloud share is {self.share!r}; it takes a share from 0 to 1")
        if self.scope not in ("before", "after"):
            raise ConfigError(f"scope is {self.scope!r}; of a cloud share it takes before, after")


Quality = Literal["exact", "offline"] | Risk | CloudShare


def check_quality(quality: object, mode: str) -> None:
    """Raises ConfigError: no quality, or one that this mode cannot give."""
    if quality is None:
        if mode == "cascade":
            raise ConfigError("mode 'cascade' takes a quality; say Risk(0.05), CloudShare(0.3), 'exact' or 'offline'")
        return
    if not (isinstance(quality, Risk | CloudShare) or quality in ("exact", "offline")):
        raise ConfigError(f"quality is {quality!r}; it takes 'exact', 'offline', Risk(...) or CloudShare(...)")
    if mode not in _MODES["exact" if quality == "exact" else "offline" if quality == "offline" else "risk"]:
        raise ConfigError(f"quality is {quality!r}, which mode {mode!r} cannot give; use mode 'auto' or 'cascade'")


_MODES = {
    "exact": {"auto", "cascade", "cloud", "speculative"},
    "offline": {"auto", "cascade", "edge"},
    "risk": {"auto", "cascade"},
}
