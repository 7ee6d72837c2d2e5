"""What commands show in the terminal: live progress, and tables at the end."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from fractions import Fraction
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from natgrad.experiments.compare import Observer
from natgrad.experiments.inspection import FEW_ENOUGH, Spectrum
from natgrad.experiments.methods import METHODS
from natgrad.experiments.pages import (
    DASH,
    format_loss,
    format_megabytes,
    format_or_dash,
    format_percent,
    format_rate,
    format_seconds,
)
from natgrad.experiments.plan import Plan, SharedWork, advice, best
from natgrad.experiments.progress import Progress as Parts
from natgrad.experiments.report import format_metric, headline, last, outcome, over_seeds
from natgrad.experiments.results import MethodResult, Results
from natgrad.experiments.theory.results import TheoryResults
from natgrad.optim.summary import Summary, format_bytes


class _Bars(Progress):
    """Progress bars that are live in a terminal; elsewhere a line is printed when a part ends."""

    def __init__(
        self, console: Console, *columns: ProgressColumn, shows_rest: bool = False
    ) -> None:
        rest = (TextColumn("left"), TimeRemainingColumn()) if shows_rest else ()
        live = console.is_terminal
        every = (*columns, TimeElapsedColumn(), *rest)
        super().__init__(*every, console=console, refresh_per_second=5, disable=not live)
        self._current: TaskID | None = None

    def _begin(self, description: str, total: float, **fields: Any) -> None:
        self._stop_clock()
        self._current = self.add_task(description, total=total, **fields)

    def _move(self, **changes: Any) -> None:
        if self._current is not None:
            self.update(self._current, **changes)

    def _stop_clock(self) -> None:
        if self._current is not None:
            self.stop_task(self._current)


class ProgressBars(_Bars, Observer):
    """One bar for all, and one per method and search with loss and metric of the last step."""

    def __init__(self, console: Console) -> None:
        title, bar = TextColumn("{task.description}"), BarColumn(bar_width=24)
        measured = TextColumn("{task.fields[measured]}")
        super().__init__(console, title, bar, MofNCompleteColumn(), measured, shows_rest=True)
        self._method = ""
        self._all: TaskID | None = None
        #: What is spent of the total, and what the present bar will have spent of it.
        self._spent, self._budget = 0.0, 0.0

    def begin(self, method: str, budget: float, searching: bool) -> None:
        """Show a new bar."""
        if self._all is None:
            self._all = self.add_task(f"{'all':<24}", total=self.total, measured="")
        self._spent, self._budget = self._spent + self._budget, budget
        self._method, title = method, METHODS[method].title
        if searching:
            title = f"[dim]{title}: learning rates[/dim]"
        self._begin(f"{title:<24}", budget, measured="")

    def step(self, taken: float, loss: float, metric: float) -> None:
        """Move the bar."""
        measured = f"loss {format_loss(loss):>8}"
        if not math.isnan(metric):
            shown = format_percent(metric) if self.metric == "accuracy" else format_loss(metric)
            measured += f"  {self.metric.replace('_', ' ')} {shown:>7}"
        self._move(completed=taken, measured=measured)
        if self._all is not None:
            self.update(self._all, completed=self._spent + taken)

    def end(self, result: MethodResult) -> None:
        """Leave the bar as it is, and say how the method ended if that is news."""
        self._stop_clock()
        if not self.console.is_terminal:
            loss = over_seeds(result, last("train", "loss"), format_loss)
            seconds = format_seconds(sum(run.seconds for run in result.runs))
            self.console.print(f"{result.title}: {outcome(result)}, loss {loss}, {seconds}")
        elif result.status != "completed" and result.name == self._method:
            self._move(measured=f"[bold red]{result.status}[/bold red]")


class PartBars(_Bars, Parts):
    """One bar per part of a job; where there is no terminal, a line when it has ended."""

    def __init__(self, console: Console) -> None:
        title, share = "{task.description:<12}", "{task.percentage:>3.0f} %"
        super().__init__(console, TextColumn(title), BarColumn(bar_width=32), TextColumn(share))

    def begin(self, part: str) -> None:
        """Show a new bar."""
        self._begin(part, 1.0)

    def progress(self, share: float) -> None:
        """Move the bar."""
        self._move(completed=share)

    def end(self, line: str) -> None:
        """Leave the bar as it is."""
        self._stop_clock()
        if not self.console.is_terminal:
            self.console.print(line, highlight=False)


def make_table(
    headings: Iterable[str],
    rows: Iterable[Iterable[str]],
    text: Collection[str] = (),
    no_wrap: bool = False,
    **options: Any,
) -> Table:
    """Return a table of numbers, which may not wrap; columns that are in `text` are flush left."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, **options)
    for heading in headings:
        number = heading not in text
        justify: Literal["right", "left"] = "right" if number else "left"
        table.add_column(heading, justify=justify, no_wrap=number and no_wrap)
    for row in rows:
        table.add_row(*row)
    return table


