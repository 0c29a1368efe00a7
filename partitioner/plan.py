"""A plan and its evidence: the search for one link, the same over others, what was assumed, and what it says in words."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, get_args

from rich.box import SIMPLE_HEAD
from rich.table import Table

from edgecloud.partitioner.candidate import Connection, PlanMode
from edgecloud.partitioner.prediction import Predictor, Scene
from edgecloud.partitioner.regions import FEW_MBPS, FEW_RTT_MS, Place, best_by_cut, over_links
from edgecloud.partitioner.search import HOW_TO_MEASURE, VALUE_NAMES, Constraints, Judged, PlanObjective, Search, search_over

CAPTION = "ms, bytes up and joules a token; MB of the device; loss: share of tokens unlike the full target's"
NUM_SHOWN = 6  # candidates that may be, beside the best of each mode


@dataclass(frozen=True, slots=True)
class Plan:
    """What was searched and what came out."""

    predictor: Predictor
    search: Search
    places: list[Place]  # the plan over other links
    assumptions: list[str]

    @property
    def best(self) -> Judged:
        """The plan."""
        return self.search.best

    def to_dict(self) -> dict[str, Any]:
        """What `edgecloud partition --json` prints of it."""
        scene, search = self.predictor.scene, self.search
        return {
            "objective": search.objective,
            "constraints": asdict(search.constraints),
            "device": scene.device.name,
            "cloud": scene.cloud.name,
            "link": asdict(search.link),
            "best": self._entry(search.best),
            "table": [self._entry(judged) for judged in shown(search)],
            "by_cut": [self._entry(judged) for judged in best_by_cut(search).values()],
            "over_links": [
                {"rtt_ms": p.rtt_ms, "up_mbps": p.up_mbps, "best": None if p.best is None else self._entry(p.best)}
                for p in self.places
            ],
            "num_candidates": len(search.judged),
            "conclusions": self.conclusions(),
            "assumptions": self.assumptions,
        }

    def to_table(self) -> Table:
        """For a terminal: the plan, the best of each mode, and why they lose."""
        link = self.search.link
        rate = "" if link.up_mbps is None else f", {link.up_mbps:g} Mbit/s up"
        count = len(self.search.judged)
        title = f"plan for {self.search.objective} over {link.name} ({link.rtt_ms:g} ms{rate}), {count} candidates"
        table = Table(title=title, title_justify="left", caption=CAPTION, caption_justify="left", box=SIMPLE_HEAD, padding=(0, 1))
        table.add_column("plan", no_wrap=True)
        table.add_column("front/wire", no_wrap=True)
        for heading in ("TTFT", "TPOT", "cloud", "B up", "MB", "J", "loss"):
            table.add_column(heading, justify="right")
        table.add_column("against the plan", no_wrap=True)
        for judged in shown(self.search):
            found, candidate = judged.figures, judged.candidate
            joules = f"{found.device_joules_per_token:.3f}" if self.predictor.scene.device.energy.known else "-"
            bits = f"{candidate.front}/{candidate.codec}" if candidate.front else ""
            table.add_row(
                candidate.short, bits, f"{found.ttft_ms:.0f}", f"{found.tpot_ms:.1f}", f"{found.cloud_ms_per_token:.2f}",
                f"{found.up_bytes_per_token:.0f}", f"{found.device_ram_bytes / 1e6:.0f}", joules,
                "?" if found.loss is None else f"{found.loss:.2f}", self._against(judged),
            )  # fmt: skip
        return table

    def refusals(self) -> list[str]:
        """Why those of the table that may not be may not."""
        return [f"{judged.candidate}: {self.search.why_not(judged)}" for judged in shown(self.search) if judged.violated]

    def conclusions(self) -> list[str]:
        """In words: the plan, and whether a cut is worth it here."""
        search = self.search
        lines = [f"Take {search.best.candidate}."]
        split = search.best_of("split")
        other = min((judged for judged in search.judged if judged.candidate.mode != "split" and judged.feasible),
                    key=lambda judged: judged.value, default=None)  # fmt: skip
        if split is None:
            return [*lines, "The model has no two layers to cut between."]
        price = f"TPOT {split.figures.tpot_ms:.1f} ms, cloud {split.figures.cloud_ms_per_token:.2f} ms a token"
        if not split.feasible:
            return [
                *lines,
                f"No cut keeps to the constraints; nearest is {split.candidate} ({price}): {'; '.join(split.violated)}.",
            ]
        if other is None:
            lines.append(f"Only a cut keeps to the constraints: {split.candidate}, {price}.")
        else:
            ratio = f"{split.value / other.value:.2f} times the {VALUE_NAMES[search.objective]}" if other.value > 0 else "more"
            theirs = f"{other.candidate}: TPOT {other.figures.tpot_ms:.1f} ms, cloud {other.figures.cloud_ms_per_token:.2f} ms"
            worth = "A cut is worth it here" if split.value < other.value else "A cut is a bad idea here"
            lines.append(f"{worth}: the best ({split.candidate}) takes {ratio} of {theirs} a token; its own {price}.")
        if search.best.candidate.mode == "split":
            lines.append(
                "The boundary keeps prompt ids on the device, but activations can be inverted, after few layers most easily: "
                "this is data minimisation, not encryption."
            )
        return lines

    def _against(self, judged: Judged) -> str:
        if judged == self.best:
            return "the plan"
        if judged.violated:
            return "not allowed"
        return f"{judged.value / self.best.value:.2f}x" if self.best.value > 0 else self.search.why_not(judged)

    def _entry(self, judged: Judged) -> dict[str, Any]:
        return {
            "plan": str(judged.candidate),
            **asdict(judged.candidate),
            "figures": asdict(judged.figures),
            "feasible": judged.feasible,
            "why_not": self.search.why_not(judged),
        }


def make_plan(scene: Scene, link: Connection, objective: PlanObjective, constraints: Constraints, assumptions: list[str]) -> Plan:
    """Search for the link and for some others. Raises NoPlanError."""
    predictor = Predictor(scene)
    found = search_over(predictor, link, objective, constraints)
    places = over_links(predictor, objective, constraints, FEW_RTT_MS, FEW_MBPS)
    return Plan(predictor, found, places, [*assumptions, *_standing_assumptions(scene)])


def shown(search: Search) -> list[Judged]:
    """The plan, the best of every mode, and the next that may be; the best of other draft lengths and cuts among them."""
    chosen = [search.best]
    for mode in get_args(PlanMode):
        if (judged := search.best_of(mode)) is not None and judged not in chosen:
            chosen.append(judged)
    for judged in search.judged:
        if len(chosen) >= NUM_SHOWN + len(get_args(PlanMode)) or not judged.feasible:
            break
        if judged not in chosen and not any(_alike(judged, other) for other in chosen):
            chosen.append(judged)
    return sorted(chosen, key=lambda judged: (len(judged.violated), judged.value))


def _alike(one: Judged, other: Judged) -> bool:
    """Splits at the same draft length differ too little to fill a table with."""
    a, b = one.candidate, other.candidate
    return a.mode == b.mode == "split" and a.num_draft_tokens == b.num_draft_tokens


def _standing_assumptions(scene: Scene) -> list[str]:
    work = scene.workload
    lines = [
        f"device: {scene.device.name} ({scene.device.source})",
        f"cloud: {scene.cloud.name} ({scene.cloud.source}), the target in {scene.cloud.serves}, alone on it",
        f"work: a prompt of {work.prompt_tokens} tokens, an answer of {work.answer_tokens}",
    ]
    for draft in scene.drafts:
        how = "measured" if draft.measured else "assumed"
        lines.append(f"draft: {draft.name}, {how} to be right {draft.survival[0]:.0%} of the time")
    for front in scene.fronts:
        lines.append(f"front: times as measured, at {front.cut} in {front.weights}; other cuts in proportion")
    for loss in scene.losses.tried:
        what = f"split at {loss.cut}, front {loss.front}, boundary {loss.codec}"
        lines.append(f"{what}: measured to lose {1 - loss.agreement:.3f} of {loss.num_positions} tokens")
    if not scene.losses.known:
        lines.append(f"what quantized fronts and boundaries do to the text is not known here: {HOW_TO_MEASURE}")
    return lines
