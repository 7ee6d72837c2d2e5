"""Writes a comparison's results, whole or not at all: JSON, plots and one HTML page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from natgrad.experiments import pages
from natgrad.experiments.drawing import add_legend, line_style, new_figure
from natgrad.experiments.learning_rates import BUDGET, best_learning_rate
from natgrad.experiments.methods import METHODS
from natgrad.experiments.pages import (
    DASH,
    format_loss,
    format_percent,
    format_seconds,
    inline_svg,
    render_page,
)
from natgrad.experiments.quality import QUALITY_SAMPLES
from natgrad.experiments.results import Curve, MethodResult, Repeat, Results


def write_report(results: Results, directory: Path) -> list[Path]:
    """Write the report, the results and the plots; see `pages.write_report`."""
    figures = {plot.name: draw(results, plot) for plot in plots_of(results)}
    render = lambda svg: render_html(results, svg)  # noqa: E731
    return pages.write_report(directory, results.to_json(), figures, render)


def render_html(results: Results, plots: dict[str, str]) -> str:
    """Render the report, with plots as SVG, as one HTML page that loads nothing from anywhere."""
    titles = {plot.name: plot.titled(results.metric) for plot in plots_of(results)}
    figures = [(title, inline_svg(plots[name], name, title)) for name, title in titles.items()]
    return render_page(
        "report.html.j2",
        results=results,
        has_test=any(result.test.loss for result in results.methods),
        forms={
            "loss": format_loss,
            "metric": lambda value: format_metric(results, value),
            "milliseconds": "{:.1f}".format,
            "seconds": format_seconds,
        },
        last=last,
        outcome=outcome,
        over_seeds=over_seeds,
        figures=figures,
        headline=headline(results),
        fewest_steps=_fewest(results, "steps_to_target"),
        fewest_seconds=_fewest(results, "seconds_to_target"),
        is_wide=results.config["model"] == "mlp" and results.config["batch_size"] is None,
        best_learning_rate=best_learning_rate,
        quality=_quality_tables(results),
        quality_samples=min(QUALITY_SAMPLES, results.data["train_samples"]),
        budget=BUDGET,
        dash=DASH,
    )


def format_metric(results: Results, value: float | None) -> str:
    """Format the metric of a comparison, an accuracy as a percentage."""
    return format_percent(value) if results.metric == "accuracy" else format_loss(value)


def last(curve: str, quantity: str) -> Callable[[MethodResult | Repeat], float | None]:
    """Return what picks the last loss or accuracy of a run's train or test curve."""

    def pick(run: MethodResult | Repeat) -> float | None:
        values: list[float] = getattr(getattr(run, curve), quantity)
        return values[-1] if values else None

    return pick


def over_seeds(
    result: MethodResult,
    quantity: str | Callable[[MethodResult | Repeat], float | None],
    form: Callable[[Any], str] = "{:g}".format,
    *,
    ranges: bool = True,
) -> str:
    """Return a quantity of a method's runs as text: the median, and the range over several seeds.

    The quantity is the name of an attribute of a run, or what picks it. Where some runs have none
    the text says how many have.
    """
    pick = quantity if callable(quantity) else lambda run: getattr(run, quantity)
    values = [value for run in result.runs if (value := pick(run)) is not None]
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return DASH
    text = form(statistics.median(values))
    if ranges and min(values) < max(values):
        text += f" ({form(min(values))} to {form(max(values))})"
    if len(values) < len(result.runs):
        text += f" in {len(values)} of {len(result.runs)}"
    return text


def outcome(result: MethodResult) -> str:
    """Return how a method ended, with several seeds how often."""
    first, *others = states = [run.status for run in result.runs]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    return counts if others else first


def headline(results: Results) -> str:
    """Say in a sentence or two which method was first at the target loss, in median over seeds."""
    target = results.target.loss
    steps = {result.name: _typical(result, "steps_to_target") for result in results.methods}
    seconds = {result.name: _typical(result, "seconds_to_target") for result in results.methods}
    reached = [result for result in results.methods if steps[result.name] < math.inf]
    if target is None or not reached:
        return "No method reached the target loss."

    def phrase(result: MethodResult, what: str) -> str:
        spent = f"{steps[result.name]:g} steps, {format_seconds(seconds[result.name])}"
        return f"{result.title} was first in {what}: {spent}."

    fewest = min(reached, key=lambda result: (steps[result.name], seconds[result.name]))
    fastest = min(reached, key=lambda result: seconds[result.name])
    goal = f"Target: a training loss of {format_loss(target)}, {results.target.rule}."
    if fewest is fastest:
        return f"{goal} {phrase(fewest, 'steps and in seconds')}"
    return f"{goal} {phrase(fewest, 'steps')} {phrase(fastest, 'seconds')}"


