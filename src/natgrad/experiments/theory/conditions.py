"""The conditions of linear convergence, on the two-layer network they were proved for."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from natgrad import ntk
from natgrad.experiments.theory.methods import build_optimizer
from natgrad.experiments.theory.results import Line, Panel, Plot, Section, Table
from natgrad.experiments.theory.setting import Setting
from natgrad.experiments.theory.width import slope, widths

__all__ = ["conditions"]

STEPS = 12
#: Learning rate of exact natural gradient descent.
NGD_RATE = 0.5
#: A two-layer network is cheap, so that it can be so many times wider than the deep one.
WIDTH_FACTOR = 8
#: Widest network for K-FAC, which factorises a matrix of this size.
KFAC_WIDTH = 1024


def conditions(setting: Setting, progress: Callable[[float], None]) -> Section:
    """Run the section."""
    section = Section(
        "conditions",
        "Conditions and bounds",
        "Natural gradient descent converges linearly, whatever the conditioning of the kernel, if "
        "the Jacobian has full row rank and changes little (Zhang, Martens & Grosse 2019). Do the "
        "conditions hold for a two-layer ReLU network on these data, and what do the bounds say?",
    )
    x, y = setting.x, setting.y[:, :1]
    limit = ntk.two_layer_kernel(x)
    smallest = float(torch.linalg.eigvalsh(limit)[0])
    sizes = [WIDTH_FACTOR * size for size in widths(setting)]
    measured: dict[int, list[float]] = {}
    constants: dict[str, dict[int, list[float]]] = {"gd": {}, "full": {}}
    rows: list[list[str | int | float | None]] = []
    curves: list[Line] = []
    for index, size in enumerate(sizes):
        model = _network(setting, size)
        found = ntk.jacobian_conditions(model, x, kernel=limit)
        measured[size] = [found.smallest_eigenvalue]
        largest = found.largest_eigenvalue / setting.samples
        runs = {"gd": (1.0 / largest, 10 * STEPS), "full": (NGD_RATE, STEPS)}
        stable: dict[str, ntk.StabilityMeasurement] = {}
        for name, (lr, steps) in runs.items():
            losses, stability = _train(model, x, y, name, lr, steps)
            stable[name] = stability
            constants[name][size] = [stability.spectral_norm / found.smallest_eigenvalue**0.5]
            if size == sizes[-1]:
                curves += _curves(name, lr, losses[: STEPS + 1], found)
        rows.append(
            [
                size,
                found.rank,
                found.smallest_eigenvalue,
                found.largest_eigenvalue,
                stable["full"].spectral_norm / found.smallest_eigenvalue**0.5,
                stable["full"].constant,
                "yes" if stable["full"].stable else "no",
            ]
        )
        progress((index + 1) / len(sizes))
    curves += _kfac_curves(setting, sizes[-1], x, y)
    labels = torch.randn(y.shape, generator=torch.Generator().manual_seed(setting.config.seed))
    noise = (0.5 * labels.sign()).to(y)
    true_bound = ntk.generalization_bound(limit, y[:, 0])
    noise_bound = ntk.generalization_bound(limit, noise[:, 0])
    section.plots = [
        Plot(
            "gram-width",
            "Smallest eigenvalue of the Gram matrix",
            "Condition 1: markers, λ_min of JJᵀ at random weights; grey, its limit of infinite "
            "width. It is positive unless samples are the same.",
            [
                Panel(
                    "λ_min(G)",
                    [
                        _by_width("measured", measured, "full", "both"),
                        Line(
                            "infinite width",
                            [float(sizes[0]), float(sizes[-1])],
                            [smallest] * 2,
                            "reference",
                        ),
                    ],
                )
            ],
            "width m",
            "smallest eigenvalue",
            True,
            False,
        ),
        Plot(
            "stability-width",
            "Change of the Jacobian along training",
            "Condition 2: δ = ‖J(w) − J(w₀)‖₂/√λ_min(G(w₀)) at the end of training. The theorem "
            "needs δ < 1/5 (grey) all along.",
            [
                Panel(
                    "δ",
                    [
                        _by_width("Gradient descent", constants["gd"], "gd", "both"),
                        _by_width("Exact NGD", constants["full"], "full", "both"),
                        Line("1/5", [float(sizes[0]), float(sizes[-1])], [0.2, 0.2], "reference"),
                    ],
                )
            ],
            "width m",
            "relative change",
            True,
            True,
        ),
        Plot(
            "rates",
            "Linear rates, bound and measured",
            f"Two-layer network of width {sizes[-1]}. Lines: the bounds on the training loss, for "
            "gradient descent and K-FAC those of the linearised network. Markers: the loss. "
            "Natural gradients forget the conditioning of the kernel, gradient descent does not.",
            [Panel("training loss", curves)],
            "step",
            "½‖f − y‖², mean",
            y_log=True,
        ),
    ]
    section.tables = [
        Table(
            f"Two-layer ReLU network, N = {setting.samples}; infinite width: λ_min = "
            f"{smallest:.3g}.",
            ["width", "rank J", "λ_min(G)", "λ_max(G)", "δ of NGD", "C = 2δ/(1 − δ)", "C < ½"],
            rows,
        ),
        Table(
            "Bound on the population loss of a 1-Lipschitz loss, √(2 yᵀ(G∞)⁻¹y/n); 1 or more says "
            "nothing.",
            ["labels", "bound"],
            [["true", true_bound], ["random", noise_bound]],
        ),
    ]
    last = rows[-1]
    section.findings = [
        str(ntk.jacobian_conditions(_network(setting, sizes[-1]), x)),
        f"The change of the Jacobian under natural gradient descent falls like "
        f"m^{slope(constants['full']):.2f} (theory for ReLU: −0.25); at width {sizes[-1]} "
        + (
            "condition 2 holds."
            if last[6] == "yes"
            else "condition 2, which is sufficient but not necessary, does not hold yet, and "
            "training converges at the predicted rate all the same."
        ),
        f"The generalisation bound is {true_bound:.2f} for the true labels and {noise_bound:.2f} "
        "for random ones.",
    ]
    if setting.outputs > 1:
        section.findings.append("The two-layer network has one output: only the first is learnt.")
    return section


def _network(setting: Setting, size: int) -> ntk.TwoLayerNetwork:
    generator = torch.Generator().manual_seed(setting.config.seed)
    return ntk.TwoLayerNetwork(
        setting.x.shape[1],
        size,
        generator=generator,
        dtype=torch.float64,
        device=setting.x.device,
    )


def _train(
    model: ntk.TwoLayerNetwork, x: Tensor, y: Tensor, name: str, lr: float, steps: int
) -> tuple[list[float], ntk.StabilityMeasurement]:
    """Train a copy and measure how far its Jacobian went."""
    model = copy.deepcopy(model)
    stability = ntk.JacobianStability(model, x, y)
    optimizer = build_optimizer(name, model, lr, 0.0)
    losses = []
    for step in range(steps + 1):
        loss = 0.5 * (model(x) - y).square().sum() / len(x)
        losses.append(float(loss.detach()))
        if step < steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return losses, stability.measure()


def _curves(name: str, lr: float, losses: list[float], found: ntk.JacobianConditions) -> list[Line]:
    """Return the measured losses and what the bound on them is."""
    steps = [float(step) for step in range(len(losses))]
    if name == "full":
        factor, title = 1.0 - lr, f"Exact NGD, η = {lr:g}"
    else:
        rate = lr * found.smallest_eigenvalue / found.samples
        factor, title = (1.0 - rate) ** 2, "Gradient descent, η = 1/λ_max"
    bound = [losses[0] * factor**step for step in steps]
    return [Line(title, steps, bound, "line", name), Line("", steps, losses, "markers", name)]


def _kfac_curves(setting: Setting, size: int, x: Tensor, y: Tensor) -> list[Line]:
    bounds = ntk.convergence_bounds(method="kfac", inputs=x)
    lr = 0.5 * bounds.step_size
    factor = ntk.convergence_bounds(method="kfac", inputs=x, step_size=lr).factor
    size = min(size, KFAC_WIDTH)
    losses, _ = _train(_network(setting, size), x, y, "kfac", lr, STEPS)
    steps = [float(step) for step in range(len(losses))]
    bound = [losses[0] * factor**step for step in steps]
    title = f"K-FAC, η = {lr:.3g}, width {size}"
    return [Line(title, steps, bound, "line", "kfac"), Line("", steps, losses, "markers", "kfac")]


def _by_width(label: str, values: dict[int, list[float]], method: str, style: str) -> Line:
    means = [statistics.fmean(v) for v in values.values()]
    return Line(
        label, [float(s) for s in values], [m if m > 0 else math.nan for m in means], style, method
    )
