"""What the theory experiments found: sections of sentences, tables and plots, as plain data.

The fields and their meaning are documented in ``docs/theory-schema.md``; change both together and
raise `SCHEMA_VERSION` when a reader of the old form would misread the new one.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from natgrad.experiments.results import to_json

__all__ = ["SCHEMA_VERSION", "Line", "Panel", "Plot", "Section", "Table", "TheoryResults"]

SCHEMA_VERSION = 1

Status = Literal["completed", "failed", "interrupted", "not run"]
Cell = str | int | float | None


@dataclass
class Line:
    """One curve or set of points.

    Attributes:
        label: Text of the legend; an empty one is left out of it.
        x: Abscissas.
        y: Ordinates, as many; NaN or infinite where there is no value.
        style: "line" for predictions, "markers" for measurements, "both", or "reference".
        method: The method it belongs to, which sets its colour; empty for none.
    """

    label: str
    x: list[float]
    y: list[float]
    style: str = "line"
    method: str = ""


@dataclass
class Panel:
    """One pair of axes.

    Attributes:
        title: Heading.
        lines: Curves, in drawing order.
        image: A matrix to show instead of curves, or None.
    """

    title: str
    lines: list[Line] = field(default_factory=list)
    image: list[list[float]] | None = None


@dataclass
class Plot:
    """One figure.

    Attributes:
        name: File name without its ending.
        title: Heading.
        caption: What to look at.
        panels: Its axes, from left to right and from top to bottom.
        x_label: Label of the abscissa of every panel.
        y_label: Label of the ordinate.
        x_log: Whether the abscissa is logarithmic.
        y_log: Whether the ordinate is.
    """

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
    """One table.

    Attributes:
        caption: What it shows.
        headings: One per column.
        rows: Cells, row by row: text or numbers.
    """

    caption: str
    headings: list[str]
    rows: list[list[Cell]]


@dataclass
class Section:
    """One part of the report.

    Attributes:
        name: Its name on the command line.
        title: Heading.
        question: What it asks, in a sentence or two.
        status: How it ended.
        findings: What was found, one sentence each.
        plots: Its figures.
        tables: Its tables.
        seconds: Time it took.
    """

    name: str
    title: str
    question: str
    status: Status = "not run"
    findings: list[str] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class TheoryResults:
    """Everything a run of `natgrad theory` found.

    Attributes:
        created: Time of the start, UTC, ISO 8601.
        seconds: Time of the whole run.
        interrupted: Whether it was stopped before its end.
        command: The command line that repeats it.
        config: The options, as asked for.
        data: Name, title, numbers of samples, input dimension, classes.
        environment: Versions and machine.
        sections: One entry per section, in the order asked for.
        schema_version: Version of this form.
    """

    created: str
    seconds: float
    interrupted: bool
    command: str
    config: dict[str, Any]
    data: dict[str, Any]
    environment: dict[str, Any]
    sections: list[Section]
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        """Return the results as JSON; NaN and infinite numbers become null."""
        return to_json(dataclasses.asdict(self))
