"""Li, Chen & Huang (2023): implicit steps for physics-informed networks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import natgrad
from natgrad.experiments.claims.claim import Figures, Setting, Source, ratios
from natgrad.experiments.claims.side_by_side import Make, at_rate, mlp

SOURCE = Source(
    "li-chen-huang",
    "Li, Chen & Huang, Implicit stochastic gradient descent for training physics-informed neural "
    "networks (2023)",
)

DRAWS = 3
HIDDEN = (32, 32)
POINTS = 64
#: Evaluations of the loss and its gradient that a run may take.
EVALUATIONS = 1000
#: Learning rates in units of 2/λ_max, beyond which gradient descent is unstable.
SMALL, LARGE = 0.5, (10.0, 1000.0)


@dataclass(frozen=True)
class StiffPoisson:
    """−u'' = f on (0, 1), u = 0 at both ends, with u = sin 2πx + 0.1 sin 2πkx, k the frequency.

    It is to hold at points evenly spaced. The network is multiplied by x(1 − x), so that the
    boundary values hold by themselves.
    """

    points: int
    frequency: int = 10

    @property
    def x(self) -> Tensor:
        """The points, ``(N, 1)``."""
        return torch.linspace(0, 1, self.points + 2, dtype=torch.float64)[1:-1].unsqueeze(1)

    def solution(self, x: Tensor) -> Tensor:
        """Return u."""
        return torch.sin(2.0 * math.pi * x) + 0.1 * torch.sin(2.0 * math.pi * self.frequency * x)

    def source(self, x: Tensor) -> Tensor:
        """Return f."""
        k, slow = 2.0 * math.pi * self.frequency, 2.0 * math.pi
        return slow**2 * torch.sin(slow * x) + 0.1 * k**2 * torch.sin(k * x)

    def loss(self, model: nn.Module) -> Tensor:
        """Return the mean of ½(u'' + f)², relative to that of u = 0."""
        x = self.x.requires_grad_()
        u = x * (1.0 - x) * model(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
        source = self.source(x.detach())
        return (curvature + source).square().mean() / source.square().mean()

    def error(self, model: nn.Module) -> float:
        """Return the error of u in the Euclidean norm of 1000 values, relative to u."""
        x = torch.linspace(0, 1, 1000, dtype=torch.float64).unsqueeze(1)
        exact = self.solution(x)
        with torch.no_grad():
            return float((x * (1.0 - x) * model(x) - exact).norm() / exact.norm())


def largest_curvature(problem: StiffPoisson, model: nn.Module, iterations: int = 30) -> float:
    """Return about λ_max of the Hessian of the loss, the largest in size, by power iteration."""
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(problem.loss(model), parameters, create_graph=True)
    vector = [g.detach() for g in gradients]
    largest = 0.0
    for _ in range(iterations):
        length = math.sqrt(sum(float(v.square().sum()) for v in vector))
        vector = [v / length for v in vector]
        product = torch.autograd.grad(gradients, parameters, vector, retain_graph=True)
        largest = sum(float((v * p).sum()) for v, p in zip(vector, product, strict=True))
        vector = list(product)
    return abs(largest)


def trained(
    problem: StiffPoisson, model: nn.Module, optimizer: torch.optim.Optimizer, evaluations: int
) -> float:
    """Train a network with so many evaluations; return its last loss, ∞ if it diverged.

    The step that exceeds the number of evaluations is the last.
    """
    count = 0

    def closure() -> Tensor:
        nonlocal count
        count += 1
        optimizer.zero_grad()
        loss = problem.loss(model)
        loss.backward()
        return loss

    while count < evaluations:
        optimizer.step(closure)  # type: ignore[arg-type]
        if not all(bool(p.isfinite().all()) for p in model.parameters()):
            return math.inf
    last = float(problem.loss(model).detach())
    return last if math.isfinite(last) else math.inf


#: Methods by title, and learning rates.
METHODS: dict[str, Make] = {
    "implicit": at_rate(natgrad.ImplicitSGD),
    "explicit": at_rate(torch.optim.SGD),
    "Adam": at_rate(torch.optim.Adam),
}


def _run(setting: Setting, title: str, rate: float, draw: int) -> tuple[float, float]:
    """Return the loss, relative to the first, and the error of u after training; ∞ if diverged.

    The rate is in units of 2/λ_max, but for Adam.
    """
    problem = StiffPoisson(setting.of(POINTS, 4 * POINTS))
    model = mlp((1, *HIDDEN, 1), setting.seed_of(draw), dtype=torch.float64)
    first = float(problem.loss(model).detach())
    if title != "Adam":
        rate *= 2.0 / largest_curvature(problem, model)
    evaluations = setting.of(EVALUATIONS, 20 * EVALUATIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Inner problems that are not solved to the end.
        last = trained(problem, model, METHODS[title](model, rate), evaluations)
    return last / first, problem.error(model) if math.isfinite(last) else math.inf


@SOURCE.claim("stability", "method")
def stability(setting: Setting) -> Iterator[dict[str, float]]:
    """The loss after 1000 evaluations of the gradient, at ten and a thousand times 2/λ_max.

    λ_max is that of the Hessian at random weights. Poisson's equation in one dimension, no images,
    with a solution sin 2πx + 0.1 sin 20πx; two hidden layers of 32 tanh units. Inner problems take
    at most 20 iterations of L-BFGS.

    Says: On stiff physics-informed networks implicit steps are stable at large rates, at which
    explicit gradient descent diverges.
    Rule:
        loss, relative to the first, implicit ≤ 1 (stable)
        loss, relative to the first, explicit ≥ 1 (it diverges)
    Remark: A first measurement took rates up to 1, which for this loss are all below 2/λ_max:
    explicit steps were stable, too. Now rates are in units of 2/λ_max and the draws are others
    (seed 1); the rule is the same.
    """
    for title in setting.each(("implicit", "explicit")):
        for draw in range(DRAWS):
            for rate in LARGE:
                loss, _ = _run(setting, title, rate, draw)
                yield {f"loss, relative to the first, {title}, {rate:g} times": loss}
            yield {f"loss at half of 2/λ_max, {title}": _run(setting, title, SMALL, draw)[0]}


@SOURCE.claim("accuracy", "experiments")
def accuracy(setting: Setting) -> Figures:
    """Relative error of u after 1000 evaluations of the gradient, equation as in `stability`.

    Each method at the rate of the lowest loss for another network: half, ten or a thousand times
    2/λ_max for implicit steps, 0.001, 0.003, 0.01 or 0.03 for Adam.

    Says: With implicit steps physics-informed networks learn solutions of several scales that Adam
    fails to learn with as many evaluations.
    Rule:
        error of u, implicit over Adam ≤ 1 (more accurate)
    Remark: Neither method learns this solution with so few evaluations: errors of 1 are those of u
    = 0.
    """
    rates = {"implicit": (SMALL, *LARGE), "Adam": (1e-3, 3e-3, 1e-2, 3e-2)}
    errors: dict[str, list[float]] = {}
    best: dict[str, float] = {}
    for title, tried in setting.each(rates.items()):
        best[title] = min(tried, key=lambda rate: _run(setting, title, rate, DRAWS)[0])  # noqa: B023
        errors[title] = [_run(setting, title, best[title], draw)[1] for draw in range(DRAWS)]
    return {
        "error of u, implicit over Adam": ratios(errors["implicit"], errors["Adam"]),
        **{f"error of u, {title}": found for title, found in errors.items()},
        **{f"learning rate, {title}": rate for title, rate in best.items()},
    }
