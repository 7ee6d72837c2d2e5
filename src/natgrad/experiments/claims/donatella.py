"""Donatella et al. (2024): natural gradients from a thermodynamic equilibrium."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import natgrad
from natgrad.curvature import Full
from natgrad.experiments.claims.claim import Figures, Setting, Source, ratios
from natgrad.experiments.claims.side_by_side import Make, Methods, Task, at_rate
from natgrad.experiments.theory.results import exponent
from natgrad.operators import FisherMatrix
from natgrad.solvers import Thermodynamic
from natgrad.solvers.thermodynamic import MARGIN

SOURCE = Source("donatella", "Donatella et al., Thermodynamic natural gradient descent (2024)")

DRAWS = 5
BATCH_SIZE = 50
HIDDEN = 16
#: Condition number of F + λI. Its inverse times λ_max is the relaxation time, 1/λ.
CONDITION = 30.0
STEPS = 20
#: Simulated times in units of 1/λ_max, from none to next to all.
TIMES = (0.0, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


def _system(setting: Setting, draw: int) -> tuple[FisherMatrix, float, Tensor]:
    """Return F and the gradient of one batch at random weights, and λ = λ_max/CONDITION."""
    task = Task.of(setting.dataset(), BATCH_SIZE)
    model = task.network(setting, draw, (HIDDEN,))
    x, y = next(task.batches(draw))
    matrix = natgrad.fisher_matrix(model, (x, y), "categorical", "full")
    gradients = torch.autograd.grad(task.loss(model(x), y), list(model.parameters()))
    gradient = torch.cat([g.flatten() for g in gradients])
    return matrix, float(matrix.eigenvalues()[0]) / CONDITION, gradient


def _process(relaxation_times: float, **options: object) -> Thermodynamic:
    """Return the process simulated for so many times 1/λ."""
    time = relaxation_times * CONDITION * MARGIN
    return Thermodynamic(**{"start": "zero", "time": time, **options})  # type: ignore[arg-type]


@SOURCE.claim("error", "method")
def error(setting: Setting) -> Iterator[dict[str, float]]:
    """Relative error of the simulated solution of (F + λI)x = ∇L, without noise, from x = 0.

    One batch of 50 images, a network with 16 hidden tanh units, λ = λ_max/30.

    Says: The mean of the process tends to the natural gradient exponentially in time, within a few
    relaxation times 1/λ.
    Rule:
        error over e^(−λt) ≤ 1.1 (the slowest mode decays by λ at least; λ_max is estimated)
        error after 10/λ ≤ 0.001 (e⁻¹⁰ is 5e-5)
    """
    for draw in setting.each(range(DRAWS)):
        matrix, damping, gradient = _system(setting, draw)
        exact = matrix.solve(gradient, damping)
        figures = {}
        for count in (1, 2, 4, 10):
            found = matrix.inverse(damping, _process(count)) @ gradient
            share = float((found - exact).norm() / exact.norm())
            figures[f"error after {count}/λ"] = share
            figures[f"error over e^(−λt), t = {count}/λ"] = share * math.exp(count)
        yield dict(sorted(figures.items()))


@SOURCE.claim("noise", "method")
def noise(setting: Setting) -> Iterator[dict[str, float]]:
    """Error of averages over 10, 40 and 160 relaxation times, after five to burn in.

    The temperature makes the noise at equilibrium a third of the solution.

    Says: With thermal noise the average over time tends to the natural gradient, its error like one
    over the square root of the time.
    Rule:
        exponent of the time -0.65 to -0.35 (theory says −½)
    """
    for draw in setting.each(range(DRAWS)):
        matrix, damping, gradient = _system(setting, draw)
        exact = matrix.solve(gradient, damping)
        spread = float((matrix.eigenvalues() + damping).reciprocal().sum())  # tr A⁻¹
        temperature = (float(exact.norm()) / 3.0) ** 2 / spread
        times, found = (10.0, 40.0, 160.0), []
        for time in times:
            burn_in = 5.0 * CONDITION * MARGIN
            process = _process(time + 5.0, temperature=temperature, seed=draw, burn_in=burn_in)
            average = matrix.inverse(damping, process) @ gradient
            found.append(float((average - exact).norm() / exact.norm()))
        yield {"exponent of the time": exponent(times, found), "error after 160/λ": found[-1]}


def _thermodynamic(**process: Any) -> Make:
    """Return what makes an optimizer of a network and a rate; see `at_rate`."""
    structure = Full(solver=Thermodynamic(**process))
    return at_rate(natgrad.ThermodynamicNGD, "categorical", structure=structure, **_DAMPED)


_DAMPED: dict[str, Any] = {"damping": 0.1, "kl_clip": None}
_exact = at_rate(natgrad.ExactNGD, "categorical", **_DAMPED)


def _distance(model: nn.Module, other: nn.Module) -> float:
    here, there = (nn.utils.parameters_to_vector(one.parameters()) for one in (model, other))
    return float((here - there).norm())


@SOURCE.claim("interpolation", "method")
def interpolation(setting: Setting) -> Iterator[dict[str, float]]:
    """Distance of the weights after 20 steps of rate 0.3, over that of the two limits.

    λ = 0.1, batches of 50, times t in units of 1/λ_max: 0, 1, 3, 10, 30, 100 and 300.

    Says: With the time that the process is given, from the gradient on, training goes over from
    gradient descent to natural gradient descent.
    Rule:
        distance from gradient descent, t = 0 ≤ 1e-09 (the gradient)
        distance from NGD, t = 300 ≤ 0.05 (ten and more times 1/λ)
        largest ratio of distances from NGD at successive times ≤ 1 (longer is closer)
    """
    task = Task.of(setting.dataset(), BATCH_SIZE)
    for draw in setting.each(range(DRAWS)):
        model = task.network(setting, draw, (HIDDEN,))

        def trained(make: Make) -> nn.Module:
            return task.train(model, make, STEPS, seed=draw).model  # noqa: B023

        plain = trained(partial(at_rate(torch.optim.SGD), rate=0.3))
        natural = trained(partial(_exact, rate=0.3))
        whole, distances = _distance(plain, natural), []
        for time in TIMES:
            found = trained(partial(_thermodynamic(time=time, start="gradient"), rate=0.3))
            distances.append(_distance(found, natural) / whole)
            yield {f"distance from NGD, t = {time:g}": distances[-1]}
            if time == 0:
                yield {"distance from gradient descent, t = 0": _distance(found, plain) / whole}
        largest = max(b / a for a, b in pairwise(distances))
        yield {"largest ratio of distances from NGD at successive times": largest}


@SOURCE.claim("delay", "experiments")
def delay(setting: Setting) -> Iterator[dict[str, float]]:
    """Training loss after 40 steps of rate 1, λ = 0.1, each from where the last ended; t = 20.

    Says: That the process runs on old matrices for a small part of the time does no harm.
    Rule:
        loss with a delay of a tenth of the time, over that without ≤ 1.05 (no harm, to a twentieth)
    Remark: Runs at this rate differ from draw to draw by more than a delay does, even one of half
    the time.
    """
    task = Task.of(setting.dataset(), BATCH_SIZE)
    for draw in setting.each(range(DRAWS)):
        model = task.network(setting, draw, (HIDDEN,))
        ends = {}
        for share in (0.0, 0.1, 0.5):
            make = partial(_thermodynamic(time=20.0, delay=20.0 * share), rate=1.0)
            ends[share] = task.train(model, make, 2 * STEPS, seed=draw).losses[-1]
        yield {
            f"loss with a delay of {part} of the time, over that without": ends[share] / ends[0.0]
            for share, part in ((0.1, "a tenth"), (0.5, "half"))
        }


@SOURCE.claim("training", "abstract")
def training(setting: Setting) -> Figures:
    """Training loss after 100 steps with batches of 50, each at the best of four rates.

    λ = 0.1, t = 20 from where the last solution ended. Rates are chosen on another network.

    Says: Thermodynamic natural gradient descent lowers the loss faster, step by step, than Adam and
    no worse than natural gradient descent with exact solutions.
    Rule:
        training loss over Adam's ≤ 1 (faster)
        training loss over NGD's ≤ 1.1 (no worse, to a tenth)
    Remark: Starting where the last solution ended, with simulations of t = 20, is not the same as
    exact solutions; where the process has time enough, it is (`donatella.interpolation`).
    """
    task = Task.of(setting.dataset(), BATCH_SIZE)
    methods: Methods = {
        "TNGD": (_thermodynamic(time=20.0), (0.1, 0.3, 1.0, 3.0)),
        "NGD": (_exact, (0.1, 0.3, 1.0, 3.0)),
        "Adam": (at_rate(torch.optim.Adam), (3e-3, 1e-2, 3e-2, 0.1)),
        "SGD": (at_rate(torch.optim.SGD), (0.1, 0.3, 1.0, 3.0)),
    }
    network, steps = partial(task.network, setting, hidden=(HIDDEN,)), (5 * STEPS, 100 * STEPS)
    found = task.compare(methods, network, DRAWS, setting.of(*steps), progress=setting.progress)
    own = found["TNGD"].ends
    return {
        **{f"training loss over {o}'s": ratios(own, found[o].ends) for o in ("Adam", "NGD", "SGD")},
        **{f"learning rate, {title}": tuned.rate for title, tuned in found.items()},
    }
