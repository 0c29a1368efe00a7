"""The loss of splits that no one has measured: the few fronts that would win are exported and held against the target."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from edgecloud.partitioner.candidate import Candidate, FrontWeights
from edgecloud.partitioner.front_maker import FrontMaker
from edgecloud.partitioner.inputs import FrontPlan
from edgecloud.partitioner.losses import Loss, losses_of_front
from edgecloud.partitioner.reference import Reference
from edgecloud.partitioner.report import Remark
from edgecloud.partitioner.search import Judged, Search

MAX_FRONTS = 3


def try_fronts(
    searched: Callable[[Sequence[Loss]], Search], measure: Callable[[Candidate], Sequence[Loss]], max_loss: float
) -> list[Loss]:
    """Measure the fronts that would win if their loss were allowed, the best first, until one of them is allowed.

    Weights that lost too much are tried again at half the depth at most; the last try is a safe one, int8 at a third of the
    layers at most. `searched` judges every plan with the losses so far, as if
    any loss were allowed; `measure` exports a candidate's front and holds it against the target, with every boundary.
    """
    tried: list[Loss] = []
    deepest: dict[FrontWeights | None, int] = {}  # that is worth trying, by weights
    for number in range(1, MAX_FRONTS + 1):
        judged = searched(tried).judged
        if number == MAX_FRONTS:
            judged = tuple(one for one in judged if one.candidate.mode != "split" or _is_safe(one.candidate, judged))
        wanted = _wanted(judged, deepest, max_loss)
        if wanted is None:
            break
        found = measure(wanted)
        tried += found
        if any(1 - loss.agreement <= max_loss for loss in found):
            break
        deepest[wanted.front] = wanted.cut // 2
    return tried


def _wanted(judged: Sequence[Judged], deepest: dict[FrontWeights | None, int], max_loss: float) -> Candidate | None:
    """The best split of unknown loss that is better than what is known to be allowed."""
    for one in judged:
        if not one.feasible:
            return None
        candidate, loss = one.candidate, one.figures.loss
        if loss is not None and loss <= max_loss:
            return None
        if candidate.mode == "split" and loss is None and candidate.cut <= deepest.get(candidate.front, candidate.cut):
            return candidate
    return None


def _is_safe(candidate: Candidate, judged: Sequence[Judged]) -> bool:
    deepest = max(one.candidate.cut for one in judged)
    return candidate.front == "int8" and candidate.cut <= max(1, (deepest + 1) // 3)


def measure_candidate(candidate: Candidate, reference: Reference, cache: Path | None, remark: Remark) -> list[Loss]:
    """Export its front to a scratch folder and hold it against the target. Raises what `FrontMaker.make_and_check` raises."""
    assert candidate.front is not None
    assert candidate.codec is not None
    plan = FrontPlan(candidate.cut, reference.target.num_layers, candidate.front, candidate.codec)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        qualities = FrontMaker(reference, plan, Path(scratch), cache, remark).make_and_check()
    return losses_of_front(candidate.cut, candidate.front, qualities)