def print_findings(console: Console, results: TheoryResults) -> None:
    """Print what each section of the theory found."""
    for section in results.sections:
        console.print(f"[bold]{escape(section.title)}[/bold]")
        for finding in section.findings:
            console.print(f"  {escape(finding)}", highlight=False)


def print_results(console: Console, results: Results) -> None:
    """Print the table of a comparison, what went wrong, and which method was first.

    Where the console is narrow, less important columns are left out.
    """
    wide, tested = console.width >= 100, any(result.test.loss for result in results.methods)
    rows = []
    for result in results.methods:
        of = functools.partial(over_seeds, result, ranges=False)
        metric = functools.partial(format_metric, results)
        done = all(run.status == "completed" for run in result.runs)
        row = {"method": result.title if done else f"{result.title} ({outcome(result)})"}
        if wide:
            row["learning\nrate"] = format_rate(result.learning_rate)
            row["steps"] = format_or_dash(result.steps_taken)
        row["steps to\ntarget"] = of("steps_to_target", "{:g}".format)
        row["time to\ntarget"] = of("seconds_to_target", format_seconds)
        row["train\nloss"] = of(last("train", "loss"), format_loss)
        if wide and tested:
            row["test\nloss"] = of(last("test", "loss"), format_loss)
        if tested and results.metric != "none":
            heading = f"test\n{results.metric}".replace("_", "\n")
            row[heading] = of(last("test", "accuracy"), metric)
        row["ms per\nstep"] = of("milliseconds_per_step", "{:.1f}".format)
        if wide:
            row["peak\nmemory"] = format_megabytes(result.peak_memory_bytes)
        rows.append(row)
    values = (row.values() for row in rows)
    console.print(make_table(rows[0], values, text=("method",), no_wrap=True))
    for result in results.methods:
        if result.message:
            console.print(f"{result.title}: {escape(result.message)}", highlight=False)
    if results.config["seeds"] > 1:
        console.print(f"Medians over {results.config['seeds']} seeds.", highlight=False)
    console.print(headline(results), highlight=False)


