"""What the exits of a classifier are worth, as JSON for scripts and as a table for people."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Group
from rich.table import Table

from edgecloud.exits import RULES, Exits
from edgecloud.partitioner.binomial import interval

SPREAD = 0.05  # intervals are of 95 %


@dataclasses.dataclass(frozen=True, slots=True)
class ExitLine:
    """An exit by a rule at a risk."""

    exit: str
    tensor: str
    rule: str
    risk: float
    threshold: float | None  # None: nothing may leave
    exit_share: float  # of the calibration's samples
    exit_share_interval: tuple[float, float]
    accuracy: float | None  # of those that leave, by the judge
    accuracy_interval: tuple[float, float] | None
    risk_bound: float | None  # what the calibration shows of the risk


@dataclasses.dataclass(frozen=True, slots=True)
class ExitReport:
    """Of one making or calibration."""

    path: str
    judge: str
    delta: float
    num_samples: int  # of the calibration
    model_accuracy: float  # of the whole classifier, by the judge
    head_accuracy: dict[str, float]  # of every exit if all left there
    num_parameters: int  # of all heads
    max_change: float  # largest difference that the heads make to the classifier's own answer
    lines: list[ExitLine]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """The object that `edgecloud exits --json` prints."""
        return dataclasses.asdict(self)

    def to_table(self) -> Group:
        """For a terminal."""
        title = f"{self.path}\nright is what the {self.judge} say{'s' if self.judge == 'model' else ''}; {self.num_samples} samples"
        for name, tensor in dict.fromkeys((line.exit, line.tensor) for line in self.lines):
            title += f"\n{name} is after {tensor}"
        table = Table(title=title, title_justify="left")
        for heading in ("exit", "rule", "risk", "threshold", "leave", "of them right", "wrong at most"):
            table.add_column(heading, justify="left" if heading in ("exit", "rule") else "right", no_wrap=True)
        for line in self.lines:
            table.add_row(*_cells(line))
        heads = ", ".join(f"{name} {accuracy:.1%}" for name, accuracy in self.head_accuracy.items())
        return Group(
            table,
            f"right if all leave there: {heads}; the whole classifier {self.model_accuracy:.1%}",
            *(f"note: {note}" for note in self.notes),
        )


def exit_lines(exits: Exits, risks: tuple[float, ...]) -> list[ExitLine]:
    """Every exit, rule and risk."""
    lines = []
    for risk in risks:
        for head in exits.heads:
            for rule in RULES:
                point = head.curve(rule).point(risk, exits)
                if point is None or not point.num_left:
                    nobody = interval(0, exits.num_samples, SPREAD)
                    lines.append(ExitLine(head.name, head.tensor, rule, risk, None, 0.0, nobody, None, None, None))
                    continue
                right = point.num_left - point.num_wrong
                lines.append(
                    ExitLine(
                        head.name, head.tensor, rule, risk, point.threshold, point.num_left / exits.num_samples,
                        interval(point.num_left, exits.num_samples, SPREAD), right / point.num_left,
                        interval(right, point.num_left, SPREAD), point.risk_bound,
                    )
                )  # fmt: skip
    return lines


def _cells(line: ExitLine) -> list[str]:
    name, risk = line.exit, f"{line.risk:g}"
    if line.threshold is None or line.accuracy_interval is None or line.accuracy is None or line.risk_bound is None:
        return [name, line.rule, risk, "-", "none", "-", "-"]
    low, high = line.exit_share_interval
    return [
        name,
        line.rule,
        risk,
        f"{line.threshold:.4f}",
        f"{line.exit_share:.1%} ({low:.0%} to {high:.0%})",
        f"{line.accuracy:.1%} ({line.accuracy_interval[0]:.1%} to {line.accuracy_interval[1]:.1%})",
        f"{line.risk_bound:.1%}",
    ]
