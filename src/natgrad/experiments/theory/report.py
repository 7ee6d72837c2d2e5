"""The theory report: figures, tables and findings on one HTML page."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from natgrad.experiments.drawing import add_legend, line_style, new_figure
from natgrad.experiments.pages import DASH, inline_svg, render_page, write_report
from natgrad.experiments.theory.dynamics import FACTORS
from natgrad.experiments.theory.methods import METHODS
from natgrad.experiments.theory.results import Line, Panel, Plot, TheoryResults


def write_theory_report(results: TheoryResults, directory: Path) -> list[Path]:
    """Write the report, the results and the plots; see `pages.write_report`."""
    figures = {plot.name: draw(plot) for section in results.sections for plot in section.plots}
    return write_report(
        directory, results.to_json(), figures, lambda svg: render_html(results, svg)
    )


def render_html(results: TheoryResults, plots: dict[str, str]) -> str:
    """Render the report as one HTML page that loads nothing from anywhere."""
    every = [plot for section in results.sections for plot in section.plots]
    figures = {one.name: inline_svg(plots[one.name], one.name, one.title) for one in every}
    filters = {"number": format_number}
    return render_page("theory.html.j2", filters=filters, results=results, figures=figures)


def format_number(value: float | None) -> str:
    """Format a number of a table with three significant digits; a dash for none."""
    if isinstance(value, int):
        return f"{value:,}"
    if value is None or not math.isfinite(value):
        return DASH
    return f"{value:.3g}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.1e}"


def draw(plot: Plot) -> Figure:
    """Draw one plot."""
    columns = min(3, len(plot.panels))
    figure, axes = new_figure(len(plot.panels), columns)
    for index, (panel, place) in enumerate(zip(plot.panels, axes, strict=True)):
        if len(plot.panels) > 1:
            place.set_title(panel.title, fontsize=10)
        if panel.image is not None:
            place.imshow(panel.image, cmap="RdBu_r", vmin=-1.0, vmax=1.0, interpolation="nearest")
            place.set_axis_off()
            continue
        _draw_panel(place, plot, panel)
        if index == columns - 1:
            add_legend(figure, place)
    return figure


def _draw_panel(axes: Axes, plot: Plot, panel: Panel) -> None:
    for line in panel.lines:
        pairs = zip(line.x, line.y, strict=True)
        points = [(x, y) for x, y in pairs if math.isfinite(y) and (y > 0 or not plot.y_log)]
        if points:
            axes.plot(*zip(*points, strict=True), label=line.label or None, **_style(line))
    axes.set_xlabel(plot.x_label)
    if plot.y_label:
        axes.set_ylabel(plot.y_label)
    if plot.x_log:
        axes.set_xscale("log")
        places = sorted({x for line in panel.lines for x in line.x})
        if len(places) <= 8:  # Widths: name each of them.
            axes.set_xticks(places, [f"{x:g}" for x in places])
            axes.set_xticks([], minor=True)
    if plot.y_log:
        axes.set_yscale("log")
    measured = [y for line in panel.lines if line.style == "markers" for y in line.y]
    finite = [y for y in measured if math.isfinite(y) and y > 0]
    if plot.y_log and finite:
        # Predictions that leave the range of the measurements by far would flatten the rest.
        axes.set_ylim(top=min(axes.get_ylim()[1], 30 * max(finite)))


def _style(line: Line) -> dict[str, Any]:
    if line.style == "reference":
        return {"color": "#b0b0b0", "linestyle": "-", "linewidth": 3.0, "zorder": 1, "alpha": 0.6}
    without = {"line": {"marker": ""}, "markers": {"linestyle": ""}}.get(line.style, {})
    return {**line_style(_index(line.method)), "markerfacecolor": "white", **without}


def _index(method: str) -> int:
    """Return the number of a method's style; a method looks the same in every figure."""
    if method.startswith("rate "):
        return FACTORS.index(float(method.removeprefix("rate ")))
    return list(METHODS).index(method) if method in METHODS else 0
