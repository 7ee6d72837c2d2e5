"""The eigenvalues of the Fisher matrix of random wide networks, measured and predicted."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from natgrad import ntk
from natgrad.experiments.models import fully_connected
from natgrad.experiments.random_state import reproducible
from natgrad.experiments.theory.problem import Problem
from natgrad.experiments.theory.results import (
    ByWidth,
    Cell,
    Line,
    Panel,
    Plot,
    Section,
    Table,
    plot_by_width,
)

TITLES = {"mean": "mean m_λ", "second": "second moment s_λ", "largest": "largest λ_max"}


def spectrum(problem: Problem, progress: Callable[[float], None]) -> Section:
    """Spectrum of the Fisher matrix.

    In standard parameterisation, where are the eigenvalues of the Fisher matrix of a random wide
    network, and what learning rate does the largest allow gradient descent?
    """
    # With ‖x‖² = M_0 the pre-activations of all layers have the same size.
    x = problem.x * problem.x.shape[1] ** 0.5
    measured, predicted, limit = ({name: ByWidth() for name in TITLES} for _ in range(3))
    rows: list[list[Cell]] = []
    for size in problem.each_width(progress):
        found = ntk.fisher_spectrum(_network(problem, size), x)
        theory, wide = found.prediction, ntk.infinite_spectrum(problem.network(size), x)
        values = {
            "mean": (found.mean, theory.mean, wide.mean),
            "second": (found.second_moment, theory.second_moment, wide.second_moment),
            "largest": (float(found.largest[0]), theory.largest, wide.largest),
        }
        for name, numbers in values.items():
            for quantity, number in zip((measured, predicted, limit), numbers, strict=True):
                quantity[name].add(size, number)
        triples = [number for numbers in values.values() for number in numbers]
        rows.append([size, found.parameters, *triples, found.largest_step])
    ranks = [float(rank + 1) for rank in range(len(found.eigenvalues))]
    panels = []
    for name, title in TITLES.items():
        limits = limit[name].line("from κ of infinite width", "full", "reference")
        lines = predicted[name].line("from measured κ", "full", "line")
        markers = measured[name].line("measured", "full", "markers")
        panels.append(Panel(title, [limits, lines, markers]))
    by_width = plot_by_width(
        "spectrum-width",
        "Statistics of the Fisher spectrum against width",
        "Markers: eigenvalues of the exact Fisher matrix of one random network. Lines: what the "
        "mean diagonal κ₁ and the mean off-diagonal κ₂ of the dual kernel predict, measured on the "
        "network and, grey, in the limit of infinite width. The mean falls like 1/M while the "
        "largest eigenvalue grows like M: most directions are flat, a few very steep.",
        panels,
        "",
    )
    eigenvalues = Line("measured", ranks, found.eigenvalues.tolist(), "markers", "full")
    level = Line.level("predicted largest", found.prediction.largest, ranks)
    by_rank = Plot(
        "spectrum",
        "Eigenvalues by rank",
        f"The {len(ranks)} eigenvalues of a network of width {size} that are not zero, of "
        f"{found.parameters:,}; grey: the predicted largest.",
        [Panel(f"width {size}", [eigenvalues, level])],
        "rank",
        "eigenvalue",
        True,
        True,
    )
    caption = "Measured; predicted from measured κ₁ and κ₂; predicted at infinite width."
    headings = (
        "width|parameters|m_λ|from κ|limit|s_λ|from κ|limit|λ_max|from κ|limit|largest η of GD"
    )
    return Section(
        findings=[
            f"The largest eigenvalue grows like M^{measured['largest'].exponent():.2f} (theory: "
            "1), so the learning rate of gradient descent must fall like 1/M; the mean eigenvalue "
            f"falls like M^{measured['mean'].exponent():.2f} (theory: −1).",
            f"At width {size} the largest eigenvalue is {float(found.largest[0]):.3g}; κ measured "
            f"on the network predicts {found.prediction.largest:.3g}, κ of infinite width "
            f"{limit['largest'].mean(size):.3g}.",
        ],
        plots=[by_width, by_rank],
        tables=[Table(caption, headings.split("|"), rows)],
    )


def _network(problem: Problem, size: int) -> nn.Module:
    """Return a ReLU network in standard parameterisation, weights of variance 2/fan-in."""
    sizes = [problem.x.shape[1], *[size] * (problem.config.depth - 1), problem.outputs]
    activation = ntk.ACTIVATIONS[problem.config.activation]

    def layer(d_in: int, d_out: int) -> nn.Module:
        made = nn.Linear(d_in, d_out, bias=False)
        nn.init.normal_(made.weight, std=(2.0 / d_in) ** 0.5)
        return made

    with reproducible(problem.config.seed):
        return fully_connected(sizes, layer, activation.module).double().to(problem.x.device)
