"""The conditions of linear convergence, on the two-layer network they were proved for."""

from __future__ import annotations

from collections.abc import Callable

import torch

from natgrad import ntk
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

STEPS = 12
#: Learning rate of exact natural gradient descent.
NGD_RATE = 0.5
#: A two-layer network is cheap, so that it can be so many times wider than the deep one.
WIDTH_FACTOR = 8
#: Widest network for K-FAC, which factorises a matrix of this size.
KFAC_WIDTH = 1024


def conditions(problem: Problem, progress: Callable[[float], None]) -> Section:
    """Conditions and bounds.

    Natural gradient descent converges linearly, whatever the conditioning of the kernel, if the
    Jacobian has full row rank and changes little (Zhang, Martens & Grosse 2019). Do the conditions
    hold for a two-layer ReLU network on these data, and what do the bounds say?
    """
    notes = []
    if problem.outputs > 1:
        notes = ["The two-layer network has one output: only the first is learnt."]
        problem = problem.first_output()
    x, y = problem.x, problem.y
    limit = ntk.two_layer_kernel(x)
    smallest = float(torch.linalg.eigvalsh(limit)[0])
    sizes = [WIDTH_FACTOR * size for size in problem.widths]
    eigenvalues, changes = ByWidth(), {"gd": ByWidth(), "full": ByWidth()}
    rows: list[list[Cell]] = []
    losses = Panel("training loss")
    for size in problem.each_width(progress, WIDTH_FACTOR):
        model = _network(problem, size)
        found = ntk.jacobian_conditions(model, x, kernel=limit)
        eigenvalues.add(size, found.smallest_eigenvalue)
        # A step of gradient descent leaves of the loss what the least eigenvalue lets it.
        rate = 1.0 / (found.largest_eigenvalue / problem.samples)
        slow = (1.0 - rate * found.smallest_eigenvalue / found.samples) ** 2
        for name, lr, steps, factor, title in (
            ("gd", rate, 10 * STEPS, slow, "Gradient descent, η = 1/λ_max"),
            ("full", NGD_RATE, STEPS, 1.0 - NGD_RATE, f"Exact NGD, η = {NGD_RATE:g}"),
        ):
            stability = ntk.JacobianStability(model, x, y)
            run = problem.train(model, name, lr, steps)
            stability.model = run.model
            stable = stability.measure()
            change = stable.spectral_norm / found.smallest_eigenvalue**0.5
            changes[name].add(size, change)
            if size == sizes[-1]:
                _add_bound(losses, title, name, factor, run.train_loss[: STEPS + 1])
        eigen = found.rank, found.smallest_eigenvalue, found.largest_eigenvalue
        rows.append([size, *eigen, change, stable.constant, "yes" if stable.stable else "no"])
    narrow = min(size, KFAC_WIDTH)
    lr = 0.5 * ntk.convergence_bounds(method="kfac", inputs=x).step_size
    factor = ntk.convergence_bounds(method="kfac", inputs=x, step_size=lr).factor
    run = problem.train(_network(problem, narrow), "kfac", lr, STEPS, damping=0.0)
    _add_bound(losses, f"K-FAC, η = {lr:.3g}, width {narrow}", "kfac", factor, run.train_loss)
    labels = torch.randn(y.shape, generator=torch.Generator().manual_seed(problem.config.seed))
    noise = (0.5 * labels.sign()).to(y)
    true_bound, noise_bound = (ntk.generalization_bound(limit, one[:, 0]) for one in (y, noise))
    level = Line.level("infinite width", smallest, sizes)
    lines = changes["gd"].line("Gradient descent", "gd"), changes["full"].line("Exact NGD", "full")
    plots = [
        plot_by_width(
            "gram-width",
            "Smallest eigenvalue of the Gram matrix",
            "Condition 1: markers, λ_min of JJᵀ at random weights; grey, its limit of infinite "
            "width. It is positive unless samples are the same.",
            [Panel("λ_min(G)", [eigenvalues.line("measured", "full"), level])],
            "smallest eigenvalue",
            x_label="width m",
            y_log=False,
        ),
        plot_by_width(
            "stability-width",
            "Change of the Jacobian along training",
            "Condition 2: δ = ‖J(w) − J(w₀)‖₂/√λ_min(G(w₀)) at the end of training. The theorem "
            "needs δ < 1/5 (grey) all along.",
            [Panel("δ", [*lines, Line.level("1/5", 0.2, sizes)])],
            "relative change",
            x_label="width m",
        ),
        Plot(
            "rates",
            "Linear rates, bound and measured",
            f"Two-layer network of width {size}. Lines: the bounds on the training loss, for "
            "gradient descent and K-FAC those of the linearised network. Markers: the loss. "
            "Natural gradients forget the conditioning of the kernel, gradient descent does not.",
            [losses],
            "step",
            "½‖f − y‖², mean",
            y_log=True,
        ),
    ]
    title = (
        f"Two-layer ReLU network, N = {problem.samples}; infinite width: λ_min = {smallest:.3g}."
    )
    headings = "width|rank J|λ_min(G)|λ_max(G)|δ of NGD|C = 2δ/(1 − δ)|C < ½".split("|")
    bounds = (
        "Bound on the population loss of a 1-Lipschitz loss, √(2 yᵀ(G∞)⁻¹y/n); 1 or more says "
        "nothing."
    )
    holds = (
        "condition 2 holds."
        if stable.stable
        else "condition 2, which is sufficient but not necessary, does not hold yet, and training "
        "converges at the predicted rate all the same."
    )
    return Section(
        findings=[
            str(ntk.jacobian_conditions(model, x)),
            f"The change of the Jacobian under natural gradient descent falls like "
            f"m^{changes['full'].exponent():.2f} (theory for ReLU: −0.25); at width {size} {holds}",
            f"The generalisation bound is {true_bound:.2f} for the true labels and "
            f"{noise_bound:.2f} for random ones.",
            *notes,
        ],
        plots=plots,
        tables=[
            Table(title, headings, rows),
            Table(bounds, ["labels", "bound"], [["true", true_bound], ["random", noise_bound]]),
        ],
    )


def _network(problem: Problem, size: int) -> ntk.TwoLayerNetwork:
    x, generator = problem.x, torch.Generator().manual_seed(problem.config.seed)
    return ntk.TwoLayerNetwork(
        x.shape[1], size, generator=generator, dtype=torch.float64, device=x.device
    )


def _add_bound(panel: Panel, title: str, name: str, factor: float, losses: list[float]) -> None:
    """Add losses, and the first of them times a factor at every step."""
    panel.compare(title, [losses[0] * factor**step for step in range(len(losses))], losses, name)
