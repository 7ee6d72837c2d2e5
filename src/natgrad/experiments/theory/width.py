"""What becomes exact as networks grow wider, and how fast."""

from __future__ import annotations

from collections.abc import Callable

import torch

from natgrad import ntk
from natgrad.experiments.theory.methods import METHODS
from natgrad.experiments.theory.problem import Problem
from natgrad.experiments.theory.results import ByWidth, Cell, Panel, Section, Table, plot_by_width

#: Draws of the random weights; kernels alone are cheap enough for more.
DRAWS, KERNEL_DRAWS = 4, 8
#: Gradient descent reaches its end in so many steps of 1/λ_max; natural gradients need fewer.
GD_STEPS, NGD_STEPS = 100, 8


def width(problem: Problem, progress: Callable[[float], None]) -> Section:
    """Wider networks.

    The theory is about infinite width. How fast do kernels, trained outputs and the loss after one
    step approach it, and how much does the Jacobian change on the way?
    """
    sizes, kernels = problem.widths, ByWidth()
    one_step = {name: ByWidth() for name in problem.structures}
    errors = {name: ByWidth() for name in ("gd", *problem.structures)}
    change = {name: ByWidth() for name in ("gd", "full")}
    limit = ntk.infinite_kernel(problem.network(), problem.x).total
    for size in problem.each_width(progress):
        for draw in range(KERNEL_DRAWS):
            model = problem.network(size, draw)
            kernel = ntk.empirical_kernel(model, problem.x, outputs="trace") / problem.outputs
            kernels.add(size, float((kernel - limit).norm() / limit.norm()))
            if draw >= DRAWS:
                continue
            infinite = ntk.InfiniteNetwork(model, problem.x, problem.x_test)
            for name in errors:
                lr = problem.full_rate(infinite, name, size)
                errors[name].add(size, _output_error(problem, model, infinite, name, lr))
                if name in one_step:
                    one_step[name].add(size, problem.train(model, name, lr, 1).train_loss[1])
            for name in change:
                change[name].add(size, _jacobian_change(problem, model, name))

    def by_method(title: str, values: dict[str, ByWidth], exponent: float) -> list[Panel]:
        lines = [quantity.line(METHODS[name].title, name) for name, quantity in values.items()]
        return [Panel(title, [*lines, values["full"].power_law(exponent)])]

    plots = [
        plot_by_width(
            "kernel-width",
            "The empirical kernel approaches the infinite-width kernel",
            f"Relative error in Frobenius norm at random weights, mean of {KERNEL_DRAWS} draws; "
            "the grey line falls like 1/√M.",
            [Panel("tangent kernel", [kernels.line("error"), kernels.power_law(-0.5)])],
            "relative error",
        ),
        plot_by_width(
            "prediction-width",
            "Trained outputs approach the predicted ones",
            "Distance of the outputs from the infinite-width prediction after one step at η = ½/α, "
            "relative to the residual before it; grey: 1/√M.",
            by_method("training outputs", errors, -0.5),
            "relative error",
        ),
        plot_by_width(
            "one-step-width",
            "Loss after one step at η = 1/α",
            "In the limit one step fits the data exactly; at finite width the loss left falls like "
            "1/M (grey), the square of the error of the outputs.",
            by_method("training loss after one step", one_step, -1.0),
            "training loss",
        ),
        plot_by_width(
            "jacobian-width",
            "The Jacobian changes less in wider networks",
            f"‖J(θ_t) − J(θ_0)‖_F / ‖J(θ_0)‖_F after {GD_STEPS} steps of gradient descent at "
            f"1/λ_max and {NGD_STEPS} of exact natural gradient descent at η = 1. For ReLU the "
            "change falls more slowly than 1/√M (grey), as a share of units changes sides.",
            by_method("change of the Jacobian", change, -0.5),
            "relative change",
        ),
    ]
    quantities = {
        "error of the tangent kernel": (kernels, "−½"),
        **{f"outputs after one step, {METHODS[n].title}": (v, "−½") for n, v in errors.items()},
        **{f"loss after one step, {METHODS[n].title}": (v, "−1") for n, v in one_step.items()},
        **{f"change of the Jacobian, {METHODS[n].title}": (v, "") for n, v in change.items()},
    }
    narrow, wide = sizes[0], sizes[-1]
    rows: list[list[Cell]] = [
        [name, theory, values.exponent(), values.mean(narrow), values.mean(wide)]
        for name, (values, theory) in quantities.items()
    ]
    headings = ["quantity", "theory", "fitted", f"at M = {narrow}", f"at M = {wide}"]
    fall = {name: values.mean(narrow) / values.mean(wide) for name, values in change.items()}
    return Section(
        findings=[
            f"The error of the tangent kernel falls like M^{kernels.exponent():.2f}; theory says "
            "−0.5.",
            f"The loss after one step of exact natural gradient descent falls like "
            f"M^{one_step['full'].exponent():.2f}; theory says −1.",
            f"From width {narrow} to {wide} the change of the Jacobian falls by a factor of "
            f"{fall['gd']:.1f} under gradient descent and {fall['full']:.1f} under exact natural "
            "gradient descent.",
        ],
        plots=plots,
        tables=[Table("Exponents of the width, fitted to all points of a curve.", headings, rows)],
    )


def _output_error(
    problem: Problem, model: ntk.MLP, infinite: ntk.InfiniteNetwork, name: str, lr: float
) -> float:
    """Return how far the outputs are from theory after one step at half a learning rate."""
    run = problem.train(model, name, 0.5 * lr, 1)
    with torch.no_grad():
        outputs = run.model(problem.x)
    residual = infinite.outputs - problem.y
    if name == "gd":
        expected = ntk.predict(infinite, problem.y, "gd", steps=[1], lr=0.5 * lr).train[0]
    else:
        expected = problem.y + 0.5 * residual
    return float((outputs - expected).norm() / residual.norm())


def _jacobian_change(problem: Problem, model: ntk.MLP, name: str) -> float:
    if name == "gd":
        kernel = ntk.empirical_kernel(model, problem.x) / problem.samples
        lr, steps = 1.0 / float(torch.linalg.eigvalsh(kernel)[-1]), GD_STEPS
    else:
        lr, steps = 1.0, NGD_STEPS
    stability = ntk.JacobianStability(model, problem.x)
    stability.model = problem.train(model, name, lr, steps).model
    return stability.measure().relative_change
