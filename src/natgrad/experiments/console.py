"""What a comparison shows in the terminal: live progress, and the table at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from natgrad.experiments.methods import METHODS
from natgrad.experiments.pages import (
    DASH,
    format_bytes,
    format_loss,
    format_percent,
    format_rate,
    format_seconds,
)
from natgrad.experiments.report import headline
from natgrad.experiments.results import MethodResult, Results
from natgrad.experiments.theory.results import Section, TheoryResults
from natgrad.optim.summary import Summary
from natgrad.optim.summary import format_bytes as format_size

__all__ = ["ProgressBars", "SectionBars", "print_findings", "print_results", "print_summary"]


class ProgressBars:
    """One progress bar per method and search, with the loss and training accuracy of the last step.

    In a terminal the bars are live; elsewhere one line is printed when a method ends.

    Args:
        console: Where to print.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._task: TaskID | None = None
        self._method = ""
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[measured]}"),
            TimeElapsedColumn(),
            console=console,
            refresh_per_second=5,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> ProgressBars:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def begin(self, method: str, steps: int, searching: bool) -> None:
        """Show a new bar."""
        self._method, title = method, METHODS[method].title
        if searching:
            title = f"[dim]{title}: learning rates[/dim]"
        self._stop_clock()
        self._task = self._progress.add_task(f"{title:<24}", total=steps, measured="")

    def step(self, taken: int, loss: float, accuracy: float) -> None:
        """Move the bar."""
        if self._task is not None:
            measured = f"loss {format_loss(loss):>8}  accuracy {format_percent(accuracy):>7}"
            self._progress.update(self._task, completed=taken, measured=measured)

    def end(self, result: MethodResult) -> None:
        """Leave the bar as it is, and say how the method ended if that is news."""
        self._stop_clock()
        if not self._console.is_terminal:
            loss = format_loss(result.train.loss[-1] if result.train.loss else None)
            seconds = format_seconds(result.seconds)
            self._console.print(f"{result.title}: {result.status}, loss {loss}, {seconds}")
        elif (
            result.status != "completed" and self._task is not None and result.name == self._method
        ):
            self._progress.update(self._task, measured=f"[bold red]{result.status}[/bold red]")

    def _stop_clock(self) -> None:
        if self._task is not None:
            self._progress.stop_task(self._task)


class SectionBars:
    """One progress bar per section of the theory; elsewhere than in a terminal one line at its end.

    Args:
        console: Where to print.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._task: TaskID | None = None
        self._progress = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=32),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            console=console,
            refresh_per_second=5,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> SectionBars:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def begin(self, section: str) -> None:
        """Show a new bar."""
        self._task = self._progress.add_task(section, total=1.0)

    def progress(self, share: float) -> None:
        """Move the bar."""
        if self._task is not None:
            self._progress.update(self._task, completed=share)

    def end(self, section: Section) -> None:
        """Leave the bar as it is."""
        if self._task is not None:
            self._progress.stop_task(self._task)
        if not self._console.is_terminal:
            seconds = format_seconds(section.seconds)
            self._console.print(f"{section.name}: {section.status}, {seconds}")


def print_findings(console: Console, results: TheoryResults) -> None:
    """Print what each section of the theory found."""
    for section in results.sections:
        console.print(f"[bold]{escape(section.title)}[/bold]")
        for finding in section.findings:
            console.print(f"  {escape(finding)}", highlight=False)


def print_results(console: Console, results: Results) -> None:
    """Print the table of a comparison, what went wrong, and which method was first.

    Args:
        console: Where to print; where it is narrow, less important columns are left out.
        results: The results.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("method")
    columns = [column for column in _COLUMNS if column.always or console.width >= 100]
    for column in columns:
        table.add_column(column.heading, justify="right", no_wrap=True)
    for result in results.methods:
        done = result.status == "completed"
        title = result.title if done else f"{result.title} ({result.status})"
        table.add_row(title, *(column.cell(result) for column in columns))
    console.print(table)
    for result in results.methods:
        if result.message:
            console.print(f"{result.title}: {escape(result.message)}", highlight=False)
    console.print(headline(results), highlight=False)


@dataclass(frozen=True)
class _Column:
    """One column of the results table; `always` shown, or only where there is room."""

    heading: str
    cell: Callable[[MethodResult], str]
    always: bool = True


def _steps_to_target(result: MethodResult) -> str:
    return DASH if result.steps_to_target is None else str(result.steps_to_target)


def _speed(result: MethodResult) -> str:
    speed = result.milliseconds_per_step
    return DASH if speed is None else f"{speed:.1f}"


_COLUMNS = (
    _Column("learning\nrate", lambda result: format_rate(result.learning_rate), always=False),
    _Column("steps", lambda result: str(result.steps), always=False),
    _Column("steps to\ntarget", _steps_to_target),
    _Column("time to\ntarget", lambda result: format_seconds(result.seconds_to_target)),
    _Column("train\nloss", lambda result: format_loss(_last(result.train.loss))),
    _Column("test\nloss", lambda result: format_loss(_last(result.test.loss)), always=False),
    _Column("test\naccuracy", lambda result: format_percent(_last(result.test.accuracy))),
    _Column("ms per\nstep", _speed),
    _Column("peak\nmemory", lambda result: format_bytes(result.peak_memory_bytes), always=False),
)


def print_summary(console: Console, summary: Summary, positions: Mapping[str, int] | None) -> None:
    """Print what an optimizer would do with each layer of a model.

    Args:
        console: Where to print.
        summary: The summary.
        positions: Block name → positions that share its weights; None if unknown.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("layer", overflow="fold")
    table.add_column("kind")
    for heading in ("parameters", "positions"):
        table.add_column(heading, justify="right")
    table.add_column("treatment")
    table.add_column("factors")
    for heading in ("memory", "per\nrefresh", "per\nstep"):
        table.add_column(heading, justify="right")
    rows = [*summary.layers, *([summary.joint] if summary.joint else [])]
    for layer in rows:
        known = positions is not None and layer.name in positions
        table.add_row(
            escape(layer.name),
            escape(layer.kind),
            f"{layer.parameters:,}",
            str(positions[layer.name]) if positions is not None and known else DASH,
            escape(layer.treatment),
            layer.factors or DASH,
            format_size(layer.memory) if layer.memory else DASH,
            f"{layer.refresh:.1e}" if layer.refresh else DASH,
            f"{layer.step:.1e}" if layer.step else DASH,
        )
    console.print(table)
    console.print(
        f"{summary.covered:,} of {summary.parameters:,} parameters preconditioned by "
        f"{summary.structure} ({summary.fisher} Fisher matrix); "
        f"{format_size(summary.memory)} of curvature."
    )
    console.print(
        f"Multiplications at {summary.samples} samples per step: {summary.refresh:.1e} per refresh "
        f"and {summary.step:.1e} per step; the backward pass's weight gradients take "
        f"{summary.backward:.1e}."
    )
    if positions is None:
        console.print(
            "Positions that share weights are counted as 1: give --input-shape to count them."
        )


def _last(values: list[float]) -> float | None:
    return values[-1] if values else None
