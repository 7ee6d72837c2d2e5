"""Reports as files: numbers as text, HTML pages that load nothing, written whole or not at all."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from natgrad.experiments.config import ConfigError
from natgrad.experiments.drawing import save_figure
from natgrad.whole_files import whole_file

DASH = "–"


def check_output(directory: Path) -> None:
    """Check, before anything runs, that results can be written to a folder, which need not exist.

    A ConfigError says that it is a file, or that it cannot be made or written to.
    """
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"The output {directory} is a file: give a folder.")
    parent = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"The output {directory} cannot be written: {parent} does not allow it.")


def write_report(
    directory: Path,
    results: str,
    figures: Mapping[str, Figure],
    render: Callable[[dict[str, str]], str],
) -> list[Path]:
    """Write ``results.json``, the figures as PNG and SVG, and ``report.html`` to a folder.

    Everything is rendered, the page from the figures as SVG by name, before the first byte is
    written, and each file appears under its name only once it is complete. Other files in the
    folder are left alone. Returned are the paths, the report's first.
    """
    images = {f"{name}.{kind}": save_figure(figure, kind)
              for name, figure in figures.items() for kind in ("svg", "png")}  # fmt: skip
    page = render({name: images[f"{name}.svg"].decode() for name in figures})
    contents = {"report.html": page.encode(), "results.json": results.encode(), **images}
    return [write_whole(directory / name, content) for name, content in contents.items()]


def render_page(
    template: str, filters: Mapping[str, Callable[..., str]] | None = None, **values: Any
) -> str:
    """Render a template of this package, with the formats of this module and others as filters."""
    environment = Environment(
        loader=PackageLoader("natgrad.experiments"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    known = format_megabytes, format_loss, format_percent, format_rate, format_seconds
    names = "megabytes", "loss", "percent", "rate", "seconds"
    environment.filters |= {**dict(zip(names, known, strict=True)), **(filters or {})}
    return environment.get_template(template).render(**values)


Form = Callable[[float | None], str]
"""Formats a number; a dash stands for none and for one that is not finite."""


def _or_dash(form: Callable[[float], str]) -> Form:
    return lambda value: DASH if value is None or not math.isfinite(value) else form(value)


#: Three significant digits.
format_rate: Form = _or_dash("{:.3g}".format)
format_loss: Form = _or_dash(lambda v: f"{v:.3g}" if 1e-3 <= abs(v) < 1e4 or v == 0 else f"{v:.2e}")
#: A fraction as a percentage.
format_percent: Form = _or_dash(lambda value: f"{100 * value:.1f} %")
format_seconds: Form = _or_dash(lambda value: f"{value:.2f} s" if value < 100 else f"{value:.0f} s")
#: Bytes in MB (10⁶ bytes).
format_megabytes: Form = _or_dash(lambda value: f"{value / 1e6:.0f} MB")


def format_or_dash(value: float | None, specification: str = "") -> str:
    """Format a number as `format` does; a dash for none."""
    return DASH if value is None else format(value, specification)


def inline_svg(svg: str, prefix: str, title: str) -> Markup:
    """Prepare an SVG file for an HTML page: no prologue or metadata, identifiers of its own."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{prefix}-", svg)
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1))


def write_whole(path: Path, content: bytes) -> Path:
    """Write a file that appears under its name only once it is complete; its folder is made.

    A ConfigError says that the system does not let it be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as partial:
            partial.write_bytes(content)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}.") from error
    return path
