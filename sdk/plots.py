"""Plots of a bench as SVG to put into HTML."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from edgecloud.arms import Arm
from edgecloud.bench import Bench
from edgecloud.cells import Cell
from edgecloud.drawing import check_installed, new_figure, to_svg
from edgecloud.types import ModeSpan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROW_IN = 0.24
MARKERS = "osD^vPX*"
LONGEST_DRAFT = 16  # end of the colour scale
STREAM_COLOUR, EDGE_COLOUR = "0.75", "tab:red"


def all_plots(bench: Bench) -> dict[str, str]:
    """SVG by name of the plot. What the bench has nothing of is left out: acceptance, timeline."""
    check_installed()
    plots = {"tpot": to_svg("tpot", tpot_by_rtt(bench)), "ttft": to_svg("ttft", ttft_by_link(bench))}
    if any(cell.survival for cell in _speculative(bench)):
        plots["acceptance"] = to_svg("acceptance", acceptance_by_position(bench))
    for arm in bench.arms:
        if arm.mode == "auto":
            name = "timeline-" + arm.name.replace(":", "-")
            plots[name] = to_svg(name, timeline(bench, arm))
    return plots


def tpot_by_rtt(bench: Bench) -> Figure:
    """A line an arm, over the measured round trips; quartiles as bars."""
    figure, axes = new_figure()
    rtt_ms = _rtt_by_link(bench)
    for at, arm in enumerate(bench.arms):
        cells = sorted((cell for cell in bench.cells if cell.arm == arm.name), key=lambda cell: rtt_ms[cell.link])
        middles = [cell.tpot_ms for cell in cells]
        below = [cell.tpot_ms - cell.tpot_p25_ms for cell in cells]
        above = [cell.tpot_p75_ms - cell.tpot_ms for cell in cells]
        axes.errorbar(
            [rtt_ms[cell.link] for cell in cells], middles, [below, above],
            label=arm.name, marker=MARKERS[at % len(MARKERS)], capsize=3, color=f"C{at}",
        )  # fmt: skip
    for link, rtt in rtt_ms.items():
        axes.annotate(link, (rtt, 0.01), xycoords=("data", "axes fraction"), rotation=90, fontsize=7, color="0.4", va="bottom")
    axes.set(xlabel="measured round trip, ms", ylabel="TPOT, ms", ylim=(0, None), xlim=(0, None))
    axes.legend(fontsize=8)
    return figure


def ttft_by_link(bench: Bench) -> Figure:
    """Bars a link and arm: until the first final token, and within it until the first that is visible."""
    figure, axes = new_figure()
    links = [link.name for link in bench.links]
    width = 0.8 / len(bench.arms)
    for at, arm in enumerate(bench.arms):
        cells = {cell.link: cell for cell in bench.cells if cell.arm == arm.name}
        places = [place - 0.4 + width * (at + 0.5) for place in range(len(links))]
        axes.bar(places, [cells[link].ttft_ms for link in links], width, color=f"C{at}", alpha=0.4)
        visible = [cells[link].first_visible_ms for link in links]
        axes.bar(places, visible, width, color=f"C{at}", label=f"{arm.name}: first visible (pale: first final)")
    axes.set_xticks(range(len(links)), links, fontsize=8)
    axes.set(ylabel="time to first token, ms")
    axes.legend(fontsize=7)
    return figure


def acceptance_by_position(bench: Bench) -> Figure:
    """Share of rounds that accepted at least so many draft tokens, over all links of an arm."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = new_figure()
    for at, arm in enumerate(bench.arms):
        cells = [cell for cell in _speculative(bench) if cell.arm == arm.name and cell.survival]
        if not cells:
            continue
        shares = [sum(column) / len(cells) for column in zip(*(cell.survival for cell in cells), strict=False)]
        axes.plot(range(1, len(shares) + 1), shares, label=arm.name, marker=MARKERS[at % len(MARKERS)], color=f"C{at}")
    axes.set(xlabel="draft position", ylabel="rounds that accepted at least so many", ylim=(0, 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=8)
    return figure


def timeline(bench: Bench, arm: Arm) -> Figure:
    """What mode `auto` was doing, token by token: a row a generation, by link."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    samples = [sample for sample in bench.samples if sample.arm == arm.name]
    figure, axes = new_figure(1.2 + ROW_IN * len(samples))
    scale = ScalarMappable(Normalize(0, LONGEST_DRAFT), "viridis")
    links = [link.name for link in bench.links]
    samples.sort(key=lambda sample: (links.index(sample.link), sample.prompt, sample.repeat))
    for row, sample in enumerate(samples):
        spans = sample.reply.mode_timeline
        ends = [*(span.token for span in spans[1:]), len(sample.reply.token_ids)]
        bars = [(span.token, end - span.token) for span, end in zip(spans, ends, strict=True)]
        axes.broken_barh(
            bars, (row - 0.4, 0.8), facecolors=[_colour(span, lambda k: scale.get_cmap()(k / LONGEST_DRAFT)) for span in spans]
        )
    labels = [f"{sample.link}, {sample.prompt + 1}" for sample in samples]
    axes.set_yticks(range(len(samples)), labels, fontsize=6)
    axes.invert_yaxis()
    axes.set(xlabel="token of the answer", ylabel="link, prompt")
    figure.colorbar(scale, ax=axes, label="speculative: K")
    for colour, label in ((STREAM_COLOUR, "cloud: stream"), (EDGE_COLOUR, "edge: unverified")):
        axes.plot([], [], color=colour, linewidth=6, label=label)
    axes.legend(fontsize=7, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    return figure


def _colour(span: ModeSpan, speculative: Callable[[int], Any]) -> Any:
    if span.mode == "speculative":
        return speculative(span.num_draft_tokens)
    return STREAM_COLOUR if span.mode == "cloud" else EDGE_COLOUR


def _speculative(bench: Bench) -> Sequence[Cell]:
    names = {arm.name for arm in bench.arms if arm.mode == "speculative"}
    return [cell for cell in bench.cells if cell.arm in names]


def _rtt_by_link(bench: Bench) -> dict[str, float]:
    """As measured by mode cloud, which waits for nothing else."""
    streams = {arm.name for arm in bench.arms if arm.mode == "cloud"}
    return {cell.link: cell.rtt_ms or 0.0 for cell in bench.cells if cell.arm in streams}
