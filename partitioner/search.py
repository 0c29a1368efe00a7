"""The best division of labour for an objective under constraints: every plan is predicted, so the answer is exact in the model's terms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal

from edgecloud.cost import COST_SLOWDOWN
from edgecloud.errors import NoPlanError
from edgecloud.partitioner.candidate import Candidate, Connection, PlanMode, candidates
from edgecloud.partitioner.prediction import Figures, Predictor, Scene

PlanObjective = Literal["latency", "cost", "energy", "privacy"]
EVEN = 1e-9  # relative: constraints are met to rounding


@dataclass(frozen=True, slots=True)
class Constraints:
    """What a plan must keep to; None: free."""

    max_ram_bytes: float | None = None  # of the device's process
    max_loss: float | None = None  # share of tokens that may differ from the full target's; None: a target's own tokens, no edge
    max_tpot_ms: float | None = None
    keep_prompt: bool = False  # no prompt ids leave the device

    def __post_init__(self) -> None:
        for name in ("max_ram_bytes", "max_tpot_ms"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name} is {value}; it must be above 0")
        if self.max_loss is not None and not 0 <= self.max_loss <= 1:
            raise ValueError(f"max_loss is {self.max_loss}; it is a share from 0 to 1")


@dataclass(frozen=True, slots=True)
class Judged:
    """A candidate, what it comes to, and why it is not the plan."""

    candidate: Candidate
    figures: Figures
    value: float  # that the objective makes little of
    violated: tuple[str, ...]  # constraints, in words

    @property
    def feasible(self) -> bool:
        """Whether it keeps to every constraint."""
        return not self.violated


@dataclass(frozen=True, slots=True)
class Search:
    """All candidates over one link, the plan first, then by value; those that may not be come last."""

    objective: PlanObjective
    constraints: Constraints
    link: Connection
    judged: tuple[Judged, ...]

    @property
    def best(self) -> Judged:
        """The plan."""
        return self.judged[0]

    def best_of(self, mode: PlanMode) -> Judged | None:
        """Of a mode: what may be comes first."""
        return next((judged for judged in self.judged if judged.candidate.mode == mode), None)

    def why_not(self, judged: Judged) -> str:
        """Why a candidate lost: what it violates, or by how much it is worse. Empty for the plan itself."""
        if judged.candidate == self.best.candidate:
            return ""
        if judged.violated:
            return "; ".join(judged.violated)
        best, what = self.best.value, VALUE_NAMES[self.objective]
        if best <= 0:
            return f"{what} {judged.value:.3g} against {best:.3g}"
        return f"{judged.value / best:.2f} times the {what}"


VALUES: dict[PlanObjective, Callable[[Figures], float]] = {
    "latency": lambda figures: figures.answer_ms,
    "privacy": lambda figures: figures.answer_ms,
    "cost": lambda figures: figures.cloud_ms_per_token,
    "energy": lambda figures: figures.device_joules_per_token,
}
VALUE_NAMES = {
    "latency": "time of the answer",
    "privacy": "time of the answer",
    "cost": "cloud compute",
    "energy": "device energy",
}


def search(scene: Scene, link: Connection, objective: PlanObjective, constraints: Constraints | None = None) -> Search:
    """Predict and judge every plan.

    Objective `privacy` is `latency` with the prompt kept on the device. Objective `cost` takes at most 1.5 times as long a token
    as a stream, unless `max_tpot_ms` says how long.

    Raises:
        NoPlanError: no plan keeps to the constraints; names the nearest values that would do.
    """
    return search_over(Predictor(scene), link, objective, constraints or Constraints())


def search_over(predictor: Predictor, link: Connection, objective: PlanObjective, constraints: Constraints) -> Search:
    """`search` with a predictor that remembers what does not depend on the link. Raises NoPlanError."""
    scene = predictor.scene
    limits = _limits(predictor, link, objective, constraints)
    found = []
    for candidate in candidates(scene.target, scene.drafts, scene.front_weights):
        figures = predictor.predict(candidate, link)
        violated = tuple(limit.complaint(candidate, figures) for limit in limits if not limit.met(candidate, figures))
        found.append(Judged(candidate, figures, VALUES[objective](figures), violated))
    found.sort(key=lambda judged: (len(judged.violated), judged.value, judged.figures.answer_ms))
    if not found[0].feasible:
        raise NoPlanError(_nearest(found, limits))
    return Search(objective, constraints, link, tuple(found))


@dataclass(frozen=True, slots=True)
class _Limit:
    """One constraint: what a candidate needs of it, and what is allowed."""

    option: str
    allowed: float
    need: Callable[[Candidate, Figures], float | None]  # None: not known
    show: Callable[[float], str]  # rounded up, so that what is shown would do
    unit: str  # what is spent
    unknown: str = ""  # complaint where the need is not known

    def met(self, candidate: Candidate, figures: Figures) -> bool:
        need = self.need(candidate, figures)
        return need is not None and need <= self.allowed * (1 + EVEN)

    def complaint(self, candidate: Candidate, figures: Figures) -> str:
        need = self.need(candidate, figures)
        if need is None:
            return self.unknown
        return f"{self.unit} {self.show(need)}, {self.option} allows {self.show(self.allowed)}"


def _limits(predictor: Predictor, link: Connection, objective: PlanObjective, constraints: Constraints) -> list[_Limit]:
    limits = []
    if constraints.max_ram_bytes is not None:
        limits.append(
            _Limit("--max-ram", constraints.max_ram_bytes, lambda _, f: f.device_ram_bytes, lambda v: f"{ceil(v / 1e6)}MB", "needs")
        )
    if constraints.max_loss is not None:
        limits.append(
            _Limit(
                "--max-loss", constraints.max_loss, lambda _, f: f.loss, _share, "loses",
                unknown="its loss was not measured, --max-loss cannot be held",
            )  # fmt: skip
        )
    else:  # nobody checks the draft's own text
        limits.append(_Limit("no --max-loss", 0.0, _unchecked_loss, _share, "nobody checks it: it loses"))
    most_tpot = constraints.max_tpot_ms
    if most_tpot is None and objective == "cost":
        stream = predictor.predict(Candidate("cloud"), link).tpot_ms
        limits.append(
            _Limit(
                f"objective cost ({COST_SLOWDOWN} streams)", COST_SLOWDOWN * stream, lambda _, f: f.tpot_ms,
                _ms, "takes",
            )  # fmt: skip
        )
    elif most_tpot is not None:
        limits.append(_Limit("--tpot", most_tpot, lambda _, f: f.tpot_ms, _ms, "takes"))
    if constraints.keep_prompt or objective == "privacy":
        limits.append(
            _Limit(
                "--keep-prompt-on-device", 0.0, lambda c, _: float(c.sends_prompt_ids), lambda v: "ids" if v else "none",
                "sends the prompt's",
            )  # fmt: skip
        )
    return limits


def _share(value: float) -> str:
    return f"{ceil(value * 1e3 - EVEN) / 1e3:g}"


def _ms(value: float) -> str:
    return f"{ceil(value * 10 - EVEN) / 10:g}ms"


def _unchecked_loss(candidate: Candidate, figures: Figures) -> float:
    return (1.0 if figures.loss is None else figures.loss) if candidate.mode == "edge" else 0.0


def _nearest(found: Sequence[Judged], limits: Sequence[_Limit]) -> str:
    """For each constraint, the value with which a plan exists while the others hold; else the plan that misses by least."""
    offers = []
    for limit in limits:
        if limit.option == "--keep-prompt-on-device":
            continue
        others = [other for other in limits if other is not limit]
        needs = [
            (need, judged)
            for judged in found
            if (need := limit.need(judged.candidate, judged.figures)) is not None
            and all(other.met(judged.candidate, judged.figures) for other in others)
        ]
        if needs:
            need, judged = min(needs, key=lambda one: one[0])
            option = {"no --max-loss": "--max-loss"}.get(limit.option, limit.option)
            offers.append(f"{option} {limit.show(need)} ({judged.candidate})")
    asked = ", ".join(f"{limit.option} {limit.show(limit.allowed)}" if limit.allowed else limit.option for limit in limits)
    if offers:
        return f"no plan keeps to {asked}; one does with {', or with '.join(offers)}"
    nearest = min(found, key=lambda judged: sum(_excess(limit, judged) for limit in limits))
    return f"no plan keeps to {asked}, nor with any one of them given up; nearest is {nearest.candidate}: {'; '.join(nearest.violated)}"


def _excess(limit: _Limit, judged: Judged) -> float:
    need = limit.need(judged.candidate, judged.figures)
    if need is None:
        return 1.0
    return max(0.0, need - limit.allowed) / limit.allowed if limit.allowed else need
