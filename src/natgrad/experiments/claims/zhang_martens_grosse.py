"""Zhang, Martens & Grosse (2019): linear convergence of natural gradient descent."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterator

import torch
from torch.nn import functional

from natgrad import ntk
from natgrad.experiments.claims.claim import Figures, Setting, Source
from natgrad.experiments.theory.methods import build_optimizer
from natgrad.experiments.theory.problem import Problem
from natgrad.experiments.theory.results import ByWidth

SOURCE = Source(
    "zhang-martens-grosse",
    "Zhang, Martens & Grosse, Fast convergence of natural gradient descent for over-parameterized "
    "neural networks (2019)",
)

DRAWS = 3
STEPS = 12


def _widths(setting: Setting) -> tuple[int, ...]:
    return setting.of((1024, 4096, 16384), (4096, 16384, 65536, 262144))


def _problem(setting: Setting, samples: int | None = None) -> Problem:
    return setting.problem(samples or setting.of(20, 100), 64)


def _network(task: Problem, width: int, draw: int = 0, std: float = 1.0) -> ntk.TwoLayerNetwork:
    inputs, random = task.x.shape[1], torch.Generator().manual_seed(1000 * task.config.seed + draw)
    made = ntk.TwoLayerNetwork(inputs, width, weight_std=std, generator=random, dtype=torch.float64)
    return made.to(task.x.device)


def _largest_ratio(losses: list[float]) -> float:
    """Return the largest share of the loss that a step left."""
    return max(after / before for before, after in zip(losses[:-1], losses[1:], strict=True))


@SOURCE.claim("full-rank", "condition 1, theorem 4")
def full_rank(setting: Setting) -> Figures:
    """Rank and smallest eigenvalue of the Gram matrix at the largest width.

    Says: The Jacobian of a wide two-layer ReLU network at random weights has full row rank, and the
    smallest eigenvalue of its Gram matrix tends to that of the limit.
    Rule:
        rank J / N ≥ 1 (full row rank)
        λ_min(G) / λ_min(G∞) 0.75 to 1.25 (the theorem asks for ¾ of it at the start)
    """
    task = _problem(setting)
    limit = ntk.two_layer_kernel(task.x)
    networks = [_network(task, _widths(setting)[-1], draw) for draw in range(DRAWS)]
    found = [ntk.jacobian_conditions(one, task.x, kernel=limit) for one in networks]
    smallest = float(torch.linalg.eigvalsh(limit)[0])
    return {
        "rank J / N": [conditions.rank / task.samples for conditions in found],
        "λ_min(G) / λ_min(G∞)": [c.smallest_eigenvalue / smallest for c in found],
        "λ_min(G∞)": smallest,
    }


@SOURCE.claim("stability", "condition 2, theorem 4")
def stability(setting: Setting) -> Figures:
    """Largest δ = ‖J(w) − J(w₀)‖₂/√λ_min(G(w₀)) after each of 12 steps of rate ½.

    Says: The Jacobian changes little along training, the less the wider the network, so that ‖J(w)
    − J(w₀)‖₂ stays below a share of √λ_min.
    Rule:
        exponent of the width ≤ -0.15 (−¼ for ReLU: the share of units that change sides falls like
            m^−½)
        largest δ over training, natural gradient descent ≤ 0.2 (C = 2δ/(1 − δ) < ½)
    Remark: The theorem's width is of order n⁴/λ₀⁴. Convergence at the predicted rate does not wait
    for the condition, which is sufficient and not necessary (`zhang-martens-grosse.rate`).
    """
    task = _problem(setting)
    changes = {"gd": ByWidth(), "full": ByWidth()}
    for width in setting.each(_widths(setting)):
        for draw in range(DRAWS):
            network = _network(task, width, draw)
            measured = ntk.JacobianStability(network, task.x, task.y)
            root = math.sqrt(measured.smallest_eigenvalue)
            kernel = ntk.empirical_kernel(network, task.x) / task.samples
            rates = {"gd": 1.0 / float(torch.linalg.eigvalsh(kernel)[-1]), "full": 0.5}
            for name, found in changes.items():
                measured.model, largest = network, 0.0
                for _ in range(STEPS if name == "full" else 1):
                    steps = 1 if name == "full" else 10 * STEPS
                    run = task.train(measured.model, name, rates[name], steps)
                    measured.model = run.model
                    largest = max(largest, measured.measure().spectral_norm / root)
                found.add(width, largest)
    titles = {"gd": "gradient descent, after 120 steps", "full": "natural gradient descent"}
    last = _widths(setting)[-1]
    return {
        **{f"largest δ over training, {titles[n]}": values[last] for n, values in changes.items()},
        "exponent of the width, natural gradient descent": changes["full"].exponents(),
    }


@SOURCE.claim("rate", "theorem 3")
def rate(setting: Setting) -> Iterator[dict[str, float]]:
    """The largest ratio of successive losses over 12 steps, at the largest width.

    Says: Natural gradient descent shrinks ‖u − y‖² by 1 − η at least in every step.
    Rule:
        largest share left by a step, over 1 − η ≤ 1.05 (the bound itself, with room for the
            rounding of what is left at the end)
    """
    task, width = _problem(setting), _widths(setting)[-1]
    for lr in (0.25, 0.5, 0.75):
        for draw in range(DRAWS):
            losses = task.train(_network(task, width, draw), "full", lr, STEPS).train_loss
            share = _largest_ratio(losses) / (1.0 - lr)
            yield {f"largest share left by a step, over 1 − η, η = {lr}": share}


def _closer(task: Problem, shift: float) -> Problem:
    """Return the task with inputs that are closer to one another, so that λ_min is smaller."""
    x = task.x + shift * task.x.mean(0) / task.x.mean(0).norm()
    return dataclasses.replace(task, x=x / x.norm(dim=1, keepdim=True))


@SOURCE.claim("conditioning", "section 3, after theorem 3")
def conditioning(setting: Setting) -> Figures:
    """Steps to 1 % of the loss, with inputs moved towards their mean by 0, ½, 1 and 2.

    Natural gradient descent with η = ½, gradient descent with η = 2/(λ_min + λ_max).

    Says: The number of steps that natural gradient descent takes does not depend on λ_min of the
    Gram matrix, while that of gradient descent grows like its inverse.
    Rule:
        slope of log steps against log 1/λ_min, natural gradient descent -0.15 to 0.15 (no
            dependence)
        slope of log steps against log 1/λ_min, gradient descent ≥ 0.5 (proportional for a residual
            along its eigenvector, less for a mixture)
    """
    base = _problem(setting, 10)
    width, limit = setting.of(4096, 65536), setting.of(20000, 200000)
    conditions: list[float] = []
    steps: dict[str, list[float]] = {"gd": [], "full": []}
    for shift in setting.each((0.0, 0.5, 1.0, 2.0)):
        task = _closer(base, shift)
        network = _network(task, width)
        values = torch.linalg.eigvalsh(ntk.empirical_kernel(network, task.x) / task.samples)
        conditions.append(-math.log(float(values[0])))
        rates = {"gd": 2.0 / float(values[0] + values[-1]), "full": 0.5}
        for name, found in steps.items():
            count, losses = 16, [1.0]
            while losses[-1] > 0.01 * losses[0] and count < limit:
                count *= 4
                losses = task.train(network, name, rates[name], count).train_loss
            found.append(next((i for i, v in enumerate(losses) if v <= 0.01 * losses[0]), limit))
    figures: Figures = {"λ_min/N, largest over smallest": math.exp(conditions[-1] - conditions[0])}
    for name, title in (("full", "natural gradient descent"), ("gd", "gradient descent")):
        logarithms = [math.log(count) for count in steps[name]]
        slope = statistics.linear_regression(conditions, logarithms).slope
        figures[f"slope of log steps against log 1/λ_min, {title}"] = slope
        figures[f"steps where λ_min is largest, {title}"] = float(steps[name][0])
        figures[f"steps where λ_min is smallest, {title}"] = float(steps[name][-1])
    return figures


@SOURCE.claim("step-size", "abstract, theorem 3")
def step_size(setting: Setting) -> Iterator[dict[str, float]]:
    """The training loss after 5 steps at the largest width.

    Says: Learning rates of order 1 can be used, whatever the size of the kernel.
    Rule:
        loss after 5 steps, relative to the first, η = 1.0 ≤ 0.05 (one step is enough in the limit)
        loss after 5 steps, relative to the first, η = 0.5 ≤ 0.05 (¼⁵ = 0.001 in the limit, 0.03
            guaranteed)
    """
    task, width = _problem(setting), _widths(setting)[-1]
    for lr in (0.5, 1.0):
        for draw in range(DRAWS):
            share = task.train(_network(task, width, draw), "full", lr, 5).left[-1]
            yield {f"loss after 5 steps, relative to the first, η = {lr}": share}


@SOURCE.claim("kfac-rate", "theorem 5")
def kfac_rate(setting: Setting) -> Iterator[dict[str, float]]:
    """Losses over 12 steps at half the largest guaranteed rate, width 1024 (4096).

    The dependent inputs are four times as many as their dimensions.

    Says: K-FAC converges linearly on the two-layer network at a rate that depends on the inputs'
    conditioning only, and like exact natural gradient descent where inputs are independent.
    Rule:
        largest loss over its bound ≤ 1.1 (the bound is that of the limit, to which O(1/√m) comes)
        largest distance of √(loss/first) from ½^t, independent inputs ≤ 0.15 (P_X = I: the same map
            of residuals as for the exact matrix)
    """
    task, width = _problem(setting), setting.of(1024, 4096)
    few = _in_leading_components(task, task.samples // 4)
    for draw in setting.each(range(DRAWS)):
        bound = ntk.convergence_bounds(method="kfac", inputs=few.x)
        lr = 0.5 * bound.step_size
        factor = ntk.convergence_bounds(method="kfac", inputs=few.x, step_size=lr).factor
        bounded = few.train(_network(few, width, draw), "kfac", lr, STEPS, damping=0.0).left
        lr = 0.5 / task.samples
        plain = task.train(_network(task, width, draw), "kfac", lr, 6, damping=0.0).left
        most = max(v / factor**t for t, v in enumerate(bounded))
        distance = max(abs(math.sqrt(v) - 0.5**t) for t, v in enumerate(plain))
        yield {
            "largest loss over its bound, dependent inputs": most,
            "largest distance of √(loss/first) from ½^t, independent inputs": distance,
        }


def _in_leading_components(task: Problem, dim: int) -> Problem:
    """Return the task with inputs in their leading components, norm 1."""
    basis = torch.linalg.svd(task.x, full_matrices=False)[2][:dim]
    x, x_test = (functional.normalize(one @ basis.T, dim=1) for one in (task.x, task.x_test))
    return dataclasses.replace(task, x=x, x_test=x_test)


@SOURCE.claim("generalisation", "theorem 6")
def generalisation(setting: Setting) -> Figures:
    """Mean of min(1, |f − y|) on test inputs after 15 steps of rate 1 from weights of size 0.1.

    Says: The error on new inputs of the network that natural gradient descent finds is below
    √(2yᵀ(G∞)⁻¹y/n) up to a term that falls with n.
    Rule:
        bound − test loss ≥ 0 (the bound itself, its last term left out)
        bound of random labels / bound of true labels ≥ 1.2 (a bound that tells learnable labels
            from noise must be larger for noise)
    Remark: The bound is beside the error only in that it is above it: for these data it is several
    times as large. It tells true labels from random ones.
    """
    figures: Figures = {}
    width = setting.of(4096, 65536)
    for samples in setting.of((20, 40), (100, 400, 1600)):
        task = _problem(setting, samples)
        kernel = ntk.two_layer_kernel(task.x)
        bound = ntk.generalization_bound(kernel, task.y)
        generator = torch.Generator().manual_seed(setting.seed)
        labels = [0.5 * torch.randn(samples, generator=generator).sign() for _ in range(10)]
        noise = [ntk.generalization_bound(kernel, one.to(task.y)) for one in labels]
        errors = []
        for draw in range(DRAWS):
            run = task.train(_network(task, width, draw, 0.1), "full", 1.0, 15)
            with torch.no_grad():
                wrong = (run.model(task.x_test) - task.y_test).abs().clamp(max=1.0)
            errors.append(float(wrong.mean()))
        found: Figures = {
            "bound − test loss": [bound - error for error in errors],
            "bound of random labels / bound of true labels": [value / bound for value in noise],
            "bound": bound,
            "test loss": errors,
        }
        figures |= {f"{name}, n = {samples}": value for name, value in found.items()}
    return figures


@SOURCE.claim("general-loss", "section 3.3")
def general_loss(setting: Setting) -> Iterator[dict[str, float]]:
    """Eight steps of rate 2/(μ + κ) on ½r² + log cosh r, μ = 1 and κ = 2, at the largest width.

    Says: For losses that are strongly convex and smooth in the outputs, natural gradient descent
    converges linearly as gradient descent on the outputs would.
    Rule:
        largest share of ‖u − y‖² left by a step, over its bound ≤ 1.1 (the bound is that of a
            constant Jacobian, to which O(1/√m) comes)
    """
    task = _problem(setting)
    bound = ntk.convergence_bounds(method="ngd", strong_convexity=1.0, smoothness=2.0)
    for draw in range(DRAWS):
        network = _network(task, _widths(setting)[-1], draw)
        optimizer = build_optimizer("full", network, bound.step_size, 0.0)
        squares = []
        for _ in range(9):
            residual = network(task.x) - task.y
            squares.append(float(residual.detach().square().sum()))
            optimizer.zero_grad()
            (0.5 * residual.square() + residual.cosh().log()).mean().backward()
            optimizer.step()
        share = _largest_ratio(squares) / bound.factor
        yield {"largest share of ‖u − y‖² left by a step, over its bound": share}
