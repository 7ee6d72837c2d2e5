"""Methods that train one network, each at the best of as many trials, over several draws."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from natgrad.experiments.claims.claim import Setting
from natgrad.experiments.claims.image_training import Curves, ImageTask, train

Trial = tuple[float, ...]
"""A learning rate, and whatever else is searched with it."""


def rates(*numbers: float) -> tuple[Trial, ...]:
    """Return trials of nothing but a learning rate."""
    return tuple((number,) for number in numbers)


@dataclass(frozen=True)
class Method:
    """A way to train: what figures call it, what makes its optimizer, and the trials.

    The optimizer is made of a model, a trial, and the batches of an epoch and of all.
    """

    title: str
    make: Callable[[nn.Module, Trial, int, int], torch.optim.Optimizer]
    trials: tuple[Trial, ...] = ()


@dataclass(frozen=True, eq=False)
class Race:
    """Methods on one task. Runs are made once in a process, whichever claims want them.

    Figures are of so many draws of weights and order; another one chooses the trials.
    """

    task: Callable[[Setting], ImageTask]
    methods: Mapping[str, Method]
    draws: int = 3

    def _run(self, setting: Setting, name: str, trial: Trial, draw: int) -> Curves:
        key = f"{name} {trial} {draw}"
        return setting.part(key, lambda: _trained(self, setting, name, trial, draw))

    def best(self, setting: Setting, name: str) -> Trial:
        """Return a method's trial with the lowest training loss at the end."""
        trials = self.methods[name].trials
        return min(trials, key=lambda trial: self._run(setting, name, trial, 0)["loss"][-1])

    def runs(self, setting: Setting, name: str, trial: Trial) -> list[Curves]:
        """Return a method's curves with a trial, draw by draw."""
        return [self._run(setting, name, trial, draw) for draw in range(1, self.draws + 1)]

    def race(
        self, setting: Setting, names: Mapping[str, str] | Sequence[str]
    ) -> tuple[dict[str, Trial], dict[str, list[Curves]]]:
        """Return the trials and the curves of some methods.

        A mapping says of each whose best trial it takes.
        """
        likes = names if isinstance(names, Mapping) else {name: name for name in names}
        trials, runs = {}, {}
        for name, like in setting.each(likes.items()):
            trials[name] = self.best(setting, like)
            runs[name] = self.runs(setting, name, trials[name])
        return trials, runs


@functools.cache
def _task(race: Race, setting: Setting) -> ImageTask:
    return race.task(setting)


@functools.cache
def _trained(race: Race, setting: Setting, name: str, trial: Trial, draw: int) -> Curves:
    task, make = _task(race, setting), race.methods[name].make
    steps = task.steps, task.steps * task.epochs
    return train(task, lambda model: make(model, trial, *steps), setting.seed_of(draw))


def ends(runs: Mapping[str, Sequence[Curves]], figure: str) -> dict[str, list[float]]:
    """Return a figure of every method's runs at the end, draw by draw."""
    return {name: [one[figure][-1] for one in found] for name, found in runs.items()}


def _times(curves: Curves, figure: str) -> list[float]:
    """Return when a figure is what it is: a loss, the mean over an epoch, in the middle of it."""
    ends = curves["seconds"]
    starts = [0.0, *ends[:-1]] if figure == "loss" else ends
    return [(begin + end) / 2 for begin, end in zip(starts, ends, strict=True)]


def at_equal_time(runs: Sequence[Curves], figure: str) -> list[float]:
    """Return a figure of each run when the first of them has its last one, linear in between."""
    last = min(_times(one, figure)[-1] for one in runs)
    return [_at_time(one[figure], _times(one, figure), last) for one in runs]


def _at_time(values: Sequence[float], times: Sequence[float], seconds: float) -> float:
    after = next((i for i, time in enumerate(times) if time >= seconds), len(times) - 1)
    if after == 0 or not math.isfinite(values[after]):
        return values[after]
    share = (seconds - times[after - 1]) / (times[after] - times[after - 1])
    return values[after - 1] + min(share, 1.0) * (values[after] - values[after - 1])


def time_to(curves: Curves, accuracy: float) -> float:
    """Return the seconds of training after the first epoch with an accuracy; infinite if none."""
    pairs = zip(curves["accuracy"], curves["seconds"], strict=True)
    return next((seconds for found, seconds in pairs if found >= accuracy), math.inf)
