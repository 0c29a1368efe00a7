"""Plots of a plan: what a cut costs, where which plan wins, and what bits do to the text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgecloud.drawing import new_figure, to_svg
from edgecloud.partitioner.losses import EXACT
from edgecloud.partitioner.plan import Plan
from edgecloud.partitioner.regions import MBPS, RTT_MS, Place, best_by_cut

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NOBODY = "no plan"


def all_plots(plan: Plan, places: list[Place]) -> dict[str, str]:
    """SVG by name of the plot. What the plan has nothing of is left out: rate against damage."""
    plots = {"cuts": to_svg("cuts", latency_by_cut(plan)), "regions": to_svg("regions", regions(places))}
    if plan.predictor.scene.losses.known:
        plots["damage"] = to_svg("damage", rate_against_damage(plan))
    return plots


def latency_by_cut(plan: Plan) -> Figure:
    """Time of a token by cut, each at its best bits, codec and K, and the cloud's share; the other modes as lines."""
    figure, axes = new_figure()
    by_cut = best_by_cut(plan.search)
    cuts = list(by_cut)
    axes.plot(cuts, [judged.figures.tpot_ms for judged in by_cut.values()], marker=".", label="split: TPOT")
    axes.plot(cuts, [judged.figures.cloud_ms_per_token for judged in by_cut.values()], marker=".", label="split: cloud a token")
    for at, mode in enumerate(("cloud", "speculative", "edge"), 2):
        judged = plan.search.best_of(mode)  # type: ignore[arg-type]  # each is a PlanMode
        if judged is not None:
            axes.axhline(judged.figures.tpot_ms, color=f"C{at}", linestyle="--", label=f"{judged.candidate}: TPOT")
    axes.set(xlabel="layers on the device", ylabel="ms a token", ylim=(0, None))
    axes.legend(fontsize=8)
    return figure


def regions(places: list[Place]) -> Figure:
    """Which plan wins over which link."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    figure, axes = new_figure()
    names = [NOBODY if place.best is None else place.best.candidate.short for place in places]
    known = list(dict.fromkeys(sorted(names)))
    colours = [f"C{at % 10}" for at in range(len(known))]
    grid = [[known.index(name) for name in names[row * len(RTT_MS) : (row + 1) * len(RTT_MS)]] for row in range(len(MBPS))]
    axes.pcolormesh(RTT_MS, MBPS, grid, cmap=ListedColormap(colours), vmin=-0.5, vmax=len(known) - 0.5, shading="nearest")
    axes.set(xscale="log", yscale="log", xlabel="round trip, ms", ylabel="uplink, Mbit/s")
    handles = [Patch(color=colour, label=name) for colour, name in zip(colours, known, strict=True)]
    axes.legend(handles=handles, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def rate_against_damage(plan: Plan) -> Figure:
    """Bytes a position against tokens that differ, for every measured cut, front and codec."""
    from edgecloud.kernels.codec import row_bytes

    figure, axes = new_figure()
    scene = plan.predictor.scene
    pairs = list(dict.fromkeys((loss.front, loss.codec) for loss in scene.losses.known))
    for at, (front, codec) in enumerate(pairs):
        found = [loss for loss in scene.losses.known if (loss.front, loss.codec) == (front, codec)]
        num_bytes = row_bytes(codec, scene.target.hidden_size)
        label = codec if front == EXACT else f"{codec}, front {front}"
        axes.scatter([num_bytes] * len(found), [1 - loss.agreement for loss in found], color=f"C{at % 10}", label=label)
        for loss in found:
            axes.annotate(str(loss.cut), (num_bytes, 1 - loss.agreement), fontsize=6, xytext=(3, 0), textcoords="offset points")
    axes.set(xlabel="bytes a position on the wire", ylabel="share of tokens that differ (number: cut)", ylim=(0, None))
    axes.legend(fontsize=8)
    return figure
