"""How figures look: legible in black and white, by line style and marker as well as colour."""

from __future__ import annotations

import io
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can tell apart; with the dashes and markers no
# two of the first eight methods look alike without colour either.
_COLOURS = ("#000000", "#7f7f7f", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_DASHES = ("--", ":", "-", "-", "-", "-.", "-.", (0, (5, 1, 1, 1, 1, 1)))
_MARKERS = ("s", "x", "o", "^", "D", "v", "P", "*")

_STYLE: Any = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 10,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "svg.fonttype": "none",
    "svg.hashsalt": "natgrad",
}


def line_style(index: int) -> dict[str, Any]:
    """Return colour, dashes and marker number ``index``; they repeat after eight."""
    return {
        "color": _COLOURS[index % len(_COLOURS)],
        "linestyle": _DASHES[index % len(_DASHES)],
        "marker": _MARKERS[index % len(_MARKERS)],
    }


def new_figure(panels: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """Return an empty figure and its axes, row by row, so many columns beside each other."""
    rows = -(-panels // columns)
    size = (6.4, 4.6) if columns == 1 else (10.4, 0.5 + 3.1 * rows)
    with rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(panels)]


def add_legend(figure: Figure, axes: Axes) -> None:
    """Name the curves of ``axes``, if they have names, below the figure: phones show it, too."""
    handles, labels = axes.get_legend_handles_labels()
    columns = 3 if figure.get_figwidth() < 8 else 4
    if labels:
        place: dict[str, Any] = {"loc": "outside lower center", "ncols": columns}
        figure.legend(handles, labels, handlelength=3.4, frameon=False, **place)


def save_figure(figure: Figure, file_format: str) -> bytes:
    """Return a figure as the content of a file, "png" or "svg"."""
    buffer = io.BytesIO()
    metadata = {"Date": None, "Creator": None} if file_format == "svg" else {"Software": None}
    with rc_context(_STYLE):
        figure.savefig(buffer, format=file_format, dpi=160, metadata=metadata)
    return buffer.getvalue()
