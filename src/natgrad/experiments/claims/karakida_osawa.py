"""Karakida & Osawa (2020): approximate Fisher matrices in wide networks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import torch

from natgrad import ntk
from natgrad.experiments.claims.claim import Figures, Setting, Source
from natgrad.experiments.theory.methods import METHODS
from natgrad.experiments.theory.problem import Problem
from natgrad.experiments.theory.results import ByWidth

SOURCE = Source(
    "karakida-osawa",
    "Karakida & Osawa, Understanding approximate Fisher information for fast convergence of "
    "natural gradient descent in wide neural networks (2020)",
)

#: Draws of the random weights.
DRAWS = 5


def _widths(setting: Setting) -> tuple[int, ...]:
    return setting.of((128, 256, 512, 1024), (512, 1024, 2048, 4096))


def _problem(setting: Setting, width: int | None = None, depth: int = 3) -> Problem:
    return setting.problem(setting.of(20, 100), width or _widths(setting)[-1], depth)


def _title(name: str) -> str:
    return METHODS[name].title


Quantity = Callable[[Problem, ntk.MLP, str], float]
"""What is measured of a problem, a random network and a method."""


def _by_width(
    setting: Setting, quantity: Quantity, draws: int = 0, *, without: str = "", also: str = ""
) -> dict[str, ByWidth]:
    """Return a quantity of all methods that theory has a rate for, but for one, and of another."""
    structures = [name for name in _problem(setting).structures if name != without]
    found = {name: ByWidth() for name in (also, *structures) if name}
    for width in setting.each(_widths(setting)):
        task = _problem(setting, width)
        for draw in range(draws or DRAWS):
            model = task.network(draw=draw)
            for name, values in found.items():
                values.add(width, quantity(task, model, name))
    return found


def _last_and_exponents(found: dict[str, ByWidth], last: str, exponent: str) -> Figures:
    """Return values at the largest width and exponents of the width, method by method."""
    figures: Figures = {}
    for name, values in found.items():
        figures[f"{last}, {_title(name)}"] = values[max(values)]
        figures[f"{exponent}, {_title(name)}"] = values.exponents()
    return figures


@SOURCE.claim("dynamics", "theorem 3.1, figure 2")
def dynamics(setting: Setting) -> Figures:
    """Largest distance, over six steps at η = ½/α, of √(loss/first loss) from ½^t.

    Says: Block-diagonal, block-tridiagonal, K-FAC and unit-wise approximations train a wide network
    on the same curve as the exact Fisher matrix, each at its own learning rate c/α.
    Rule:
        exponent of the width ≤ -0.25 (the departure vanishes like 1/√M, but constants differ by
            method)
        departure from (1 − ηα)^t, Exact NGD ≤ 0.1 (O(1/√M) is 0.03 at M = 1024)
    """

    def departure(task: Problem, model: ntk.MLP, name: str) -> float:
        left = task.train_at(0.5, model, name, 6).left
        return max(abs(math.sqrt(loss) - 0.5**step) for step, loss in enumerate(left))

    found = _by_width(setting, departure)
    return _last_and_exponents(found, "departure from (1 − ηα)^t", "exponent of the width")


@SOURCE.claim("alpha", "section 4, table 1")
def alpha(setting: Setting) -> Figures:
    """α = tr(JF⁻¹Jᵀ/N)/N of networks of three and four layers.

    Says: α is 1, L, the sum of the inverse tri-diagonal matrix, about NL and about γM(L − 1) for
    exact, block-diagonal, block-tridiagonal, K-FAC and unit-wise curvature.
    Rule:
        α measured / theory 0.95 to 1.05 (unit-wise α has an error O(1/√M), the others none)
    Remark: α of K-FAC is N(L − 1) + 1 with factors that are means, not NL: the last layer's output
    factor is the identity, so that this layer counts 1. Unit-wise α is γM(L − 1)/C + 1.
    """
    figures: Figures = {}
    for depth in setting.each((3, 4)):
        task = _problem(setting, depth=depth)
        model = task.network()
        for name in task.structures:
            label = f"{_title(name)}, L = {depth}"
            found = task.isotropy(model, name).alpha / task.alpha(name)
            figures[f"α measured / theory, {label}"] = found
    return figures


@SOURCE.claim("best-rate", "section 4")
def best_rate(setting: Setting) -> Figures:
    """Vertex of the parabola through the losses after one step at ¾, 1 and 1¼ of 1/α.

    Says: The best learning rate is 1/α.
    Rule:
        best learning rate × α, Exact NGD 0.9 to 1.1 (O(1/√M) is 0.03 at M = 1024)
        best learning rate × α, Block 0.9 to 1.1 (as for the exact matrix)
        exponent of the width of |best learning rate × α − 1| ≤ -0.25 (the departure vanishes like
            1/√M, but constants differ by method)
    Remark: At widths that are used, K-FAC and unit-wise curvature want larger rates than 1/α: what
    a step leaves is due to the change of the Jacobian, which a longer step makes up for. Whether
    that ends at larger widths than 1024 is open; from 1 % of the residual, in the linear regime,
    the best rate is 1.01/α and less for every method.
    """

    def best(task: Problem, model: ntk.MLP, name: str) -> float:
        low, middle, high = (
            task.train_at(factor, model, name, 1).train_loss[1] for factor in (0.75, 1.0, 1.25)
        )
        return 1.0 + 0.125 * (low - high) / (low - 2.0 * middle + high)

    figures: Figures = {}
    for name, found in _by_width(setting, best, 2 * DRAWS).items():
        figures[f"best learning rate × α, {_title(name)}"] = found[max(found)]
        departures = ByWidth({w: [abs(one - 1.0) for one in ones] for w, ones in found.items()})
        key = "exponent of the width of |best learning rate × α − 1|"
        figures[f"{key}, {_title(name)}"] = departures.exponents()
    return figures


@SOURCE.claim("divergence", "section 3")
def divergence(setting: Setting) -> Iterator[dict[str, float]]:
    """Growth of the loss in the linear regime.

    Its geometric mean over six steps from a residual of 1 % of that at random, near which a network
    of moderate width is as linear as an infinite one is from its start.

    Says: Learning rates up to 2/α converge, those beyond it diverge.
    Rule:
        growth of the loss per step at 1.8/α ≤ 0.9 (theory says 0.8² = 0.64)
        growth of the loss per step at 2.2/α ≥ 1.1 (theory says 1.2² = 1.44)
    """
    task = _problem(setting)
    for name in setting.each(task.structures):
        for draw in range(DRAWS):
            model = task.network(draw=draw)
            with torch.no_grad():
                start = model(task.x)
            near = dataclasses.replace(task, y=start - 0.01 * (start - task.y))
            for factor in (1.8, 2.2):
                growth = near.train_at(factor, model, name, 6).left[-1] ** (1 / 6)
                yield {f"growth of the loss per step at {factor}/α, {_title(name)}": growth}


@SOURCE.claim("divergence-from-start", "section 3")
def divergence_from_start(setting: Setting) -> Iterator[dict[str, float]]:
    """The training loss after ten steps below and above 2/α.

    Says: The training of a real network from its random start converges up to 2/α and diverges
    beyond.
    Rule:
        loss after 10 steps at 1.8/α, relative to the first ≤ 0.5 (theory leaves 0.8²⁰ = 0.01)
        loss after 10 steps at 2.2/α, relative to the first ≥ 1 (theory makes it grow by 1.2²⁰ = 38)
    Remark: A finite network moves out of the linear regime before the growth shows, into regions in
    which the step is stable: the rates beyond 2/α are worse, yet the loss mostly falls. The bound
    holds near a solution (`karakida-osawa.divergence`).
    """
    task = _problem(setting, setting.of(512, 4096))
    for name in setting.each(task.structures):
        for factor in (1.8, 2.2):
            key = f"loss after 10 steps at {factor}/α, relative to the first, {_title(name)}"
            for draw in range(DRAWS):
                last = task.train_at(factor, task.network(draw=draw), name, 10).left[-1]
                yield {key: last if math.isfinite(last) else math.inf}


@SOURCE.claim("diagonal", "section 5")
def diagonal(setting: Setting) -> Figures:
    """‖M − αI‖/‖αI‖ of the coefficients M = JF⁻¹Jᵀ/N at the largest width, and how it falls.

    Says: The entry-wise diagonal of the Fisher matrix is not isotropic in function space, at any
    width, while the layer-wise and unit-wise approximations become so.
    Rule:
        deviation, Diagonal ≥ 0.5 (far beyond rounding and O(1/√M))
        exponent of the width, Diagonal ≥ -0.1 (the deviation must not vanish; 1/√M would be −0.5)
        deviation,  ≤ 0.1 (O(1/√M) of the unit-wise one)
        exponent of the width, Unit-wise ≤ -0.25 (theory says −0.5)
    """

    def deviation(task: Problem, model: ntk.MLP, name: str) -> float:
        return task.isotropy(model, name).deviation

    deviations = _by_width(setting, deviation, also="diagonal")
    figures: Figures = {f"deviation, {_title(n)}": d[max(d)] for n, d in deviations.items()}
    for name in ("diagonal", "unit_wise"):
        figures[f"exponent of the width, {_title(name)}"] = deviations[name].exponents()
    return figures


@SOURCE.claim("one-step", "section 3, figure 1")
def one_step(setting: Setting) -> Figures:
    """The training loss after one step at 1/α, and the power of the width with which it falls.

    Says: At η = 1/α training fits the data in one step, the better the wider the network.
    Rule:
        loss after one step, relative to the first, Exact NGD ≤ 0.05 (the outputs err by O(1/√M),
            the loss by its square)
        exponent of the width ≤ -0.25 (theory says −1 in the limit; the constants of K-FAC and
            unit-wise curvature are so large that they are not there yet)
    """

    def left(task: Problem, model: ntk.MLP, name: str) -> float:
        return task.train_at(1.0, model, name, 1).left[1]

    found, key = _by_width(setting, left, 2 * DRAWS), "loss after one step, relative to the first"
    return _last_and_exponents(found, key, "exponent of the width")


@SOURCE.claim("gradient-descent", "section 3")
def gradient_descent(setting: Setting) -> Iterator[dict[str, float]]:
    """What is left of a residual along the eigenvector of λ_min, at η = 1/λ_max and η = 1.

    Its length is 1 % of that which the residual of the targets has along an eigenvector on average,
    at which a network of moderate width is linear; the whole of it is measured for information.

    Says: Gradient descent is slow in the directions of small eigenvalues of the tangent kernel, in
    which natural gradient descent is as fast as in the others.
    Rule:
        log of the residual left, over theory, gradient descent 0.8 to 1.25 ((1 − λ_min/λ_max)^t up
            to O(1/√M))
        residual left after one step, Exact NGD ≤ 0.2 (theory leaves nothing; a finite network
            O(1/√M))
        steps of gradient descent to halve it ≥ 10 (one step does it for natural gradient descent)
    """
    task, steps = _problem(setting), setting.of(200, 1000)
    for draw in setting.each(range(DRAWS)):
        model = task.network(draw=draw)
        values, vectors = torch.linalg.eigh(ntk.empirical_kernel(model, task.x) / task.samples)
        shrink = math.log1p(-float(values[0] / values[-1]))
        with torch.no_grad():
            start = model(task.x)
        size = float((start - task.y).norm()) / math.sqrt(task.samples)
        small, whole = (
            dataclasses.replace(task, y=start - share * size * vectors[:, :1])
            for share in (0.01, 1.0)
        )
        left, of_whole = (
            math.sqrt(one.train(model, "full", 1.0, 1).left[1]) for one in (small, whole)
        )
        log_left = math.log(small.train(model, "gd", 1.0 / float(values[-1]), steps).left[-1]) / 2
        yield {
            "log of the residual left, over theory, gradient descent": log_left / (steps * shrink),
            "residual left after one step, Exact NGD": left,
            "steps of gradient descent to halve it": math.log(0.5) / shrink,
            "of the whole residual left after one step, Exact NGD": of_whole,
        }


@SOURCE.claim("test", "section 4, figure 3")
def test(setting: Setting) -> Figures:
    """Distance of test outputs after six steps at ½/α from the infinite-width prediction.

    It is relative to the prediction; unit-wise curvature has none.

    Says: Predictions on test inputs follow in closed form; exact natural gradient descent ends at
    those of gradient descent, the layer-wise approximations elsewhere.
    Rule:
        distance of test outputs from theory, exponent of the width ≤ -0.25 (the distance vanishes
            like 1/√M)
        distance of test outputs from theory, Exact NGD ≤ 0.15 (O(1/√M) with the larger constant of
            inputs that are not trained on)
        limit of Exact NGD, from that of gradient descent ≤ 0.0001
        limit of Block-diagonal, from that of gradient descent ≥ 0.001 (a mean of per-layer
            regressors is not the regressor of the sum)
    """

    def distance_from_theory(task: Problem, model: ntk.MLP, name: str) -> float:
        lr = 0.5 / task.alpha(name)
        infinite = ntk.InfiniteNetwork(model, task.x, task.x_test)
        theory = ntk.predict(infinite, task.y, name, steps=[6], lr=lr).test
        assert theory is not None
        trained = task.train(model, name, lr, 6).model
        with torch.no_grad():
            return float((trained(task.x_test) - theory[0]).norm() / theory[0].norm())

    found = _by_width(setting, distance_from_theory, without="unit_wise")
    key = "distance of test outputs from theory"
    figures = _last_and_exponents(found, key, f"{key}, exponent of the width")
    task = _problem(setting)
    infinite = ntk.InfiniteNetwork(task.network(draw=DRAWS - 1), task.x, task.x_test)
    end = _limit(infinite, task, "gd")
    for name in ("full", "block_diagonal"):
        distance = (_limit(infinite, task, name) - end).norm() / end.norm()
        figures[f"limit of {_title(name)}, from that of gradient descent"] = float(distance)
    return figures


def _limit(infinite: ntk.InfiniteNetwork, task: Problem, name: str) -> torch.Tensor:
    """Return the test outputs after training for ever."""
    found = ntk.predict(infinite, task.y, name, steps=[1e12], lr=1.0, continuous=True)
    assert found.test is not None
    return found.test[0]
