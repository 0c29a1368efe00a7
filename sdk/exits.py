"""Early exits of a classifier: heads inside the graph, and what calibration found out about leaving at them.

A point of a curve is a threshold that was planned on other samples than its counts come from, and a bound on the share of wrong
answers among those that leave, which holds with probability 1 - delta. For a risk, points are tested from the most promising one,
by what was planned, to laxer ones until one fails: fixed sequence testing, as in Learn-then-Test (arXiv 2110.01052).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from edgecloud.errors import ConfigError
from edgecloud.manifest import build, build_list

Rule = Literal["confidence", "entropy", "margin", "feature_delta"]
RULES: tuple[Rule, ...] = get_args(Rule)
Judge = Literal["model", "labels"]  # whose class is the right one
Answers = Literal["scores", "probabilities"]  # what the classifier gives


@dataclass(frozen=True, slots=True)
class ExitPoint:
    """A threshold, and what the calibration's samples did at it."""

    threshold: float  # a sample leaves where its score is at least that
    planned_left: int  # of the planning samples
    planned_wrong: int  # of them
    num_left: int  # of the calibration's own samples
    num_wrong: int  # of them
    risk_bound: float  # the share of wrong ones among all that leave is above it with probability delta at most

    def __post_init__(self) -> None:
        """Check the values."""
        _require(math.isfinite(self.threshold), "threshold", self.threshold, "a number")
        _require(0 <= self.planned_wrong <= self.planned_left, "planned_wrong", self.planned_wrong, f"0 to {self.planned_left}")
        _require(0 <= self.num_wrong <= self.num_left, "num_wrong", self.num_wrong, f"from 0 to {self.num_left}")
        _require(0 <= self.risk_bound <= 1, "risk_bound", self.risk_bound, "from 0 to 1")


@dataclass(frozen=True, slots=True)
class ExitCurve:
    """All points of a rule at an exit, strictest first."""

    rule: Rule
    points: list[ExitPoint]

    def __post_init__(self) -> None:
        """Check the values."""
        require_rule(self.rule)
        left = [point.planned_left for point in self.points]
        _require(left == sorted(left), "planned_left", left, "ascending numbers")

    def point(self, risk: float, exits: Exits) -> ExitPoint | None:
        """The one that lets most leave within the risk; None: none does."""
        expected = exits.num_samples / exits.num_planned  # times those planned
        enough = [point for point in self.points if point.planned_left * expected >= samples_to_begin(risk, exits.delta)]
        if not enough:
            return None
        found = None
        for point in enough[max(range(len(enough)), key=lambda index: _promise(enough[index], risk)) :]:
            if point.risk_bound > risk:
                break
            found = point
        return found


@dataclass(frozen=True, slots=True)
class ExitInfo:
    """A head in the graph."""

    name: str  # exit-1, exit-2, ... in the order of the computation
    tensor: str  # what it reads
    answer: str  # an output of the graph: what the classifier's own would be
    features: str  # an output of the graph: what consecutive exits are compared by
    num_parameters: int
    curves: list[ExitCurve]  # one a rule; feature_delta has no points at the first exit

    def curve(self, rule: Rule) -> ExitCurve:
        """Of this rule."""
        return next(curve for curve in self.curves if curve.rule == rule)

    def __post_init__(self) -> None:
        """Check the values."""
        rules = sorted(curve.rule for curve in self.curves)
        _require(rules == sorted(RULES), "curves", rules, f"one for each of {', '.join(RULES)}")


