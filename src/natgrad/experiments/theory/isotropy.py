"""Which structures are isotropic in function space, and at which width."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from natgrad import ntk
from natgrad.experiments.theory.methods import METHODS, damping_of
from natgrad.experiments.theory.results import Line, Panel, Plot, Section, Table
from natgrad.experiments.theory.setting import Setting
from natgrad.experiments.theory.width import slope, widths

__all__ = ["isotropy"]

DRAWS = 4
#: Samples whose coefficients are shown as an image.
SHOWN = 30
NAMES = ("full", "block_diagonal", "block_tridiagonal", "kfac", "unit_wise", "diagonal")


def isotropy(setting: Setting, progress: Callable[[float], None]) -> Section:
    """Run the section."""
    config = setting.config
    section = Section(
        "isotropy",
        "Isotropy",
        "Seen in function space, is a natural-gradient step a multiple α of the gradient with "
        "respect to the outputs? If so, 1/α is the learning rate that fits the data in one step.",
    )
    names = [name for name in NAMES if name in setting.structures or name == "diagonal"]
    sizes = widths(setting)
    deviations: dict[str, dict[int, list[float]]] = {name: {} for name in names}
    rows: list[list[str | int | float | None]] = []
    images = []
    for index, size in enumerate(sizes):
        for draw in range(DRAWS):
            model = setting.network(size, draw)
            for name in names:
                damping = 0.0 if name == "diagonal" else damping_of(name, model, setting.x)
                found = ntk.isotropy(model, setting.x, name, damping)
                deviations[name].setdefault(size, []).append(found.deviation)
                if size == sizes[-1] and draw == 0:
                    rows.append(_row(setting, name, found, size))
                    images.append(_image(METHODS[name].title, found))
        progress((index + 1) / len(sizes))
    # Exact structures deviate by rounding alone, which a logarithmic axis would blow up.
    lines = [
        Line(
            METHODS[name].title,
            [float(size) for size in values],
            [max(statistics.fmean(v), 1e-4) for v in values.values()],
            "both",
            name,
        )
        for name, values in deviations.items()
    ]
    section.plots = [
        Plot(
            "isotropy-width",
            "Deviation from isotropy against width",
            f"‖M − αI‖_F / ‖αI‖_F of the coefficients M = JF⁻¹Jᵀ/N at random weights, mean of "
            f"{DRAWS} draws; values below 1e-4 are drawn there. Layer-wise structures are "
            "isotropic as soon as each layer's Jacobian has full row rank; unit-wise ones become "
            "so like 1/√M; the entry-wise diagonal never does.",
            [Panel("deviation from αI", lines)],
            "width M",
            "relative deviation",
            True,
            True,
        ),
        Plot(
            "coefficients",
            "Coefficient matrices",
            f"M/α of the first {min(SHOWN, setting.samples * setting.outputs)} rows at width "
            f"{sizes[-1]}: the identity where the condition of fast convergence holds.",
            images,
        ),
    ]
    section.tables = [
        Table(
            f"Width {sizes[-1]}, depth {config.depth}, N = {setting.samples}.",
            ["structure", "α, theory", "α, measured", "deviation", "1/α", "largest stable η",
             "verdict"],
            rows,
        )
    ]  # fmt: skip
    diagonal = deviations["diagonal"]
    section.findings = [
        f"Unit-wise curvature deviates from isotropy like M^{slope(deviations['unit_wise']):.2f}; "
        "theory says −0.5.",
        "The diagonal stays away from isotropy: it deviates "
        f"{100 * statistics.fmean(diagonal[sizes[0]]):.0f} % at width {sizes[0]} and "
        f"{100 * statistics.fmean(diagonal[sizes[-1]]):.0f} % at width {sizes[-1]}.",
    ]
    return section


def _row(
    setting: Setting, name: str, found: ntk.Isotropy, size: int
) -> list[str | int | float | None]:
    alpha = None
    if name != "diagonal":
        alpha = setting.alpha(name, size)
    return [
        METHODS[name].title,
        alpha,
        found.alpha,
        found.deviation,
        found.learning_rate,
        found.largest_learning_rate,
        str(found),
    ]


def _image(title: str, found: ntk.Isotropy) -> Panel:
    part = found.coefficients[:SHOWN, :SHOWN] / found.alpha
    return Panel(title, image=torch.nan_to_num(part).tolist())
