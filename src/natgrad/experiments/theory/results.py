"""What the theory experiments found: sections of sentences, tables and plots, as plain data.

The fields and their meaning are documented in ``docs/theory-schema.md``; change both together and
raise `SCHEMA_VERSION` when a reader of the old form would misread the new one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from natgrad.experiments.results import JobResults

SCHEMA_VERSION = 1

Status = Literal["completed", "failed", "interrupted", "not run"]
Cell = str | int | float | None


@dataclass
class Line:
    """One curve or set of points.

    `style` is "line" for predictions, "markers" for measurements, "both", or "reference"; `method`
    sets the colour.
    """

    label: str
    x: list[float]
    y: list[float]
    style: str = "line"
    method: str = ""

    @classmethod
    def level(cls, label: str, value: float, x: Sequence[float]) -> Line:
        """Return a horizontal reference from the first to the last of some abscissas."""
        return cls(label, [float(x[0]), float(x[-1])], [value, value], "reference")


@dataclass
class Panel:
    """One pair of axes, with curves or an image."""

    title: str
    lines: list[Line] = field(default_factory=list)
    image: list[list[float]] | None = None

    def compare(
        self, label: str, predicted: list[float], measured: list[float], method: str
    ) -> None:
        """Add two curves over steps: a line for predictions, markers for measurements."""
        for name, values, style in ((label, predicted, "line"), ("", measured, "markers")):
            steps = [float(step) for step in range(len(values))]
            self.lines.append(Line(name, steps, values, style, method))


@dataclass
class Plot:
    """One figure, its panels from left to right and from top to bottom."""

    name: str
    title: str
    caption: str
    panels: list[Panel]
    x_label: str = ""
    y_label: str = ""
    x_log: bool = False
    y_log: bool = False


@dataclass
class Table:
    """One table, its cells row by row."""

    caption: str
    headings: list[str]
    rows: list[list[Cell]]


@dataclass
class Section:
    """One part of the report; title and question are those of the docstring of what makes it."""

    name: str = ""
    title: str = ""
    question: str = ""
    status: Status = "not run"
    findings: list[str] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(kw_only=True)
class TheoryResults(JobResults):
    """Everything a run of `natgrad theory` found."""

    sections: list[Section]
    schema_version: int = SCHEMA_VERSION


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