@dataclass(frozen=True, slots=True)
class Exits:
    """What the metadata of an ONNX file and bundle.json say under `exits`."""

    output: str  # of the graph: the classifier's own answer  # [batch, classes]
    answers: Answers
    rule: Rule  # unless a call names another
    judge: Judge
    delta: float
    num_planned: int  # samples that planned the thresholds
    num_samples: int  # others, that the bounds come from
    num_model_wrong: int  # of them the whole classifier gets wrong; 0 where it is the judge
    heads: list[ExitInfo]

    def __post_init__(self) -> None:
        """Check the values."""
        require_rule(self.rule)
        _require(self.judge in get_args(Judge), "judge", self.judge, " or ".join(get_args(Judge)))
        _require(self.answers in get_args(Answers), "answers", self.answers, " or ".join(get_args(Answers)))
        _require(0 < self.delta < 1, "delta", self.delta, "above 0 and below 1")
        _require(self.num_planned > 0, "num_planned", self.num_planned, "1 or more")
        _require(0 <= self.num_model_wrong <= self.num_samples, "num_model_wrong", self.num_model_wrong, "a share of the samples")
        names = [head.name for head in self.heads]
        _require(bool(names) and len(set(names)) == len(names), "heads", names, "at least one, of different names")

    @classmethod
    def from_dict(cls, content: Any, source: Path) -> Exits:
        """Read what `to_dict` wrote. Raises BundleCorruptError: a field is missing, unknown, or cannot be."""

        def curve(entry: Any) -> Any:
            if not isinstance(entry, dict):
                return entry
            return {**entry, "points": build_list(ExitPoint, entry.get("points"), "exits.heads.curves.points", source)}

        def head(entry: Any) -> Any:
            if not isinstance(entry, dict) or not isinstance(entry.get("curves"), list):
                return entry
            curves = [curve(found) for found in entry["curves"]]
            return {**entry, "curves": build_list(ExitCurve, curves, "exits.heads.curves", source)}

        if isinstance(content, dict) and isinstance(content.get("heads"), list):
            heads = [head(entry) for entry in content["heads"]]
            content = {**content, "heads": build_list(ExitInfo, heads, "exits.heads", source)}
        return build(cls, content, "exits", source)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @property
    def outputs(self) -> frozenset[str]:
        """Those of the graph that are not the classifier's own."""
        return frozenset(name for head in self.heads for name in (head.answer, head.features))

    def points(self, risk: float, rule: Rule | None = None) -> dict[str, ExitPoint]:
        """By exit, the threshold for this risk; exits that nothing may leave at are left out.

        Raises:
            ConfigError: the risk is none, or the calibration has too few samples for it, or shows it of no exit.
        """
        if isinstance(risk, bool) or not isinstance(risk, int | float) or not 0 < risk < 1:
            raise ConfigError(f"risk is {risk!r}; it takes a share above 0 and below 1, such as 0.05")
        if rule is not None and rule not in RULES:
            raise ConfigError(f"exit_rule is {rule!r}; it takes {', '.join(RULES)}")
        rule = rule or self.rule
        if self.num_samples < (needed := samples_to_begin(risk, self.delta)):
            raise ConfigError(
                f"a risk of {risk:g} needs {needed} calibration samples, this classifier has {self.num_samples}; "
                "run `edgecloud exits` with more samples, or allow more risk"
            )
        found = {head.name: head.curve(rule).point(risk, self) for head in self.heads}
        if all(point is None for point in found.values()):
            raise ConfigError(
                f"by {rule}, no exit is shown to keep a risk of {risk:g}; allow more, take another of {', '.join(RULES)}, "
                "put exits later, or run `edgecloud exits` with more samples"
            )
        return {name: point for name, point in found.items() if point is not None}


def _promise(point: ExitPoint, risk: float) -> float:
    """By how many standard deviations fewer planning samples are wrong than the risk allows; it knows nothing of those counted."""
    return (risk * point.planned_left - point.planned_wrong) / math.sqrt(max(1, point.planned_left))


def samples_needed(risk: float, delta: float) -> int:
    """Samples of which none may be wrong, so that a risk is shown: (1 - risk)^n <= delta."""
    return math.ceil(math.log(delta) / math.log1p(-risk))


def samples_to_begin(risk: float, delta: float) -> int:
    """The same where only their expected number is known: two standard deviations more."""
    needed = samples_needed(risk, delta)
    return needed + math.ceil(2 * math.sqrt(needed))


def require_rule(rule: str) -> None:
    """Raises ValueError: there is no such rule."""
    _require(rule in RULES, "rule", rule, ", ".join(RULES))


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value!r}; it takes {allowed}")


__all__ = ["RULES", "ExitCurve", "ExitInfo", "ExitPoint", "Exits", "Rule", "samples_needed", "samples_to_begin"]
