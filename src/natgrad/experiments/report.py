"""Writes a comparison's results, whole or not at all: JSON, plots and one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from natgrad.experiments import pages
from natgrad.experiments.pages import DASH, format_loss, format_seconds, inline_svg, render_page
from natgrad.experiments.plots import PLOTS, draw
from natgrad.experiments.quality import QUALITY_SAMPLES
from natgrad.experiments.results import MethodResult, Results
from natgrad.experiments.search import BUDGET, best_learning_rate

__all__ = ["headline", "render_html", "write_report"]


def write_report(results: Results, directory: Path) -> list[Path]:
    """Write the report, the results and the plots; see `pages.write_report`."""
    figures = {plot.name: draw(results, plot) for plot in PLOTS}
    return pages.write_report(
        directory, results.to_json(), figures, lambda svg: render_html(results, svg)
    )


def render_html(results: Results, plots: dict[str, str]) -> str:
    """Render the report, with plots as SVG, as one HTML page that loads nothing from anywhere."""
    figures = [(plot, inline_svg(plots[plot.name], plot.name, plot.title)) for plot in PLOTS]
    return render_page(
        "report.html.j2",
        results=results,
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


def headline(results: Results) -> str:
    """Say in a sentence or two which method was first at the target loss."""
    target = results.target.loss
    reached = [result for result in results.methods if result.steps_to_target is not None]
    if target is None or not reached:
        return "No method reached the target loss."

    def phrase(result: MethodResult, what: str) -> str:
        steps, seconds = result.steps_to_target, format_seconds(result.seconds_to_target)
        return f"{result.title} was first in {what}: {steps} steps, {seconds}."

    fewest = min(reached, key=lambda result: (result.steps_to_target, result.seconds_to_target))
    fastest = min(reached, key=lambda result: result.seconds_to_target or 0.0)
    goal = f"Target: a training loss of {format_loss(target)}, {results.target.rule}."
    if fewest is fastest:
        return f"{goal} {phrase(fewest, 'steps and in seconds')}"
    return f"{goal} {phrase(fewest, 'steps')} {phrase(fastest, 'seconds')}"


def _fewest(results: Results, quantity: str) -> set[str]:
    """Return the names of the methods with the least of a quantity."""
    values = {result.name: getattr(result, quantity) for result in results.methods}
    present = [value for value in values.values() if value is not None]
    return {name for name, value in values.items() if present and value == min(present)}


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
