"""What becomes exact as networks grow wider, and how fast."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

import torch

from natgrad import ntk
from natgrad.experiments.theory.methods import METHODS, damping_of
from natgrad.experiments.theory.results import Line, Panel, Plot, Section, Table
from natgrad.experiments.theory.setting import Setting, train

__all__ = ["slope", "widths", "width"]

#: Draws of the random weights; kernels alone are cheap enough for more.
DRAWS, KERNEL_DRAWS = 4, 8
#: Gradient descent reaches its end in so many steps of 1/λ_max; natural gradients need fewer.
GD_STEPS, NGD_STEPS = 100, 8


def width(setting: Setting, progress: Callable[[float], None]) -> Section:
    """Run the section."""
    section = Section(
        "width",
        "Wider networks",
        "The theory is about infinite width. How fast do kernels, trained outputs and the loss "
        "after one step approach it, and how much does the Jacobian change on the way?",
    )
    sizes = widths(setting)
    kernels: dict[int, list[float]] = {}
    one_step: dict[str, dict[int, list[float]]] = {name: {} for name in setting.structures}
    errors: dict[str, dict[int, list[float]]] = {name: {} for name in ("gd", *setting.structures)}
    change: dict[str, dict[int, list[float]]] = {"gd": {}, "full": {}}
    limit = ntk.infinite_kernel(setting.network(), setting.x).total
    for index, size in enumerate(sizes):
        for draw in range(KERNEL_DRAWS):
            model = setting.network(size, draw)
            kernel = ntk.empirical_kernel(model, setting.x, outputs="trace") / setting.outputs
            kernels.setdefault(size, []).append(float((kernel - limit).norm() / limit.norm()))
            if draw >= DRAWS:
                continue
            infinite = ntk.InfiniteNetwork(model, setting.x, setting.x_test)
            for name in errors:
                _one_step(setting, model, infinite, name, size, errors, one_step)
            for name in change:
                change[name].setdefault(size, []).append(_jacobian_change(setting, model, name))
        progress((index + 1) / len(sizes))
    section.plots = [
        Plot(
            "kernel-width",
            "The empirical kernel approaches the infinite-width kernel",
            f"Relative error in Frobenius norm at random weights, mean of {KERNEL_DRAWS} draws; "
            "the grey line falls like 1/√M.",
            [Panel("tangent kernel", [_curve("error", kernels, ""), _guide(kernels, -0.5)])],
            "width M",
            "relative error",
            True,
            True,
        ),
        Plot(
            "prediction-width",
            "Trained outputs approach the predicted ones",
            "Distance of the outputs from the infinite-width prediction after one step at η = ½/α, "
            "relative to the residual before it; grey: 1/√M.",
            [
                Panel(
                    "training outputs",
                    [
                        *[_curve(METHODS[n].title, v, n) for n, v in errors.items()],
                        _guide(errors["full"], -0.5),
                    ],
                )
            ],
            "width M",
            "relative error",
            True,
            True,
        ),
        Plot(
            "one-step-width",
            "Loss after one step at η = 1/α",
            "In the limit one step fits the data exactly; at finite width the loss left falls like "
            "1/M (grey), the square of the error of the outputs.",
            [
                Panel(
                    "training loss after one step",
                    [
                        *[_curve(METHODS[n].title, v, n) for n, v in one_step.items()],
                        _guide(one_step["full"], -1.0),
                    ],
                )
            ],
            "width M",
            "training loss",
            True,
            True,
        ),
        Plot(
            "jacobian-width",
            "The Jacobian changes less in wider networks",
            f"‖J(θ_t) − J(θ_0)‖_F / ‖J(θ_0)‖_F after {GD_STEPS} steps of gradient descent at "
            f"1/λ_max and {NGD_STEPS} of exact natural gradient descent at η = 1. For ReLU the "
            "change falls more slowly than 1/√M (grey), as a share of units changes sides.",
            [
                Panel(
                    "change of the Jacobian",
                    [
                        *[_curve(METHODS[n].title, v, n) for n, v in change.items()],
                        _guide(change["full"], -0.5),
                    ],
                )
            ],
            "width M",
            "relative change",
            True,
            True,
        ),
    ]
    quantities = {
        "error of the tangent kernel": (kernels, "−½"),
        **{f"outputs after one step, {METHODS[n].title}": (v, "−½") for n, v in errors.items()},
        **{f"loss after one step, {METHODS[n].title}": (v, "−1") for n, v in one_step.items()},
        **{f"change of the Jacobian, {METHODS[n].title}": (v, "") for n, v in change.items()},
    }
    section.tables = [
        Table(
            "Exponents of the width, fitted to all points of a curve.",
            ["quantity", "theory", "fitted", f"at M = {sizes[0]}", f"at M = {sizes[-1]}"],
            [
                [name, theory, slope(values), _mean(values[sizes[0]]), _mean(values[sizes[-1]])]
                for name, (values, theory) in quantities.items()
            ],
        )
    ]
    section.findings = [
        f"The error of the tangent kernel falls like M^{slope(kernels):.2f}; theory says −0.5.",
        f"The loss after one step of exact natural gradient descent falls like "
        f"M^{slope(one_step['full']):.2f}; theory says −1.",
        f"From width {sizes[0]} to {sizes[-1]} the change of the Jacobian falls by a factor of "
        f"{_mean(change['gd'][sizes[0]]) / _mean(change['gd'][sizes[-1]]):.1f} under gradient "
        f"descent and {_mean(change['full'][sizes[0]]) / _mean(change['full'][sizes[-1]]):.1f} "
        "under exact natural gradient descent.",
    ]
    return section


def widths(setting: Setting) -> list[int]:
    """Return three to five widths that double up to the one asked for, from 64 on if possible."""
    largest = setting.config.width
    least = max(1, min(64, largest // 4))
    return [largest // 2**power for power in range(4, -1, -1) if largest // 2**power >= least]


def slope(values: dict[int, list[float]]) -> float:
    """Return the exponent of the power law fitted to means over draws."""
    if len(values) < 2:
        return math.nan
    x = torch.tensor([math.log(size) for size in values], dtype=torch.float64)
    y = torch.tensor([math.log(_mean(v)) for v in values.values()], dtype=torch.float64)
    x = x - x.mean()
    return float((x * (y - y.mean())).sum() / x.square().sum())


def _one_step(
    setting: Setting,
    model: ntk.MLP,
    infinite: ntk.InfiniteNetwork,
    name: str,
    size: int,
    errors: dict[str, dict[int, list[float]]],
    one_step: dict[str, dict[int, list[float]]],
) -> None:
    """Take one step at 1/α and one at half of it, and compare with theory."""
    damping = damping_of(name, model, setting.x)
    if name == "gd":
        lr = 1.0 / float(torch.linalg.eigvalsh(infinite.maps("gd")[0])[-1])
    else:
        lr = 1.0 / setting.alpha(name, size)
        run = train(setting, model, name, lr, damping, 1)
        one_step[name].setdefault(size, []).append(run.train_loss[1])
    residual = infinite.outputs - setting.y
    run = train(setting, model, name, 0.5 * lr, damping, 1)
    with torch.no_grad():
        outputs = run.model(setting.x)
    if name == "gd":
        expected = ntk.predict(infinite, setting.y, "gd", steps=[1], lr=0.5 * lr).train[0]
    else:
        expected = setting.y + 0.5 * residual
    error = float((outputs - expected).norm() / residual.norm())
    errors[name].setdefault(size, []).append(error)


def _jacobian_change(setting: Setting, model: ntk.MLP, name: str) -> float:
    if name == "gd":
        kernel = ntk.empirical_kernel(model, setting.x) / setting.samples
        lr = 1.0 / float(torch.linalg.eigvalsh(kernel)[-1])
        run = train(setting, model, name, lr, 0.0, GD_STEPS)
    else:
        run = train(setting, model, name, 1.0, 0.0, NGD_STEPS)
    stability = ntk.JacobianStability(model, setting.x)
    stability.model = run.model
    return stability.measure().relative_change


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def _curve(label: str, values: dict[int, list[float]], method: str) -> Line:
    return Line(label, [float(s) for s in values], [_mean(v) for v in values.values()], "both",
                method)  # fmt: skip


def _guide(values: dict[int, list[float]], exponent: float) -> Line:
    sizes = list(values)
    first = _mean(values[sizes[0]])
    guide = [first * (size / sizes[0]) ** exponent for size in sizes]
    return Line("", [float(size) for size in sizes], guide, "reference")
