"""Which structures are isotropic in function space, and at which width."""

from __future__ import annotations

from collections.abc import Callable

import torch

from natgrad import ntk
from natgrad.experiments.theory.by_width import ByWidth, plot_by_width
from natgrad.experiments.theory.methods import METHODS
from natgrad.experiments.theory.problem import Problem
from natgrad.experiments.theory.results import Cell, Panel, Plot, Section, Table

DRAWS = 4
#: Samples whose coefficients are shown as an image.
SHOWN = 30
NAMES = ("full", "block_diagonal", "block_tridiagonal", "kfac", "unit_wise", "diagonal")


def isotropy(problem: Problem, progress: Callable[[float], None]) -> Section:
    """Run the section."""
    config = problem.config
    section = Section(
        "isotropy",
        "Isotropy",
        "Seen in function space, is a natural-gradient step a multiple α of the gradient with "
        "respect to the outputs? If so, 1/α is the learning rate that fits the data in one step.",
    )
    names = [name for name in NAMES if name in problem.structures or name == "diagonal"]
    sizes = problem.widths
    deviations = {name: ByWidth() for name in names}
    rows: list[list[Cell]] = []
    images = []
    for index, size in enumerate(sizes):
        for draw in range(DRAWS):
            model = problem.network(size, draw)
            for name in names:
                found = problem.isotropy(model, name)
                deviations[name].add(size, found.deviation)
                if size == sizes[-1] and draw == 0:
                    rows.append(_row(problem, name, found, size))
                    part = torch.nan_to_num(found.coefficients[:SHOWN, :SHOWN] / found.alpha)
                    images.append(Panel(METHODS[name].title, image=part.tolist()))
        progress((index + 1) / len(sizes))
    lines = [values.line(METHODS[name].title, name) for name, values in deviations.items()]
    for line in lines:  # Rounding alone, which a logarithmic axis would blow up.
        line.y = [max(deviation, 1e-4) for deviation in line.y]
    section.plots = [
        plot_by_width(
            "isotropy-width",
            "Deviation from isotropy against width",
            f"‖M − αI‖_F / ‖αI‖_F of the coefficients M = JF⁻¹Jᵀ/N at random weights, mean of "
            f"{DRAWS} draws; values below 1e-4 are drawn there. Layer-wise structures are "
            "isotropic as soon as each layer's Jacobian has full row rank; unit-wise ones become "
            "so like 1/√M; the entry-wise diagonal never does.",
            [Panel("deviation from αI", lines)],
            "relative deviation",
        ),
        Plot(
            "coefficients",
            "Coefficient matrices",
            f"M/α of the first {min(SHOWN, problem.samples * problem.outputs)} rows at width "
            f"{sizes[-1]}: the identity where the condition of fast convergence holds.",
            images,
        ),
    ]
    section.tables = [
        Table(
            f"Width {sizes[-1]}, depth {config.depth}, N = {problem.samples}.",
            ["structure", "α, theory", "α, measured", "deviation", "1/α", "largest stable η",
             "verdict"],
            rows,
        )
    ]  # fmt: skip
    diagonal, unit_wise = deviations["diagonal"], deviations["unit_wise"]
    section.findings = [
        f"Unit-wise curvature deviates from isotropy like M^{unit_wise.exponent():.2f}; "
        "theory says −0.5.",
        "The diagonal stays away from isotropy: it deviates "
        f"{100 * diagonal.mean(sizes[0]):.0f} % at width {sizes[0]} and "
        f"{100 * diagonal.mean(sizes[-1]):.0f} % at width {sizes[-1]}.",
    ]
    return section


def _row(problem: Problem, name: str, found: ntk.Isotropy, size: int) -> list[Cell]:
    return [
        METHODS[name].title,
        None if name == "diagonal" else problem.alpha(name, size),
        found.alpha,
        found.deviation,
        found.learning_rate,
        found.largest_learning_rate,
        str(found),
    ]
