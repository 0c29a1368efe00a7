"""What `edgecloud calibrate` found out: from which score on a device may answer without the cloud, at which risk.

Three scopes. `token`: the score is the probability that the draft gives its own most likely token (softmax at temperature 1
where a request is greedy, else at the request's). `before`: the mean over the draft's first tokens, OPENING_TOKENS of them, with
which nothing has been asked of the cloud yet. `after`: the mean over the draft's whole answer. An exit is taken where the score
is at least the threshold.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from edgecloud.bundle import MANIFEST, Bundle
from edgecloud.errors import BundleError, ConfigError
from edgecloud.manifest import build, build_list

OPENING_TOKENS = 8  # the first alone says nothing of the answer; eight say nearly as much as all of it
Scope = Literal["token", "before", "after"]


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """What one threshold would have done on the calibration's prompts."""

    threshold: float
    exit_share: float  # of all tokens, or requests, the share that needs no cloud
    divergence: float  # of their tokens, the share that is not the target's choice in the same context
    p_value: float  # of "the divergence is above the risk"; small: it is not


@dataclass(frozen=True, slots=True)
class ExitRule:
    """Exit where the score is at least `threshold`: then the divergence is at most `risk`, with confidence 1 - delta."""

    scope: Scope
    risk: float  # expected share of the exits' tokens that are not the target's choice
    temperature: float
    threshold: float | None  # None: no threshold passes the test, so nothing may be skipped
    num_prompts: int
    exit_share: float  # measured, as in CurvePoint
    divergence: float
    p_value: float
    prompts_needed: int | None  # where threshold is None, about so many prompts could have passed; None: no number would
    curve: list[CurvePoint]

    def __post_init__(self) -> None:
        _require_scope(self.scope)
        _require(0 < self.risk < 1, "risk", self.risk, "above 0 and below 1")
        _require(math.isfinite(self.temperature) and self.temperature >= 0, "temperature", self.temperature, "0 or more")
        _require(self.threshold is None or 0 <= self.threshold <= 1, "threshold", self.threshold, "from 0 to 1, or null")


@dataclass(frozen=True, slots=True)
class ShareRule:
    """Answer locally where the score is at least `threshold`: then about `cloud_share` of requests go to the cloud."""

    scope: Scope  # before or after
    cloud_share: float
    temperature: float
    threshold: float
    num_prompts: int
    divergence: float  # measured, of the tokens that are answered locally; nothing bounds it

    def __post_init__(self) -> None:
        _require_scope(self.scope)
        _require(0 <= self.cloud_share <= 1, "cloud_share", self.cloud_share, "from 0 to 1")
        _require(math.isfinite(self.temperature) and self.temperature >= 0, "temperature", self.temperature, "0 or more")


