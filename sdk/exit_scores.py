"""How sure an exit is, by four rules. Higher is surer, and one threshold decides; the device and the calibration share the code.

confidence and margin are those of multi-exit networks in general (SDN, arXiv 1810.07052), entropy is BranchyNet's (arXiv
1709.01686), feature_delta is CALM's hidden-state saturation (arXiv 2207.07061): what another stage no longer moves may leave.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgecloud.exits import Answers, ExitInfo, Exits, Rule
from edgecloud.tensors import Array

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Leave:
    """When to leave at an exit."""

    exit: str
    share: float  # of samples, that is expected to leave
    threshold: float
    rule: Rule
    answers: Answers
    head: ExitInfo
    before: ExitInfo | None  # the exit before it, which feature_delta compares with

    def answer(self, found: Mapping[str, Array]) -> Array | None:
        """The exit's answer if every row may leave, from what the graph gives.  -> [batch, classes], or None"""
        answer = found[self.head.answer]
        before = None if self.before is None else found[self.before.features]
        rows = scores(self.rule, answer, found[self.head.features], before, self.answers)
        return answer if bool((rows >= self.threshold).all()) else None


def leaves(exits: Exits, on_device: frozenset[str], risk: float, rule: Rule | None) -> Leave | None:
    """The last exit whose outputs a device's part has, of those that keep the risk; None: there is none. Raises ConfigError."""
    points = exits.points(risk, rule)
    found = None
    for index, head in enumerate(exits.heads):
        before = exits.heads[index - 1] if index else None
        needed = {head.answer, head.features} | (set() if before is None else {before.features})
        if head.name not in points or not needed <= on_device:
            continue
        point = points[head.name]
        share = point.num_left / exits.num_samples
        found = Leave(head.name, share, point.threshold, rule or exits.rule, exits.answers, head, before)
    return found


def scores(rule: Rule, answer: Array, features: Array, before: Array | None, answers: Answers) -> Floats:
    """One a row. A first exit has nothing to compare with, so by feature_delta it is never sure.  -> [batch]

    Args:
        rule: how sureness is told.
        answer: of the exit  # [batch, classes]
        features: of the exit  # [batch, width]
        before: features of the exit before it  # [batch, width]
        answers: what `answer` holds.
    """
    if rule == "feature_delta":
        if before is None:
            return np.full(len(features), -np.inf)
        here, there = features.astype(np.float64), before.astype(np.float64)
        size = np.linalg.norm(here, axis=1) + np.linalg.norm(there, axis=1)
        return _known(1.0 - np.linalg.norm(here - there, axis=1) / np.maximum(size, np.finfo(np.float64).tiny))
    p = answer.astype(np.float64) if answers == "probabilities" else softmax(answer.astype(np.float64))
    if rule == "confidence":
        return _known(p.max(axis=1))
    if rule == "margin":
        best = np.partition(p, -2, axis=1)
        return _known(best[:, -1] - best[:, -2])
    surprise = np.log(p, where=p > 0, out=np.zeros_like(p))
    return _known(1.0 + (p * surprise).sum(axis=1) / np.log(p.shape[1]))  # entropy


def softmax(logits: Floats) -> Floats:
    """Along the last axis."""
    raised = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shares: Floats = raised / raised.sum(axis=-1, keepdims=True)
    return shares


def _known(rows: Floats) -> Floats:
    """What cannot be computed is unsure."""
    return np.where(np.isnan(rows), -np.inf, rows)
