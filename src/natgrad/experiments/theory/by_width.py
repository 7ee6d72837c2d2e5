"""Quantities as functions of the width of a network."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable

from natgrad.experiments.theory.results import Line, Panel, Plot


def exponent(x: Iterable[float], y: Iterable[float]) -> float:
    """Return the exponent of the power law fitted to y as a function of x."""
    return statistics.linear_regression([*map(math.log, x)], [*map(math.log, y)]).slope


class ByWidth(dict[int, list[float]]):
    """A quantity at several widths: width → its values for several draws of the weights."""

    def add(self, width: int, value: float) -> None:
        """Add the value of one draw."""
        self.setdefault(width, []).append(value)

    def mean(self, width: int) -> float:
        """Return the mean over the draws at a width."""
        return statistics.fmean(self[width])

    @property
    def means(self) -> list[float]:
        """The means over the draws, width by width."""
        return [self.mean(width) for width in self]

    def exponent(self) -> float:
        """Return the exponent of the power law fitted to the means; NaN for a single width."""
        return exponent(self, self.means) if len(self) > 1 else math.nan

    def exponents(self) -> list[float]:
        """Return the exponents of the power laws fitted to every draw, draws in turn."""
        return [exponent(self, values) for values in zip(*self.values(), strict=True)]

    def line(self, label: str, method: str = "", style: str = "both") -> Line:
        """Return the means as a curve."""
        return Line(label, [float(width) for width in self], self.means, style, method)

    def power_law(self, exponent: float) -> Line:
        """Return the power law through the first mean, for reference."""
        widths, first = list(self), self.means[0]
        guide = [first * (width / widths[0]) ** exponent for width in widths]
        return Line("", [float(width) for width in widths], guide, "reference")


def plot_by_width(
    name: str,
    title: str,
    caption: str,
    panels: list[Panel],
    y_label: str,
    *,
    x_label: str = "width M",
    y_log: bool = True,
) -> Plot:
    """Return a plot against the width, which is on a logarithmic axis."""
    return Plot(name, title, caption, panels, x_label, y_label, True, y_log)
