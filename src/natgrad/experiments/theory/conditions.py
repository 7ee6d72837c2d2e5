"""The conditions of linear convergence, on the two-layer network they were proved for."""

from __future__ import annotations

from collections.abc import Callable

import torch

from natgrad import ntk
from natgrad.experiments.theory.by_width import ByWidth, plot_by_width
from natgrad.experiments.theory.problem import Problem
from natgrad.experiments.theory.results import Cell, Line, Panel, Plot, Section, Table

STEPS = 12
#: Learning rate of exact natural gradient descent.
NGD_RATE = 0.5
#: A two-layer network is cheap, so that it can be so many times wider than the deep one.
WIDTH_FACTOR = 8
#: Widest network for K-FAC, which factorises a matrix of this size.
KFAC_WIDTH = 1024


def conditions(problem: Problem, progress: Callable[[float], None]) -> Section:
    """Run the section."""
    section = Section(
        "conditions",
        "Conditions and bounds",
        "Natural gradient descent converges linearly, whatever the conditioning of the kernel, if "
        "the Jacobian has full row rank and changes little (Zhang, Martens & Grosse 2019). Do the "
        "conditions hold for a two-layer ReLU network on these data, and what do the bounds say?",
    )
    if problem.outputs > 1:
        section.findings.append("The two-layer network has one output: only the first is learnt.")
        problem = problem.first_output()
    x, y = problem.x, problem.y
    limit = ntk.two_layer_kernel(x)
    smallest = float(torch.linalg.eigvalsh(limit)[0])
    sizes = [WIDTH_FACTOR * size for size in problem.widths]
    eigenvalues = ByWidth()
    changes = {"gd": ByWidth(), "full": ByWidth()}
    rows: list[list[Cell]] = []
    losses = Panel("training loss")
    for index, size in enumerate(sizes):
        model = _network(problem, size)
        found = ntk.jacobian_conditions(model, x, kernel=limit)
        eigenvalues.add(size, found.smallest_eigenvalue)
        largest = found.largest_eigenvalue / problem.samples
        runs = {"gd": (1.0 / largest, 10 * STEPS), "full": (NGD_RATE, STEPS)}
        for name, (lr, steps) in runs.items():
            stability = ntk.JacobianStability(model, x, y)
            run = problem.train(model, name, lr, steps)
            stability.model = run.model
            stable = stability.measure()
            change = stable.spectral_norm / found.smallest_eigenvalue**0.5
            changes[name].add(size, change)
            if size == sizes[-1]:
                _add_bound(losses, name, lr, run.train_loss[: STEPS + 1], found)
        rows.append(
            [
                size,
                found.rank,
                found.smallest_eigenvalue,
                found.largest_eigenvalue,
                change,
                stable.constant,
                "yes" if stable.stable else "no",
            ]
        )
        progress((index + 1) / len(sizes))
    _add_kfac_bound(losses, problem, sizes[-1])
    labels = torch.randn(y.shape, generator=torch.Generator().manual_seed(problem.config.seed))
    noise = (0.5 * labels.sign()).to(y)
    true_bound = ntk.generalization_bound(limit, y[:, 0])
    noise_bound = ntk.generalization_bound(limit, noise[:, 0])
    section.plots = [
        plot_by_width(
            "gram-width",
            "Smallest eigenvalue of the Gram matrix",
            "Condition 1: markers, λ_min of JJᵀ at random weights; grey, its limit of infinite "
            "width. It is positive unless samples are the same.",
            [
                Panel(
                    "λ_min(G)",
                    [
                        eigenvalues.line("measured", "full"),
                        Line.level("infinite width", smallest, sizes),
                    ],
                )
            ],
            "smallest eigenvalue",
            x_label="width m",
            y_log=False,
        ),
        plot_by_width(
            "stability-width",
            "Change of the Jacobian along training",
            "Condition 2: δ = ‖J(w) − J(w₀)‖₂/√λ_min(G(w₀)) at the end of training. The theorem "
            "needs δ < 1/5 (grey) all along.",
            [
                Panel(
                    "δ",
                    [
                        changes["gd"].line("Gradient descent", "gd"),
                        changes["full"].line("Exact NGD", "full"),
                        Line.level("1/5", 0.2, sizes),
                    ],
                )
            ],
            "relative change",
            x_label="width m",
        ),
        Plot(
            "rates",
            "Linear rates, bound and measured",
            f"Two-layer network of width {sizes[-1]}. Lines: the bounds on the training loss, for "
            "gradient descent and K-FAC those of the linearised network. Markers: the loss. "
            "Natural gradients forget the conditioning of the kernel, gradient descent does not.",
            [losses],
            "step",
            "½‖f − y‖², mean",
            y_log=True,
        ),
    ]
    section.tables = [
        Table(
            f"Two-layer ReLU network, N = {problem.samples}; infinite width: λ_min = "
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
    findings = [
        str(ntk.jacobian_conditions(_network(problem, sizes[-1]), x)),
        f"The change of the Jacobian under natural gradient descent falls like "
        f"m^{changes['full'].exponent():.2f} (theory for ReLU: −0.25); at width {sizes[-1]} "
        + (
            "condition 2 holds."
            if stable.stable
            else "condition 2, which is sufficient but not necessary, does not hold yet, and "
            "training converges at the predicted rate all the same."
        ),
        f"The generalisation bound is {true_bound:.2f} for the true labels and {noise_bound:.2f} "
        "for random ones.",
    ]
    section.findings = findings + section.findings
    return section


def _network(problem: Problem, size: int) -> ntk.TwoLayerNetwork:
    generator = torch.Generator().manual_seed(problem.config.seed)
    return ntk.TwoLayerNetwork(
        problem.x.shape[1],
        size,
        generator=generator,
        dtype=torch.float64,
        device=problem.x.device,
    )


def _add_bound(
    panel: Panel, name: str, lr: float, losses: list[float], found: ntk.JacobianConditions
) -> None:
    """Add the losses of a method and what the bound on them is."""
    if name == "full":
        factor, title = 1.0 - lr, f"Exact NGD, η = {lr:g}"
    else:
        rate = lr * found.smallest_eigenvalue / found.samples
        factor, title = (1.0 - rate) ** 2, "Gradient descent, η = 1/λ_max"
    panel.compare(title, [losses[0] * factor**step for step in range(len(losses))], losses, name)


def _add_kfac_bound(panel: Panel, problem: Problem, size: int) -> None:
    size = min(size, KFAC_WIDTH)
    lr = 0.5 * ntk.convergence_bounds(method="kfac", inputs=problem.x).step_size
    factor = ntk.convergence_bounds(method="kfac", inputs=problem.x, step_size=lr).factor
    losses = problem.train(_network(problem, size), "kfac", lr, STEPS, damping=0.0).train_loss
    bound = [losses[0] * factor**step for step in range(len(losses))]
    panel.compare(f"K-FAC, η = {lr:.3g}, width {size}", bound, losses, "kfac")
