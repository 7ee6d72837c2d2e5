"""One training run: the plain PyTorch loop, with everything worth knowing measured on the side."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.capture.evaluation import count_samples
from natgrad.experiments.batches import Batch, Batches
from natgrad.experiments.factories import described, evaluating
from natgrad.experiments.objectives import Objective
from natgrad.experiments.results import Curve, Run

StepReport = Callable[[float, float, float], None]
"""Called after every step with (steps taken, or seconds if these are the budget, loss, metric);
raising stops the run."""

_DIVERGED = 1e6  # a loss this many times the initial one counts as divergence


@dataclass(frozen=True)
class Schedule:
    """How long to train, in steps or seconds, and when to measure.

    The model is evaluated after numbers of steps that are among `evaluations`, 0 for before the
    first, or instead every `pause` seconds of training. After the last step it is evaluated in any
    case, but without any of these on the training loss alone. The seed is that of the order of the
    samples.
    """

    steps: int | None
    evaluations: frozenset[int] = frozenset()
    seconds: float | None = None
    pause: float | None = None
    seed: int = 0

    @property
    def budget(self) -> float:
        """Steps, or seconds if these are what is limited."""
        return self.steps if self.steps is not None else self.seconds or 0.0

    @property
    def evaluates(self) -> bool:
        """Whether the model is evaluated along the way."""
        return bool(self.evaluations) or self.pause is not None

    def is_over(self, step: int, seconds: float) -> bool:
        """Whether so many steps and seconds of training are all there are."""
        over = self.steps is not None and step >= self.steps
        return over or (self.seconds is not None and seconds >= self.seconds)

    def is_due(self, step: int, seconds: float, last: float | None) -> bool:
        """Whether to evaluate now, having done so last after so many seconds, if ever."""
        if self.pause is None:
            return step in self.evaluations
        return last is None or seconds >= last + self.pause


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    batches: Batches,
    schedule: Schedule,
    report: StepReport | None = None,
    takes_closure: bool = False,
) -> Run:
    """Train a model in place and measure it; the clock runs only while it trains.

    With full batches the training curve is the loss of each step, before that step's update, and
    one evaluation after the last. With mini-batches that is the batch curve, and the training curve
    is evaluated whenever the test curve is. `report` is told of each step; `takes_closure` says
    that the optimizer evaluates the loss by a closure.

    A loss that is not finite or 10⁶ times the first one ends the run as "diverged", an error as
    "failed", Ctrl-C as "interrupted".
    """
    run = Run("completed", batch=None if batches.whole else Curve())
    durations: list[float] = []
    step = 0
    evaluated: float | None = None

    def evaluate_all(with_train: bool, with_test: bool = True) -> None:
        if with_train:
            loss, metric = evaluate(model, objective, batches.measured())
            run.train.append(step, run.seconds, loss, metric)
        held_out = list(batches.held_out()) if with_test else []
        if held_out:
            loss, metric = evaluate(model, objective, held_out)
            run.test.append(step, run.seconds, loss, metric)

    try:
        stream = batches.training(schedule.seed)
        while not schedule.is_over(step, run.seconds):
            inputs, targets = next(stream)
            if schedule.is_due(step, run.seconds, evaluated):
                evaluate_all(with_train=run.batch is not None)
                evaluated = run.seconds
            device = next(model.parameters()).device
            began = _now(device)
            if takes_closure:
                outputs, loss = _step_by_closure(model, optimizer, objective, inputs, targets)
            else:
                optimizer.zero_grad()
                outputs, loss = objective.forward(model, inputs, targets)
                loss.backward()
                optimizer.step()
            duration = _now(device) - began

            value, metric = loss.item(), objective.metric(outputs.detach(), targets)
            curve = run.train if run.batch is None else run.batch
            curve.append(step, run.seconds, value, metric)
            if not math.isfinite(value) or value > _DIVERGED * max(curve.loss[0], 1e-12):
                run.status = "diverged"
                break
            run.seconds += duration
            durations.append(duration)
            step += 1
            if report is not None:
                report(step if schedule.steps is not None else run.seconds, value, metric)
    except KeyboardInterrupt:
        run.status = "interrupted"
    except Exception as error:  # a user's model or loader may raise anything
        run.status, run.message = "failed", f"{type(error).__name__}: {described(error)}"

    if run.status in ("completed", "interrupted"):
        evaluate_all(with_train=True, with_test=schedule.evaluates)
        if run.status == "completed" and not math.isfinite(run.train.loss[-1]):
            run.status = "diverged"
    run.milliseconds_per_step = 1000 * statistics.median(durations) if durations else None
    return run


def _step_by_closure(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    inputs: Any,
    targets: Any,
) -> tuple[Tensor, Tensor]:
    """Take a step and return outputs and loss before it."""
    found: list[tuple[Tensor, Tensor]] = []

    def closure() -> Any:
        outputs, loss = objective.forward(model, inputs, targets)
        if not found:
            found.append((outputs.detach(), loss.detach()))
        return loss

    optimizer.step(closure)
    return found[0]


@torch.no_grad()
def evaluate(
    model: nn.Module, objective: Objective, batches: Iterable[Batch]
) -> tuple[float, float]:
    """Return mean loss and metric of a model in evaluation mode, its mode put back afterwards.

    Batches count by their samples.
    """
    total = loss = metric = 0.0
    with evaluating(model):
        for inputs, targets in batches:
            outputs, value = objective.forward(model, inputs, targets)
            samples = count_samples(inputs)
            loss += value.item() * samples
            metric += objective.metric(outputs, targets) * samples
            total += samples
    return loss / total, metric / total


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
