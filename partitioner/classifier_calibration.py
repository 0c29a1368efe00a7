"""From which score on a sample may leave at an exit: thresholds planned on some samples, judged on others.

Those that leave at a fixed threshold are wrong independently, at one rate: their number is binomial, and the exact bound holds
for every threshold by itself. Which one is taken for a risk is `ExitCurve.point`'s, a test in fixed sequence. What is bounded is
the rate among those that leave (selective risk: Geifman and El-Yaniv, arXiv 1705.08500), as Jazbec et al. (arXiv 2405.20915) and
CALM bound it for exits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from edgecloud.errors import ConfigError
from edgecloud.exit_scores import Floats, scores
from edgecloud.exits import RULES, Answers, ExitCurve, ExitInfo, ExitPoint, Exits, samples_to_begin
from edgecloud.partitioner.binomial import upper_bounds
from edgecloud.partitioner.classifier_samples import Labels
from edgecloud.partitioner.samples import Array

NUM_POINTS = 40  # thresholds of a curve
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Split:
    """Indices of the samples, by what they are for; none is in two."""

    train: Indices
    plan: Indices  # for stopping the training and planning thresholds
    count: Indices  # for the bounds


def split(num_samples: int, shares: tuple[float, float], seed: int) -> Split:
    """By chance. `shares`: of training and planning; the rest is counted."""
    order = np.random.default_rng(seed).permutation(num_samples)
    first = round(shares[0] * num_samples)
    second = first + round(shares[1] * num_samples)
    return Split(order[:first], order[first:second], order[second:])


def require_samples(num_samples: int, shares: tuple[float, float], risk: float, delta: float) -> None:
    """Raises ConfigError: too few for the risk; names how many are needed."""
    share = 1.0 - sum(shares)
    needed = int(np.ceil(samples_to_begin(risk, delta) / share))
    if num_samples < needed:
        raise ConfigError(
            f"a risk of {risk:g} takes at least {needed} samples, --inputs has {num_samples}; give more or allow more"
        )


def calibrate(
    heads: Sequence[ExitInfo], found: Mapping[str, Array], right: Labels, parts: Split, answers: Answers, delta: float
) -> list[ExitInfo]:
    """The heads with their curves.

    Args:
        heads: in the order of the computation; their curves are not looked at.
        found: outputs of the graph by name  # [samples, ...]
        right: class of every sample  # [samples]
        parts: which samples plan and which count.
        answers: what the exits give, as `Exits` says it.
        delta: of every bound.
    """
    made = []
    for index, head in enumerate(heads):
        wrong = found[head.answer].argmax(axis=1) != right
        before = found[heads[index - 1].features] if index else None
        curves = []
        for rule in RULES:
            sure = scores(rule, found[head.answer], found[head.features], before, answers)
            curves.append(ExitCurve(rule, _points(sure, wrong, parts, delta)))
        made.append(replace(head, curves=curves))
    return made


def _points(sure: Floats, wrong: npt.NDArray[np.bool_], parts: Split, delta: float) -> list[ExitPoint]:
    planned = sure[parts.plan]
    known = np.sort(planned[np.isfinite(planned)])[::-1]
    ranks = [int(np.ceil(len(known) * number / NUM_POINTS)) - 1 for number in range(1, NUM_POINTS + 1)] if len(known) else []
    thresholds = list(dict.fromkeys(float(known[rank]) for rank in ranks))  # strictest first, each once
    planned_counts = [_count(sure, wrong, parts.plan, threshold) for threshold in thresholds]
    counts = [_count(sure, wrong, parts.count, threshold) for threshold in thresholds]
    bounds = upper_bounds([num_wrong for _, num_wrong in counts], [num_left for num_left, _ in counts], delta)
    return [
        ExitPoint(threshold, *planned, *counted, bound)
        for threshold, planned, counted, bound in zip(thresholds, planned_counts, counts, bounds, strict=True)
    ]


def _count(sure: Floats, wrong: npt.NDArray[np.bool_], some: Indices, threshold: float) -> tuple[int, int]:
    """-> how many of some samples leave, and how many of those are wrong"""
    leaves = sure[some] >= threshold
    return int(leaves.sum()), int(wrong[some][leaves].sum())


def classes(found: Mapping[str, Array], exits_output: str) -> Labels:
    """What the whole classifier says."""
    said: Labels = found[exits_output].argmax(axis=1).astype(np.int64)
    return said


def require_two_classes(right: Labels, whose: str) -> None:
    """Raises ConfigError: all samples are of one class, so an exit would learn nothing and be right."""
    if len(np.unique(right)) < 2:
        raise ConfigError(f"all {len(right)} samples are of class {right[0]} by {whose}; give samples of every class")


def with_counts(exits: Exits, found: Mapping[str, Array], right: Labels, parts: Split) -> Exits:
    """The same exits, calibrated on these samples."""
    heads = calibrate(exits.heads, found, right, parts, exits.answers, exits.delta)
    model_wrong = int((classes(found, exits.output)[parts.count] != right[parts.count]).sum())
    return replace(
        exits, heads=heads, num_planned=len(parts.plan), num_samples=len(parts.count), num_model_wrong=model_wrong
    )  # fmt: skip
