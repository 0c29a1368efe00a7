"""Figures as SVG to put into HTML. matplotlib is imported here only, and only when a report is asked for."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING

from edgecloud.errors import EdgecloudError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_IN, HEIGHT_IN = 9.0, 4.2


def check_installed(option: str = "-o") -> None:
    """Raises EdgecloudError that names the mend: ask before measuring, not after."""
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError as error:
        raise EdgecloudError(
            f"the report's plots need {error.name}; install edgecloud[bench], or leave out {option} for a table alone"
        ) from None


def new_figure(height_in: float = HEIGHT_IN) -> tuple[Figure, Axes]:
    """One pair of axes with a grid."""
    from matplotlib.figure import Figure

    figure = Figure((WIDTH_IN, height_in), layout="constrained")
    axes = figure.subplots()
    axes.grid(visible=True, alpha=0.3)
    return figure, axes


def to_svg(name: str, figure: Figure) -> str:
    """The `svg` element alone; ids get the plot's name in front, for several stand in one page."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    return re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
