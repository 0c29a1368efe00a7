"""What the generations of a bench come to: a cell a link and arm, and the regret of mode auto."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from edgecloud.arms import Arm
from edgecloud.types import Reply


@dataclass(frozen=True, slots=True)
class Sample:
    """One generation."""

    link: str
    arm: str
    prompt: int
    repeat: int
    reply: Reply


@dataclass(frozen=True, slots=True)
class Cell:
    """One arm on one link: medians over the generations for times, totals over tokens for the rest."""

    link: str
    arm: str
    rtt_ms: float | None  # as the device measured it, without the service's own time
    ttft_ms: float  # until the first final token; of mode edge, until the first
    first_visible_ms: float
    tpot_ms: float
    tpot_p25_ms: float
    tpot_p75_ms: float
    total_ms: float  # all prompts once: the sum of each one's median
    acceptance_rate: float | None  # accepted / drafted
    mean_acceptance_length: float | None
    survival: list[float]  # [i]: share of the rounds that accepted at least i + 1 draft tokens; the last round's draft may be short
    target_passes_per_token: float
    uplink_bytes_per_token: float
    downlink_bytes_per_token: float
    retracted_per_token: float  # shown as provisional, and taken back
    num_tokens: int
    num_samples: int
    num_identical: int  # of them, with the token ids of the first link's mode cloud
    verified: bool

    @property
    def identical(self) -> bool:
        """Whether every answer is the cloud's, token for token."""
        return self.num_identical == self.num_samples


@dataclass(frozen=True, slots=True)
class Regret:
    """How much longer `auto` took on a link than the fixed arm that turned out best there."""

    link: str
    arm: str  # of mode auto
    total_ms: float
    best: str
    best_ms: float
    ratio: float  # total_ms / best_ms


def summarize(samples: Sequence[Sample], arms: Sequence[Arm]) -> list[Cell]:
    """One cell a link and arm. Each prompt's first answer in mode cloud is the measure."""
    by_name = {arm.name: arm for arm in arms}
    measure: dict[int, list[int]] = {}
    for sample in samples:
        if by_name[sample.arm].mode == "cloud":
            measure.setdefault(sample.prompt, sample.reply.token_ids)
    kinds = itertools.product(dict.fromkeys(sample.link for sample in samples), arms)
    return [
        _cell(link, arm, [sample for sample in samples if (sample.link, sample.arm) == (link, arm.name)], measure)
        for link, arm in kinds
    ]


def regrets(cells: Sequence[Cell], arms: Sequence[Arm]) -> list[Regret]:
    """For every link and arm of mode auto: its time against that of the best fixed arm, found afterwards."""
    fixed = [arm.name for arm in arms if arm.fixed]
    learning = [arm.name for arm in arms if arm.mode == "auto"]
    found = []
    for link in dict.fromkeys(cell.link for cell in cells):
        here = {cell.arm: cell.total_ms for cell in cells if cell.link == link}
        best = min(fixed, key=here.__getitem__)
        found += [Regret(link, name, here[name], best, here[best], here[name] / here[best]) for name in learning]
    return found


def survival(histograms: Iterable[Sequence[int]]) -> list[float]:
    """S_1, S_2, ... from acceptance histograms: the share of rounds that accepted at least so many draft tokens."""
    counts = [sum(column) for column in itertools.zip_longest(*histograms, fillvalue=0)]
    num_rounds = sum(counts)
    return [sum(counts[i:]) / num_rounds for i in range(1, len(counts))] if num_rounds else []


def _cell(link: str, arm: Arm, samples: Sequence[Sample], measure: Mapping[int, list[int]]) -> Cell:
    metrics = [sample.reply.metrics for sample in samples]
    num_tokens = sum(sample.reply.usage.completion_tokens for sample in samples)
    num_drafted = sum(m.num_draft_tokens for m in metrics)
    num_accepted = sum(m.num_accepted_tokens for m in metrics)
    num_rounds = sum(m.num_rounds for m in metrics)
    trips_ms = [m.rtt_ms for m in metrics if m.rtt_ms is not None]
    tpots_ms = [m.tpot_ms for m in metrics]
    low, _, high = statistics.quantiles(tpots_ms, n=4, method="inclusive") if len(tpots_ms) > 1 else [tpots_ms[0]] * 3
    totals_ms: dict[int, list[float]] = {}
    for sample in samples:
        totals_ms.setdefault(sample.prompt, []).append(sample.reply.metrics.total_ms)
    return Cell(
        link=link,
        arm=arm.name,
        rtt_ms=statistics.median(trips_ms) if trips_ms else None,
        ttft_ms=statistics.median(m.ttft_ms for m in metrics),
        first_visible_ms=statistics.median(m.first_visible_ms for m in metrics),
        tpot_ms=statistics.median(tpots_ms),
        tpot_p25_ms=low,
        tpot_p75_ms=high,
        total_ms=sum(statistics.median(times) for times in totals_ms.values()),
        acceptance_rate=num_accepted / num_drafted if num_drafted else None,
        mean_acceptance_length=1 + num_accepted / num_rounds if num_rounds else None,
        survival=survival(m.acceptance_histogram for m in metrics),
        target_passes_per_token=sum(m.target_passes for m in metrics) / num_tokens,
        uplink_bytes_per_token=sum(m.uplink_bytes for m in metrics) / num_tokens,
        downlink_bytes_per_token=sum(m.downlink_bytes for m in metrics) / num_tokens,
        retracted_per_token=sum(m.num_retracted_tokens for m in metrics) / num_tokens,
        num_tokens=num_tokens,
        num_samples=len(samples),
        num_identical=sum(sample.reply.token_ids == measure[sample.prompt] for sample in samples),
        verified=arm.verified,
    )
