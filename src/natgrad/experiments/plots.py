"""Plots of a comparison: legible in black and white, by line style and marker as well as colour."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from natgrad.experiments.drawing import line_style, new_figure
from natgrad.experiments.methods import METHODS
from natgrad.experiments.results import Curve, MethodResult, Results


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
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), handlelength=3.4)
