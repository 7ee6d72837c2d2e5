"""The learning-rate search of the first-order methods: a fixed budget of short runs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

from natgrad.experiments.results import Search, Trial

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