def print_summary(console: Console, summary: Summary, positions: Mapping[str, int] | None) -> None:
    """Print what an optimizer would do with each layer; positions share a layer's weights.

    Where the console is narrow, less important columns are left out.
    """
    layers = [*summary.layers, *([summary.joint] if summary.joint else [])]
    columns = {
        "layer": [escape(layer.name) for layer in layers],
        "kind": [escape(layer.kind) for layer in layers],
        "parameters": [f"{layer.parameters:,}" for layer in layers],
        "positions": [format_or_dash((positions or {}).get(layer.name)) for layer in layers],
        "treatment": [escape(layer.treatment) for layer in layers],
        "factors": [layer.factors or DASH for layer in layers],
        "memory": [format_bytes(layer.memory) if layer.memory else DASH for layer in layers],
        "per\nrefresh": [format_or_dash(layer.refresh or None, ".1e") for layer in layers],
        "per\nstep": [format_or_dash(layer.step or None, ".1e") for layer in layers],
    }
    if console.width < 100:
        for name in ("kind", "positions", "factors", "per\nrefresh"):
            del columns[name]
    text = "layer", "kind", "treatment", "factors"
    table = make_table(columns, zip(*columns.values(), strict=True), text)
    table.columns[0].overflow = "fold"
    console.print(table)
    console.print(
        f"{summary.covered:,} of {summary.parameters:,} parameters preconditioned by "
        f"{summary.structure} ({summary.fisher} Fisher matrix); "
        f"{format_bytes(summary.memory)} of curvature."
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


def print_spectrum(console: Console, spectrum: Spectrum) -> None:
    """Print eigenvalues: the largest, how many there are per decade, and what they amount to."""
    console.print(
        f"\nFisher matrix on {spectrum.samples:,} samples: {spectrum.parameters:,} eigenvalues, "
        f"trace {spectrum.trace:.3g}."
    )
    rows = []
    for one in spectrum.top:
        part = format_percent(one.value / spectrum.trace if spectrum.trace else None)
        rows.append([f"{one.value:.3g}", part, escape(one.layer), format_percent(one.share)])
    headings = "largest", "of the trace", "eigenvector in", "share"
    console.print(make_table(headings, rows, text=("eigenvector in",)))
    counts = {f"1e{k} to 1e{k + 1}": count for k, count in spectrum.decades.items()}
    counts["less, or zero"] = spectrum.rest
    most = max(math.log1p(count) for count in counts.values()) or 1.0
    rows = [
        [name, f"{count:,.0f}", "█" * round(24 * math.log1p(count) / most)]
        for name, count in counts.items()
    ]
    estimated = spectrum.parameters > FEW_ENOUGH
    columns = "eigenvalues of", "about" if estimated else "number", ""
    console.print(make_table(columns, rows, text=("eigenvalues of", "")))
    rows = [[f"{at:g}", f"{size:,.1f}"] for at, size in spectrum.effective_dimension.items()]
    console.print(make_table(("damping", "effective dimension"), rows))
    if estimated:
        console.print("Counts and dimensions are estimates by random vectors.")
    console.print("Bars are logarithmic.")


_Columns = dict[str, Callable[[SharedWork], str]]

_BYTES: _Columns = {
    "kept": lambda work: format_bytes(work.memory),
    "statistics": lambda work: _bytes(sum(message.per_step for message in work.messages[:4])),
    "inverses": lambda work: _bytes(work.inverses.per_step),
    "natural\ngradients": lambda work: _bytes(work.natural_gradients.per_step),
    "parameters": lambda work: _bytes(work.parameters.per_step),
    "moved\nin all": lambda work: _bytes(work.moved),
    "beside it,\ngradients": lambda work: _bytes(work.gradients.per_step),
}

#: Of parameters in shards, where no process sends all of them to the others.
_BYTES_OF_SHARDS: _Columns = {
    "curvature": _BYTES["kept"],
    "model": lambda work: format_bytes(work.model),
    "owned": lambda work: format_bytes(work.owned),
    "statistics": _BYTES["statistics"],
    "inverses": _BYTES["inverses"],
    "gradients": lambda work: _bytes(work.whole_gradients.per_step),
    "natural\ngradients": _BYTES["natural\ngradients"],
    "moved\nin all": _BYTES["moved\nin all"],
}

_WORK: _Columns = {
    "factorisation,\nGFLOP": lambda work: _three_digits(work.factorisation / 1e9),
    "statistics,\nGFLOP": lambda work: _three_digits(work.statistics / 1e9),
    "preconditioning,\nGFLOP": lambda work: _three_digits(work.preconditioning / 1e9),
    "computing,\nms": lambda work: _three_digits(1e3 * work.computation),
    "sending,\nms": lambda work: _three_digits(1e3 * work.communication),
    "both,\nms": lambda work: _three_digits(1e3 * work.seconds),
}


def print_plan(console: Console, plan: Plan) -> None:
    """Print what every sharing mode takes, per process, and which one to take.

    Bytes and floating-point operations are means per step; the mode to take is marked ``*``.
    """
    options = plan.options
    console.print(
        f"{options.method} for {plan.covered:,} of {plan.parameters:,} parameters in {plan.parts} "
        f"parts; per process {options.samples} samples of {options.positions} positions; an update "
        f"every {options.factors} steps, a factorisation every {options.inverses}.",
        highlight=False,
    )
    rates = f"at {options.bandwidth:g} GB/s and {options.throughput:g} TFLOP/s"
    sizes = _BYTES_OF_SHARDS if options.shards else _BYTES
    for title, columns in (
        ("Kept, and sent per step, by each process", sizes),
        (f"Work per step of each process, {rates}", _WORK),
    ):
        rows = []
        for work in plan.works:
            mark = " *" if work == best(plan, work.ranks) else ""
            sharing = work.sharing if isinstance(work.sharing, str) else str(Fraction(work.sharing))
            rows.append([f"{work.ranks:,}", sharing + mark, *(of(work) for of in columns.values())])
        headings, form = ["ranks", "sharing", *columns], {"title": title, "title_justify": "left"}
        table = make_table(headings, rows, ["sharing"], no_wrap=True, **form)
        console.print(table, highlight=False)
    console.print(advice(plan), highlight=False)


def _bytes(size: float) -> str:
    return format_bytes(size) if size else "-"


def _three_digits(value: float) -> str:
    """Return three digits, of large numbers all before the point."""
    if not value:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
