"""Predicted curves beside trained networks, at η = 1/α and at other learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from natgrad import ntk
from natgrad.experiments.theory.methods import METHODS, damping_of
from natgrad.experiments.theory.problem import Problem
from natgrad.experiments.theory.results import Cell, Panel, Plot, Section, Table

STEPS = 8
FACTORS = (0.25, 0.5, 1.0, 1.5, 1.9, 2.5)
"""Learning rates in units of 1/α."""

#: Losses below rounding are drawn here.
FLOOR = 1e-16


@dataclass(frozen=True)
class _Theory:
    """What theory says of one method on one network: in the limit of infinite width.

    The optimizer's damping is there for rounding only, and 0 in the limit. The learning rate is
    1/α, for gradient descent, which has no α, 1/λ_max.
    """

    network: ntk.NetworkInFunctionSpace
    lr: float
    alpha: float | None
    damping: float = 0.0


def dynamics(problem: Problem, progress: Callable[[float], None]) -> Section:
    """Training curves, predicted and trained.

    Does a wide network follow the curves of its infinite-width limit, for gradient descent and for
    natural gradient descent with each approximate Fisher matrix?
    """
    config, model = problem.config, problem.network()
    theories = _theories(problem, model)
    curves = {name: Panel(f"{name} loss") for name in ("training", "test")}
    rate_panels: list[Panel] = []
    rows: list[list[Cell]] = []
    converged: list[str] = []
    for name, theory in theories.items():
        title = METHODS[name].title
        panel = Panel(title)
        rate_panels.append(panel)
        for index, factor in enumerate(FACTORS, start=1):
            lr = factor * theory.lr
            predicted = ntk.predict(
                theory.network, problem.y, name, steps=STEPS, lr=lr, damping=theory.damping
            )
            run = problem.train(model, name, lr, STEPS)
            losses = [_at_least_floor(loss) for loss in predicted.train_loss.tolist()]
            measured = [_at_least_floor(loss) for loss in run.train_loss]
            label = f"η = {factor:g}/α" if theory.alpha else f"η = {factor:g}/λ_max"
            panel.compare(label, losses, measured, f"rate {factor:g}")
            if factor > 2 and run.train_loss[-1] < 1e-2 * run.train_loss[0]:
                converged.append(title)
            if factor == 1.0:
                test = predicted.test_loss(problem.y_test).tolist()
                curves["training"].compare(title, losses, measured, name)
                curves["test"].compare(title, test, run.test_loss, name)
                expected, trained = predicted.train_loss[1:3].tolist(), run.train_loss[1:4]
                ends = test[-1], run.test_loss[-1]
                rows.append([title, theory.alpha, theory.lr, *expected, *trained, *ends])
                first = run.train_loss[0]
            done = (len(rate_panels) - 1) * len(FACTORS) + index
            progress(done / (len(theories) * len(FACTORS)))
    width = f"width {config.width}, depth {config.depth}, N = {problem.samples}"
    plots = [
        Plot(
            "dynamics",
            "Training at η = 1/α",
            "Lines: prediction of the infinite-width limit (unit-wise: of the linearised network). "
            f"Markers: networks of {width}, trained by natgrad's optimizers. Natural gradients fit "
            "the data in one predicted step; what is left after it is the finite width. Losses "
            "below 1e-16 are rounding and drawn there.",
            [*curves.values()],
            "step",
            "½‖f − y‖², mean",
            y_log=True,
        ),
        Plot(
            "learning-rates",
            "Learning rates in units of 1/α",
            "Training loss at fractions and multiples of 1/α (gradient descent: of 1/λ_max); lines "
            "predicted, markers trained. Below 2 every method converges, by |1 − ηα| per step; "
            "above 2 the prediction grows without bound, and the network, once it has left the "
            "linear regime, hovers at a high loss or leaves it too.",
            rate_panels,
            "step",
            "training loss",
            y_log=True,
        ),
        _cross_entropy(problem, model, theories),
    ]
    headings = (
        "method|α|η|predicted, step 1|step 2|trained, step 1|step 2|step 3|test predicted, step "
        f"{STEPS}|test trained"
    )
    exact = next(row for row in rows if row[0] == METHODS["full"].title)
    findings = [
        f"Exact natural gradient descent with η = 1 takes the training loss from "
        f"{first:.3g} to {exact[5]:.2g} in one step and to {exact[6]:.2g} in two.",
        f"No method fits the data at {max(FACTORS):g}/α, beyond the limit 2/α."
        if not converged
        else f"At {max(FACTORS):g}/α, beyond the limit 2/α of the linearised network, "
        f"{', '.join(converged)} still converge at this width: the step leaves the linear regime.",
    ]
    if config.depth % 3 == 2:
        findings.append(
            f"The block tri-diagonal matrix of {config.depth} = 3s + 2 layers is singular, so it "
            "has no α and is left out."
        )
    caption = f"At η = 1/α, {width}. Loss before training: {first:.3g}."
    return Section(
        findings=findings, plots=plots, tables=[Table(caption, headings.split("|"), rows)]
    )


def _cross_entropy(problem: Problem, model: nn.Module, theories: dict[str, _Theory]) -> Plot:
    """Predict and train with cross-entropy, at the learning rates of the squared loss."""
    panel, likelihood = Panel("cross-entropy"), problem.cross_entropy
    for name, theory in theories.items():
        if name == "unit_wise":  # It has no map for this loss in the limit.
            continue
        lr = None if name == "gd" else theory.lr
        predicted = ntk.predict(
            theory.network, problem.labels, name, steps=STEPS, lr=lr, likelihood=likelihood
        )
        run = problem.train(model, name, predicted.learning_rate, STEPS, likelihood=likelihood)
        panel.compare(METHODS[name].title, predicted.train_loss.tolist(), run.train_loss, name)
    return Plot(
        "cross-entropy",
        "Training with cross-entropy",
        "The same with cross-entropy: lines are iterated in function space with the output Hessian "
        "at the predicted outputs. Natural gradients take Newton steps on the outputs, each of "
        "which divides the loss by about e.",
        [panel],
        "step",
        "training loss",
        y_log=True,
    )


def _theories(problem: Problem, model: ntk.MLP) -> dict[str, _Theory]:
    infinite = ntk.InfiniteNetwork(model, problem.x, problem.x_test)
    result = {"gd": _Theory(infinite, problem.full_rate(infinite, "gd"), None)}
    for name in problem.structures:
        result[name] = _Theory(infinite, problem.full_rate(infinite, name), problem.alpha(name))
    linearized = ntk.LinearizedNetwork(model, problem.x, problem.x_test)
    damping = damping_of("unit_wise", model, problem.x)  # Whose limit has no closed form.
    result["unit_wise"] = replace(result["unit_wise"], network=linearized, damping=damping)
    return result


def _at_least_floor(loss: float) -> float:
    return max(loss, FLOOR) if math.isfinite(loss) else math.nan
