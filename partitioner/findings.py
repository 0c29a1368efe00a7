"""What a verification finds: figures as recorded and as measured now, whatever the bundle holds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

ERROR_TOLERANCE = 1.25  # times what is recorded


@dataclass(frozen=True, slots=True)
class Finding:
    """One figure, as recorded and as measured now."""

    what: str
    recorded: float | None  # None: the bundle does not say
    measured: float | None  # None: no number, so it has not passed
    limit: float | None  # the worst that still passes
    passed: bool


@dataclass(frozen=True, slots=True)
class Verification:
    """All of them."""

    bundle: str
    findings: list[Finding]
    notes: list[str]  # what was not measured, and why

    @property
    def passed(self) -> bool:
        """Whether nothing is worse than recorded, beyond the tolerances."""
        return all(finding.passed for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """The object that `edgecloud verify --json` prints."""
        return {**asdict(self), "passed": self.passed}
