"""What an exported front took where it was exported: beats what compute and bandwidth would say of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from edgecloud.partitioner.device import NUM_PREFILL_TOKENS, FrontFigures
from edgecloud.partitioner.layer_times import ModelShape, at_rows


@dataclass(frozen=True, slots=True)
class FrontTimes:
    """Runs of one front; fronts of other cuts in the same weights take as long in proportion to their layers."""

    cut: int
    weights: str
    rows: tuple[int, ...]  # of the runs, rising
    run_ms: tuple[float, ...]  # [rows]
    context_tokens: int = NUM_PREFILL_TOKENS  # that a run attends to

    @classmethod
    def of(cls, cut: int, weights: str, figures: FrontFigures) -> FrontTimes:
        """Of what a partition timed; the prompt is a run, too."""
        runs = {int(rows): ms for rows, ms in figures.rows_ms.items()}
        runs[NUM_PREFILL_TOKENS] = NUM_PREFILL_TOKENS * figures.prefill_ms_per_token
        rows = tuple(sorted(runs))
        return cls(cut, weights, rows, tuple(runs[count] for count in rows))

    def front_ms(self, shape: ModelShape, gb_per_s: float, cut: int, num_rows: int, context_tokens: float) -> float:
        """Embedding and the layers before `cut`; a context unlike the measured one is read at the machine's bandwidth."""
        further_gb = shape.kv_bytes(cut, 1) / 1e9 * (context_tokens - self.context_tokens)
        return max(0.0, at_rows(self.rows, self.run_ms, num_rows) * cut / self.cut + 1e3 * further_gb / gb_per_s)


def nearest(fronts: Iterable[FrontTimes], weights: str, cut: int) -> FrontTimes | None:
    """The measured front in these weights whose cut is nearest."""
    return min((one for one in fronts if one.weights == weights), key=lambda one: abs(one.cut - cut), default=None)
