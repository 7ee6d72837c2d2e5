"""What the theory experiments found: sections of sentences, tables and plots, as plain data.

The fields and their meaning are documented in ``docs/theory-schema.md``; change both together and
raise `SCHEMA_VERSION` when a reader of the old form would misread the new one.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    """One part of the report."""

    name: str
    title: str
    question: str
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
