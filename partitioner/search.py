"""The best division of labour for an objective under constraints: every plan is predicted, none is left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal

from edgecloud.cost import COST_SLOWDOWN
from edgecloud.errors import ConfigError, NoPlanError
from edgecloud.partitioner.candidate import Candidate, Connection, PlanMode, candidates
from edgecloud.partitioner.prediction import Figures, Predictor, Scene

PlanObjective = Literal["latency", "cost", "energy", "privacy"]
OFFERED_AS = {"the device": "a device with"}
DEFAULT_MAX_LOSS = 0.03
KEEP_PROMPT = "--keep-prompt-on-device"
HOW_TO_MEASURE = "a partition with --objective or a constraint, and no --dry-run, measures some fronts; --damage FILE tells it"
EVEN = 1e-9  # relative: constraints are met to rounding


@dataclass(frozen=True, slots=True)
class Constraints:
    """What a plan must keep to; None: free."""

    max_ram_bytes: float | None = None  # of the device's process
    max_loss: float = DEFAULT_MAX_LOSS  # share of tokens that may differ from the full target's; what was not measured counts as 1
    max_tpot_ms: float | None = None
    keep_prompt: bool = False  # no prompt ids leave the device

    def __post_init__(self) -> None:
        for name in ("max_ram_bytes", "max_tpot_ms"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name} is {value}; it must be above 0")
        if not 0 <= self.max_loss <= 1:
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
        return f"{judged.value / best:.2f}x the {what}"


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
        ConfigError: the objective is energy, and the device has no figures of it.
    """
    return search_over(Predictor(scene), link, objective, constraints or Constraints())


def search_over(predictor: Predictor, link: Connection, objective: PlanObjective, constraints: Constraints) -> Search:
    """`search` with a predictor that remembers what does not depend on the link. Raises NoPlanError."""
    scene = predictor.scene
    if objective == "energy" and not scene.device.energy.known:
        raise ConfigError(f"{scene.device.name} has no figures of energy; give a --device that has, such as phone")
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
    need: Callable[[Candidate, Figures], float]
    show: Callable[[float], str]  # rounded up, so that what is shown would do
    unit: str  # what is spent

    def met(self, candidate: Candidate, figures: Figures) -> bool:
        return self.need(candidate, figures) <= self.allowed * (1 + EVEN)

    def complaint(self, candidate: Candidate, figures: Figures) -> str:
        if self.need is _loss and figures.loss is None:
            return f"its loss was not measured, {self.option} allows {self.show(self.allowed)}"
        return f"{self.unit} {self.show(self.need(candidate, figures))}, {self.option} allows {self.show(self.allowed)}"


def _limits(predictor: Predictor, link: Connection, objective: PlanObjective, constraints: Constraints) -> list[_Limit]:
    has_bytes = predictor.scene.device.ram * 1e9
    asked_bytes = constraints.max_ram_bytes
    ram = "--max-ram" if asked_bytes is not None and asked_bytes <= has_bytes else "the device"
    limits = [_Limit(ram, min(has_bytes, asked_bytes or has_bytes), lambda _, f: f.device_ram_bytes, _mb, "needs")]
    limits.append(_Limit("--max-loss", constraints.max_loss, _loss, _share, "loses"))
    if constraints.max_tpot_ms is not None:
        limits.append(_Limit("--tpot", constraints.max_tpot_ms, lambda _, f: f.tpot_ms, _ms, "takes"))
    elif objective == "cost":
        most_ms = COST_SLOWDOWN * predictor.predict(Candidate("cloud"), link).tpot_ms
        limits.append(_Limit(f"objective cost ({COST_SLOWDOWN} streams)", most_ms, lambda _, f: f.tpot_ms, _ms, "takes"))
    if constraints.keep_prompt or objective == "privacy":
        limits.append(_Limit(KEEP_PROMPT, 0.0, lambda c, _: float(c.sends_prompt_ids), _ids, "sends the prompt's"))
    return limits


def _mb(value: float) -> str:
    return f"{ceil(value / 1e6 - EVEN)}MB"


def _share(value: float) -> str:
    return f"{ceil(value * 1e3 - EVEN) / 1e3:g}"


def _ms(value: float) -> str:
    return f"{ceil(value * 10 - EVEN) / 10:g}ms"


def _ids(value: float) -> str:
    return "ids" if value else "none"


def _loss(_: Candidate, figures: Figures) -> float:
    return 1.0 if figures.loss is None else figures.loss


def _nearest(found: Sequence[Judged], limits: Sequence[_Limit]) -> str:
    """For each constraint, the value with which a plan exists while the others hold; else the plan that misses by least."""
    offers = []
    for limit in limits:
        if limit.option == KEEP_PROMPT:
            continue
        others = [other for other in limits if other is not limit]
        needs = [
            (limit.need(judged.candidate, judged.figures), judged)
            for judged in found
            if all(other.met(judged.candidate, judged.figures) for other in others)
        ]
        if needs:
            need, judged = min(needs, key=lambda one: one[0])
            option = OFFERED_AS.get(limit.option) or ("--tpot" if limit.option.startswith("objective") else limit.option)
            offers.append(f"{option} {limit.show(need)} ({judged.candidate})")
    asked = ", ".join(f"{limit.option} {limit.show(limit.allowed)}" if limit.allowed else limit.option for limit in limits)
    losses = [judged.figures.loss for judged in found if judged.candidate.mode == "split"]
    unknown = f" (no loss of a split is known: {HOW_TO_MEASURE})" if losses and set(losses) == {None} else ""
    if offers:
        return f"no plan keeps to {asked}; one does with {', or with '.join(offers)}{unknown}"
    nearest = min(found, key=lambda judged: sum(_excess(limit, judged) for limit in limits))
    misses = "; ".join(nearest.violated)
    return f"no plan keeps to {asked}, nor with any one of them given up; nearest is {nearest.candidate}: {misses}"


def _excess(limit: _Limit, judged: Judged) -> float:
    need = limit.need(judged.candidate, judged.figures)
    return max(0.0, need - limit.allowed) / limit.allowed if limit.allowed else need
