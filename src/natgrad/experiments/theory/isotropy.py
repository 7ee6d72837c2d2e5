"""Which structures are isotropic in function space, and at which width."""

from __future__ import annotations

from collections.abc import Callable

import torch

from natgrad.experiments.theory.methods import METHODS
from natgrad.experiments.theory.problem import Problem
from natgrad.experiments.theory.results import (
    ByWidth,
    Cell,
    Panel,
    Plot,
    Section,
    Table,
    plot_by_width,
)

DRAWS = 4
#: Samples whose coefficients are shown as an image.
SHOWN = 30


def isotropy(problem: Problem, progress: Callable[[float], None]) -> Section:
    """Isotropy.

    Seen in function space, is a natural-gradient step a multiple α of the gradient with respect to
    the outputs? If so, 1/α is the learning rate that fits the data in one step.
    """
    names, sizes = [*problem.structures, "diagonal"], problem.widths
    deviations = {name: ByWidth() for name in names}
    rows: list[list[Cell]] = []
    images = []
    for size in problem.each_width(progress):
        for draw in range(DRAWS):
            model = problem.network(size, draw)
            for name in names:
                found, title = problem.isotropy(model, name), METHODS[name].title
                deviations[name].add(size, found.deviation)
                if size == sizes[-1] and draw == 0:
                    alpha = None if name == "diagonal" else problem.alpha(name, size)
                    rates = found.learning_rate, found.largest_learning_rate
                    row = [title, alpha, found.alpha, found.deviation, *rates, str(found)]
                    rows.append(row)
                    part = torch.nan_to_num(found.coefficients[:SHOWN, :SHOWN] / found.alpha)
                    images.append(Panel(title, image=part.tolist()))
    lines = [values.line(METHODS[name].title, name) for name, values in deviations.items()]
    for line in lines:  # Rounding alone, which a logarithmic axis would blow up.
        line.y = [max(deviation, 1e-4) for deviation in line.y]
    by_width = plot_by_width(
        "isotropy-width",
        "Deviation from isotropy against width",
        f"‖M − αI‖_F / ‖αI‖_F of the coefficients M = JF⁻¹Jᵀ/N at random weights, mean of {DRAWS} "
        "draws; values below 1e-4 are drawn there. Layer-wise structures are isotropic as soon as "
        "each layer's Jacobian has full row rank; unit-wise ones become so like 1/√M; the "
        "entry-wise diagonal never does.",
        [Panel("deviation from αI", lines)],
        "relative deviation",
    )
    coefficients = Plot(
        "coefficients",
        "Coefficient matrices",
        f"M/α of the first {min(SHOWN, problem.samples * problem.outputs)} rows at width "
        f"{sizes[-1]}: the identity where the condition of fast convergence holds.",
        images,
    )
    title = f"Width {sizes[-1]}, depth {problem.config.depth}, N = {problem.samples}."
    headings = "structure|α, theory|α, measured|deviation|1/α|largest stable η|verdict"
    narrow, wide = (100 * deviations["diagonal"].mean(size) for size in (sizes[0], sizes[-1]))
    return Section(
        findings=[
            "Unit-wise curvature deviates from isotropy like "
            f"M^{deviations['unit_wise'].exponent():.2f}; theory says −0.5.",
            f"The diagonal stays away from isotropy: it deviates {narrow:.0f} % at width "
            f"{sizes[0]} and {wide:.0f} % at width {sizes[-1]}.",
        ],
        plots=[by_width, coefficients],
        tables=[Table(title, headings.split("|"), rows)],
    )
