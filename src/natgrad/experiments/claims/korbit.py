"""Korbit et al. (2024): exact Gauss-Newton steps."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch

import natgrad
from natgrad.curvature import Full
from natgrad.experiments.claims.claim import Figures, Setting, Source, ratios
from natgrad.experiments.claims.side_by_side import Methods, Run, Task, accuracies, at_rate
from natgrad.experiments.objectives import squared_error
from natgrad.solvers import ConjugateGradient

SOURCE = Source(
    "korbit",
    "Korbit et al., Exact Gauss-Newton optimization for training deep neural networks (2024)",
)

DRAWS = 5
HIDDEN = (32, 32)
BATCH_SIZE = 64
STEPS = 100
#: Steps between measurements of the loss.
EVERY = 5
#: Iterations of conjugate gradients that a step of SGN takes at most.
ITERATIONS = 10
#: Rate from which lengths of steps are searched, and constant dampings of which the best is taken.
RATE = 0.3
DAMPINGS = (1e-2, 1e-1, 1.0)


def _tasks(setting: Setting) -> dict[str, Task]:
    """Return the images with the number they show to be regressed on, and as classes."""
    classes = Task.of(setting.dataset(), BATCH_SIZE)
    numbers = classes.y.double().unsqueeze(1)
    numbers = (numbers - numbers.mean()) / numbers.std()
    numbers_task = replace(classes, y=numbers, loss=squared_error)
    return {"gaussian": numbers_task, "categorical": classes}


def _gauss_newton(likelihood: str) -> Methods:
    """Return exact Gauss-Newton steps and those by conjugate gradients."""
    solver = ConjugateGradient(max_iterations=ITERATIONS, warm_start=False)
    egn = partial(at_rate, natgrad.EGN, likelihood, searched="damping", lr=RATE)
    return {"EGN": (egn(), DAMPINGS), "SGN": (egn(structure=Full(solver=solver)), DAMPINGS)}


def to_the_same_loss(one: Run, other: Run) -> tuple[float, float]:
    """Return the ratios of steps and of processor times to the lowest loss that both reach.

    NaN where one of the two never gets below its first loss.
    """
    loss = max(min(one.losses), min(other.losses))
    (steps, seconds), (other_steps, other_seconds) = (run.reaching(loss) for run in (one, other))
    if not steps or not other_steps:
        return math.nan, math.nan
    return steps / other_steps, seconds / other_seconds


@SOURCE.claim("exact", "method")
def exact(setting: Setting) -> Figures:
    """Steps and processor time to the lowest loss that both reach within 100 steps.

    Batches of 64; one output for the number that an image shows, ten for its class. Both with a
    line search from rate 0.3 and the best of three dampings, 0.01 to 1, for another network; ten
    iterations of conjugate gradients.

    Says: Solving for the Gauss-Newton direction exactly, in the space of the samples, takes fewer
    steps and less time than conjugate gradients (SGN).
    Rule:
        steps to the same loss, EGN over SGN, regression ≤ 1 (less)
        steps to the same loss, EGN over SGN, classification ≤ 1 (less)
        processor time to the same loss, EGN over SGN, regression ≤ 1 (less)
        processor time to the same loss, EGN over SGN, classification ≤ 1 (less)
    Remark: Refuted by the time that classes take: with ten outputs the systems have 640 rows, and
    solving them takes longer than ten iterations. A first measurement, with damping adapted to the
    reduction ratio of each batch, as is natgrad's default, was refuted, too, EGN taking 1.3 times
    the steps of SGN in regression. Here damping is constant and the draws are others (seed 1); the
    rule is the same.
    """
    titles = {"gaussian": "regression", "categorical": "classification"}
    figures: Figures = {}
    steps = setting.of(STEPS, 20 * STEPS)
    for likelihood, task in setting.each(_tasks(setting).items()):
        network = partial(task.network, setting, hidden=HIDDEN)
        found = task.compare(_gauss_newton(likelihood), network, DRAWS, steps, every=EVERY)
        egn, sgn, which = found["EGN"], found["SGN"], f"EGN over SGN, {titles[likelihood]}"
        pairs = [to_the_same_loss(a, b) for a, b in zip(egn.runs, sgn.runs, strict=True)]
        figures[f"steps to the same loss, {which}"] = [s for s, _ in pairs]
        figures[f"processor time to the same loss, {which}"] = [t for _, t in pairs]
        figures[f"training loss, {which}"] = ratios(egn.ends, sgn.ends)
    return figures


@SOURCE.claim("generalisation", "abstract")
def generalisation(setting: Setting) -> Figures:
    """Test accuracy after 100 steps with batches of 64.

    EGN and SGN as in `korbit.exact`; SGD (momentum 0.9) and Adam with the best of four rates.

    Says: EGN generalises at least as well as well-tuned SGD, Adam and SGN.
    Rule:
        test accuracy, EGN − ≥ -0.005 (as well, to half a percent)
    Remark: A first measurement, with damping adapted to the reduction ratio of each batch, as is
    natgrad's default, found a test accuracy of 0.73 for EGN and of 0.96 for SGN. Here damping is
    constant and the draws are others (seed 1); the rule is the same.
    """
    task, data = _tasks(setting)["categorical"], setting.dataset()
    methods: Methods = {
        **_gauss_newton("categorical"),
        "SGD": (at_rate(torch.optim.SGD, momentum=0.9), (0.01, 0.03, 0.1, 0.3)),
        "Adam": (at_rate(torch.optim.Adam), (1e-3, 3e-3, 1e-2, 3e-2)),
    }
    network, steps = partial(task.network, setting, hidden=HIDDEN), setting.of(STEPS, 20 * STEPS)
    found = task.compare(methods, network, DRAWS, steps, progress=setting.progress)
    others = [title for title in methods if title != "EGN"]
    return {
        **accuracies(found, data, of="EGN", others=others),
        **{f"damping or rate, {title}": tuned.rate for title, tuned in found.items()},
    }