def _typical(result: MethodResult, quantity: str) -> float:
    """Return the median of a quantity over the seeds, infinite where most runs have none."""
    values = [getattr(run, quantity) for run in result.runs]
    return statistics.median(math.inf if value is None else value for value in values)


def _fewest(results: Results, quantity: str) -> set[str]:
    """Return the names of the methods with the least of a quantity."""
    values = {result.name: _typical(result, quantity) for result in results.methods}
    least = min(values.values())
    return {name for name, value in values.items() if value == least < math.inf}


def _quality_tables(results: Results) -> list[tuple[int, list[str], list[tuple[str, list[Any]]]]]:
    """Return, for every step measured, the Fisher types and a row of shares per structure."""
    tables = []
    for step in dict.fromkeys(point.step for point in results.quality):
        points = [point for point in results.quality if point.step == step]
        fishers = list(dict.fromkeys(point.fisher for point in points))
        shares = {(point.structure, point.fisher): point.share for point in points}
        structures = dict.fromkeys(point.structure for point in points)
        rows = [(name, [shares[name, fisher] for fisher in fishers]) for name in structures]
        tables.append((step, fishers, rows))
    return tables


@dataclass(frozen=True)
class Plot:
    """One plot of the report: a quantity ("loss" or "accuracy") of a curve ("train" or "test").

    It is drawn against "step" or "seconds".
    """

    name: str
    title: str
    curve: str
    quantity: str
    against: str

    def titled(self, metric: str) -> str:
        """Return the title with the name of the metric that the accuracy is here."""
        return self.title.replace("accuracy", metric.replace("_", " "))


PLOTS = (
    Plot("loss-steps", "Training loss against steps", "train", "loss", "step"),
    Plot("loss-seconds", "Training loss against seconds of training", "train", "loss", "seconds"),
    Plot("test-loss-steps", "Test loss against steps", "test", "loss", "step"),
    Plot("test-accuracy-steps", "Test accuracy against steps", "test", "accuracy", "step"),
)
"""The plots of a comparison, as far as there is something to draw."""


def plots_of(results: Results) -> list[Plot]:
    """Return the plots that have something to draw, and in any case the first."""
    found = [p for p in PLOTS if any(True for m in results.methods for _ in _of_method(p, m))]
    return found or [PLOTS[0]]


def draw(results: Results, plot: Plot) -> Figure:
    """Draw one plot."""
    figure, (axes,) = new_figure()
    for result in results.methods:
        index = list(METHODS).index(result.name)  # a method looks the same in every comparison
        done = result.status == "completed"
        label = result.title if done else f"{result.title} ({result.status})"
        style = line_style(index) | {"linewidth": 1.6 if len(result.runs) == 1 else 0.9}
        style |= {"markevery": (0.0, 0.12), "markerfacecolor": "white"}  # By distance along it.
        for points in _of_method(plot, result):
            axes.plot(*zip(*points, strict=True), label=label, **style)
            label = ""  # Further seeds share the entry of the first.
    _decorate(axes, plot, results)
    add_legend(figure, axes)
    return figure


def _of_method(plot: Plot, result: MethodResult) -> Iterator[list[tuple[float, float]]]:
    """Yield the curves of a method, one for every seed, as points; none where there are none."""
    for run in result.runs:
        if points := list(_points(getattr(run, plot.curve), plot)):
            yield points


def _points(curve: Curve, plot: Plot) -> Iterator[tuple[float, float]]:
    for x, y in zip(getattr(curve, plot.against), getattr(curve, plot.quantity), strict=True):
        drawable = math.isfinite(y) and (y > 0 or plot.quantity == "accuracy")
        if drawable and (x > 0 or plot.against == "step"):
            yield x, y


def _decorate(axes: Axes, plot: Plot, results: Results) -> None:
    where = "training" if plot.curve == "train" else "test"
    is_loss = plot.quantity == "loss"
    what = "loss (log scale)" if is_loss else results.metric.replace("_", " ")
    axes.set(ylabel=f"{where} {what}", yscale="log" if is_loss else "linear")
    taken = [result.train.step[-1] for result in results.methods if len(result.train.step) > 1]
    if plot.against == "seconds":
        axes.set(xlabel="seconds of training (log scale)", xscale="log")
    elif not taken or max(taken) <= 3 * min(taken):
        axes.set_xlabel("step")
    else:  # Some methods took many more steps than others.
        axes.set_xlabel("step (log scale)")
        axes.set_xscale("symlog", linthresh=1.0, linscale=0.3)
        axes.set_xlim(left=0.0)
        axes.xaxis.set_major_formatter(ScalarFormatter())
    target = results.target.loss
    if target is not None and target > 0 and plot.curve == "train" and is_loss:
        axes.axhline(target, color="#555555", linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
        place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "xytext": (3, 3)}
        place |= {"textcoords": "offset points", "ha": "left"}
        axes.annotate("target", (0.0, target), fontsize=8.5, color="#555555", **place)
