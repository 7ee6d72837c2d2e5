"""Writes a comparison's results, whole or not at all: JSON, plots and one HTML page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from natgrad.experiments import pages
from natgrad.experiments.pages import (
    DASH,
    format_loss,
    format_percent,
    format_seconds,
    inline_svg,
    render_page,
)
from natgrad.experiments.plots import draw, plots_of
from natgrad.experiments.quality import QUALITY_SAMPLES
from natgrad.experiments.results import MethodResult, Repeat, Results
from natgrad.experiments.search import BUDGET, best_learning_rate


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
