"""What the division of an ONNX graph found out, as JSON for scripts and as tables for people."""

from __future__ import annotations

import dataclasses
from itertools import groupby
from typing import Any

from rich.console import Group
from rich.table import Table

from edgecloud.graph_bundle import CutInfo

MAX_NAMES = 3  # of boundary tensors in a cell


@dataclasses.dataclass(frozen=True, slots=True)
class Region:
    """The best kept cut on a link, from measured times."""

    up_mbps: float
    down_mbps: float
    rtt_ms: float
    cut: str
    cost_ms: float


@dataclasses.dataclass(frozen=True, slots=True)
class GraphReport:
    """Figures of one division; times are medians on this machine, the cloud's scaled to the cloud."""

    bundle: str
    model: str
    fingerprint: str
    dry_run: bool
    objective: str
    link: str
    num_nodes: int
    num_groups: int  # of nodes that the runtime fuses; cuts go between groups
    total_ms: float  # of the whole graph on the device
    cloud_share: float  # time in the cloud over time on the device
    cuts: list[CutInfo]
    chosen: str
    costs_ms: dict[str, float]  # of every cut on the stated link: latency, or the slowest stage
    proven: bool  # whether the search has shown that no cut has a better prediction
    bound_ms: float  # no cut is predicted to cost less
    regions: list[Region]
    max_loss: float
    loss_metric: str
    notes: list[str]
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The object that `edgecloud partition --json` prints."""
        return dataclasses.asdict(self)

    def checks(self) -> dict[str, Any]:
        """What bundle.json keeps."""
        kept = (
            "objective",
            "link",
            "total_ms",
            "cloud_share",
            "costs_ms",
            "proven",
            "bound_ms",
            "regions",
            "max_loss",
            "loss_metric",
        )
        return {key: value for key, value in self.to_dict().items() if key in kept}

    def to_table(self) -> Group:
        """For a terminal."""
        what = "latency" if self.objective == "latency" else "slowest stage"
        caption = "chosen: *; " + (
            "no cut is predicted to be better" if self.proven else f"no cut can be below {self.bound_ms:.1f} ms"
        )
        title = f"{self.model}, {self.link}\n{self.bundle}{', not written' if self.dry_run else ''}"
        table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
        table.add_column("cut", no_wrap=True)
        table.add_column("what travels")
        for heading in (f"{what}\nms", "device\nms", "cloud\nms", "up\nkB", "down\nkB", "RAM\nMB", "loss"):
            table.add_column(heading, justify="right", no_wrap=True)
        for cut in sorted(self.cuts, key=lambda cut: self.costs_ms[cut.name]):
            table.add_row(*self._cells(cut))
        where = Table(title="best cut by link", title_justify="left")
        where.add_column("round trip", no_wrap=True)
        rows = [(rtt_ms, list(row)) for rtt_ms, row in groupby(self.regions, key=lambda region: region.rtt_ms)]
        for region in rows[0][1]:
            where.add_column(f"{region.up_mbps:g} Mbit/s", no_wrap=True)
        for rtt_ms, row in rows:
            where.add_row(f"{rtt_ms:g} ms", *(region.cut for region in row))
        return Group(table, where, *(f"note: {note}" for note in self.notes))

    def _cells(self, cut: CutInfo) -> list[str]:
        names = [f"{tensor.name} {tensor.codec}".strip() for tensor in cut.boundary]
        more = [f"and {len(names) - MAX_NAMES} more"] if len(names) > MAX_NAMES else []
        return [
            f"{cut.name}{' *' if cut.name == self.chosen else ''}",
            ", ".join([*names[:MAX_NAMES], *more]) or "nothing",
            f"{self.costs_ms[cut.name]:.1f}",
            f"{cut.edge_ms:.1f}",
            f"{cut.cloud_ms:.1f}",
            f"{cut.boundary_bytes / 1e3:.1f}",
            f"{cut.output_bytes / 1e3:.1f}",
            f"{cut.edge_ram_bytes / 1e6:.1f}",
            "0" if cut.loss == 0 else f"{cut.loss:.1e}",
        ]
