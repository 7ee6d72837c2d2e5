"""Writes a comparison's results, whole or not at all: JSON, plots and one HTML page."""

from __future__ import annotations

import math
import os
import re
import tempfile
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from natgrad.experiments.plots import PLOTS, render
from natgrad.experiments.results import MethodResult, Results
from natgrad.experiments.search import BUDGET, best_learning_rate

__all__ = [
    "check_output",
    "format_bytes",
    "format_loss",
    "format_percent",
    "format_rate",
    "format_seconds",
    "headline",
    "render_html",
    "write_report",
]

DASH = "–"


def check_output(directory: Path) -> None:
    """Check, before anything runs, that results can be written to a folder.

    Args:
        directory: The folder; it need not exist.

    Raises:
        ValueError: If it is a file, or it or the folder to create it in cannot be written to.
    """
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"The output {directory} is a file: give a folder.")
    parent = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"The output {directory} cannot be written: {parent} does not allow it.")


def write_report(results: Results, directory: Path) -> list[Path]:
    """Write ``results.json``, the plots as PNG and SVG, and ``report.html`` to a folder.

    Everything is rendered before the first byte is written, and each file appears under its name
    only once it is complete.

    Args:
        results: The results.
        directory: The folder, created if need be; other files in it are left alone.

    Returns:
        The paths of the files, the report first.
    """
    drawn = {
        plot.name: {kind: render(results, plot, kind) for kind in ("svg", "png")} for plot in PLOTS
    }
    svg = {name: images["svg"].decode() for name, images in drawn.items()}
    contents = {
        "report.html": render_html(results, svg).encode(),
        "results.json": results.to_json().encode(),
    }
    for name, images in drawn.items():
        contents |= {f"{name}.{kind}": content for kind, content in images.items()}
    directory.mkdir(parents=True, exist_ok=True)
    return [_write_whole(directory / name, content) for name, content in contents.items()]


def render_html(results: Results, plots: dict[str, str]) -> str:
    """Render the report as one HTML page that loads nothing from anywhere.

    Args:
        results: The results.
        plots: The plots as SVG, by the name of the plot.

    Returns:
        The page.
    """
    environment = Environment(
        loader=PackageLoader("natgrad.experiments"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {
        "bytes": format_bytes,
        "loss": format_loss,
        "percent": format_percent,
        "rate": format_rate,
        "seconds": format_seconds,
    }
    figures = [(plot, Markup(_inline(plots[plot.name], plot.name, plot.title))) for plot in PLOTS]
    return environment.get_template("report.html.j2").render(
        results=results,
        figures=figures,
        headline=headline(results),
        fewest_steps=_fewest(results, "steps_to_target"),
        fewest_seconds=_fewest(results, "seconds_to_target"),
        is_wide=results.config["model"] == "mlp" and results.config["batch_size"] is None,
        best_learning_rate=best_learning_rate,
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


def format_loss(value: float | None) -> str:
    """Format a loss with three significant digits; a dash for none."""
    if value is None or not math.isfinite(value):
        return DASH
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.2e}"


def format_rate(value: float | None) -> str:
    """Format a learning rate or damping with three significant digits; a dash for none."""
    return DASH if value is None or not math.isfinite(value) else f"{value:.3g}"


def format_percent(value: float | None) -> str:
    """Format a fraction as a percentage; a dash for none."""
    return DASH if value is None or not math.isfinite(value) else f"{100 * value:.1f} %"


def format_seconds(value: float | None) -> str:
    """Format a duration in seconds; a dash for none."""
    if value is None or not math.isfinite(value):
        return DASH
    return f"{value:.2f} s" if value < 100 else f"{value:.0f} s"


def format_bytes(value: int | None) -> str:
    """Format a number of bytes in MB (10⁶ bytes); a dash for none."""
    return DASH if value is None else f"{value / 1e6:.0f} MB"


def _fewest(results: Results, quantity: str) -> set[str]:
    """Return the names of the methods with the least of a quantity."""
    values = {result.name: getattr(result, quantity) for result in results.methods}
    present = [value for value in values.values() if value is not None]
    return {name for name, value in values.items() if present and value == min(present)}


def _inline(svg: str, prefix: str, title: str) -> str:
    """Prepare an SVG file for an HTML page: no prologue or metadata, identifiers of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'href="#', f'href="#{prefix}-', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}-", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)


def _write_whole(path: Path, content: bytes) -> Path:
    """Write a file under a temporary name and move it to its own when it is complete."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path
