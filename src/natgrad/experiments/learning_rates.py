"""Learning rates: what the quadratic model of the loss asks for, and a search by short runs."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from natgrad.experiments.objectives import Objective
from natgrad.experiments.results import Search, Trial
from natgrad.quality import update_quality


def step_of(
    model: nn.Module,
    build: Callable[[nn.Module], torch.optim.Optimizer],
    loss: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
) -> dict[str, Tensor]:
    """Return what the first step of an optimizer on a copy subtracts from each parameter."""
    trained = copy.deepcopy(model)
    optimizer = build(trained)
    optimizer.zero_grad()
    loss(trained(inputs), targets).backward()
    optimizer.step()
    new = dict(trained.named_parameters())
    return {name: (old - new[name]).detach() for name, old in model.named_parameters()}


def measured_learning_rate(
    model: nn.Module,
    build: Callable[[nn.Module], torch.optim.Optimizer],
    objective: Objective,
    inputs: Tensor,
    targets: Tensor,
) -> float:
    """Return η = ⟨g, d⟩ / ⟨d, F d⟩ for the gradient g and an optimizer's first direction d.

    It minimises the quadratic model L(θ) − η⟨g, d⟩ + ½η²⟨d, F d⟩, with the exact Fisher matrix F of
    the batch, which costs one Jacobian-vector product. Where the isotropic condition J d =
    α·(outputs − targets) holds, this is the theory's 1/α. `build` makes the optimizer, with
    learning rate 1 and no momentum. NaN stands for a direction that is not one of descent or not
    finite.
    """
    direction = step_of(model, build, objective, inputs, targets)
    try:
        quality = update_quality(model, (inputs, targets), direction, objective.likelihood)
    except ValueError:  # Not finite, or no step at all.
        return float("nan")
    rate = quality.best_step
    return rate if 0 < rate < float("inf") else float("nan")


BUDGET = 9
"""Runs per method, the same for all."""

_PER_DECADE = 4  # the finest spacing: a factor of 10^(1/4)


def search_learning_rate(
    run: Callable[[float], float], grid: tuple[int, int], search: Search
) -> Search:
    """Look for the learning rate with the lowest final training loss.

    The search begins with one trial per decade of the grid, given by exponents of ten, then moves
    to the untested neighbours of the best so far, half a decade away and then a quarter, beyond the
    ends of the grid if the best is there, until the budget is spent or all neighbours are tested.
    `run` returns the final training loss, NaN for a run that diverged. `search` takes every trial
    as it ends, in the order of the learning rates; those that it holds already are not run again.
    """
    losses: dict[int, float] = {}
    known = {round(_PER_DECADE * math.log10(t.learning_rate)): t.loss for t in search.trials}
    decades = range(grid[0] * _PER_DECADE, grid[1] * _PER_DECADE + 1, _PER_DECADE)
    for key in itertools.chain(decades, iter(lambda: _next_key(losses), None)):
        if len(losses) == BUDGET:
            break
        rate = 10 ** (key / _PER_DECADE)
        losses[key] = known[key] if key in known else run(rate)
        if key not in known:
            search.trials.append(Trial(rate, losses[key]))
            search.trials.sort(key=lambda trial: trial.learning_rate)
    return search


def best_learning_rate(search: Search) -> float | None:
    """Return the learning rate of the trial with the lowest loss; None if every trial diverged."""
    finite = [trial for trial in search.trials if math.isfinite(trial.loss)]
    return min(finite, key=lambda trial: trial.loss).learning_rate if finite else None


def _next_key(losses: dict[int, float]) -> int | None:
    finite = [key for key in losses if math.isfinite(losses[key])]
    if not finite:  # every rate so far is too large
        return min(losses) - _PER_DECADE
    best = min(finite, key=losses.__getitem__)
    for distance in (_PER_DECADE // 2, _PER_DECADE // 4):
        for key in (best + distance, best - distance):
            beyond = key > max(losses) or key < min(losses)
            if beyond and best in (max(losses), min(losses)):
                key = best + (_PER_DECADE if key > best else -_PER_DECADE)
            if key not in losses:
                return key
    return None