@dataclass(frozen=True, slots=True)
class Calibration:
    """What bundle.json says under `calibration`: for which pair it was made, how, and the rules."""

    pair_id: str
    draft_fingerprint: str
    target_fingerprint: str
    method: str  # the test, by name
    delta: float  # chance that a rule's divergence is above its risk after all, for each rule by itself
    rules: list[ExitRule]
    shares: list[ShareRule]

    def __post_init__(self) -> None:
        _require(0 < self.delta < 1, "delta", self.delta, "above 0 and below 1")

    @classmethod
    def from_dict(cls, content: dict[str, Any], manifest: Path = Path(MANIFEST)) -> Calibration:
        """Read what `to_dict` wrote. Raises BundleCorruptError: a field is missing, unknown, or of another type or range."""
        entry, rules = dict(content), content.get("rules")
        if isinstance(rules, list):
            rules = [_with_curve(rule, manifest) if isinstance(rule, dict) else rule for rule in rules]
        entry["rules"] = build_list(ExitRule, rules, "calibration.rules", manifest)
        entry["shares"] = build_list(ShareRule, entry.get("shares"), "calibration.shares", manifest)
        return build(cls, entry, "calibration", manifest)

    @classmethod
    def of(cls, bundle: Bundle) -> Calibration:
        """The calibration of a bundle.

        Raises:
            ConfigError: it has none.
            BundleError: it has that of another pair.
        """
        if bundle.calibration is None:
            raise ConfigError(f"{bundle.path} is not calibrated, so no risk is known; run `edgecloud calibrate {bundle.path}`")
        found = cls.from_dict(bundle.calibration, bundle.path / MANIFEST)
        own = bundle.pair_id, bundle.draft.fingerprint, bundle.target.fingerprint
        if own != (found.pair_id, found.draft_fingerprint, found.target_fingerprint):
            raise BundleError(
                f"{bundle.path} holds the calibration of pair {found.pair_id}, it is pair {bundle.pair_id}; calibrate it again"
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """For bundle.json."""
        return asdict(self)

    def token_threshold(self, risk: float, temperature: float) -> float:
        """A draft token with at least this score needs no verification. Raises ConfigError as `rule` does."""
        return self._holding("token", risk, temperature)

    def request_threshold(self, scope: Literal["before", "after"], risk: float, temperature: float) -> float:
        """A request with at least this score is answered locally. Raises ConfigError as `rule` does."""
        return self._holding(scope, risk, temperature)

    def rule(self, scope: Scope, risk: float, temperature: float) -> ExitRule:
        """The rule for this risk, whether or not it lets anything be skipped.

        Raises:
            ConfigError: not calibrated; names the risks and temperatures that are.
        """
        same_scope = [rule for rule in self.rules if rule.scope == scope]
        for rule in same_scope:
            if _same(rule.risk, risk) and _same(rule.temperature, temperature):
                return rule
        known = sorted({(rule.risk, rule.temperature) for rule in same_scope})
        raise ConfigError(
            f"a risk of {risk:g} at temperature {temperature:g} is not calibrated for scope {scope!r}; "
            f"known are {_pairs(known, 'risk')}; take one of them or run `edgecloud calibrate --risk {risk:g} "
            f"--temperature {temperature:g}`"
        )

    def share_threshold(self, scope: Literal["before", "after"], cloud_share: float, temperature: float) -> float:
        """A request with at least this score is answered locally, which sends `cloud_share` of them to the cloud.

        Raises:
            ConfigError: not calibrated; names the shares and temperatures that are.
        """
        same_scope = [rule for rule in self.shares if rule.scope == scope]
        for rule in same_scope:
            if _same(rule.cloud_share, cloud_share) and _same(rule.temperature, temperature):
                return rule.threshold
        known = sorted({(rule.cloud_share, rule.temperature) for rule in same_scope})
        raise ConfigError(
            f"a cloud share of {cloud_share:g} at temperature {temperature:g} is not calibrated; known are "
            f"{_pairs(known, 'share')}; take one of them or run `edgecloud calibrate --cloud-share {cloud_share:g}`"
        )

    def _holding(self, scope: Scope, risk: float, temperature: float) -> float:
        rule = self.rule(scope, risk, temperature)
        if rule.threshold is None:
            others = [
                (other.risk, other.temperature) for other in self.rules if other.scope == scope and other.threshold is not None
            ]
            needed = "no number of prompts would" if rule.prompts_needed is None else f"about {rule.prompts_needed} might"
            raise ConfigError(
                f"at a risk of {risk:g} and temperature {temperature:g} nothing may be skipped (scope {scope!r}): "
                f"{rule.num_prompts} prompts do not show that it holds, {needed}; calibrated are {_pairs(sorted(others), 'risk')}"
            )
        return rule.threshold


def _with_curve(rule: dict[str, Any], manifest: Path) -> dict[str, Any]:
    return {**rule, "curve": build_list(CurvePoint, rule.get("curve"), "calibration.rules.curve", manifest)}


def _same(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)


def _pairs(known: Iterable[tuple[float, float]], what: str) -> str:
    return ", ".join(f"{what} {value:g} at temperature {temperature:g}" for value, temperature in known) or "none"


def _require_scope(scope: str) -> None:
    _require(scope in get_args(Scope), "scope", scope, " or ".join(get_args(Scope)))


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value!r}; it is {allowed}")
