"""One training run: the plain PyTorch loop, with everything worth knowing measured on the side."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.experiments.data import Dataset
from natgrad.experiments.objectives import Objective, accuracy
from natgrad.experiments.results import Curve, Run

__all__ = ["Schedule", "evaluate", "train"]

StepReport = Callable[[int, float, float], None]
"""Called after every step with (steps taken, loss, accuracy); raising stops the run."""

_DIVERGED = 1e6  # a loss this many times the initial one counts as divergence


@dataclass(frozen=True)
class Schedule:
    """How long and in what portions to train.

    Attributes:
        steps: The number of steps.
        batch_size: Samples per step; None takes all at every step.
        evaluations: Numbers of steps after which the model is evaluated, 0 for before the first.
            After the last step it is evaluated in any case, but without any here on the training
            loss alone.
        seed: Seed of the order of the samples.
    """

    steps: int
    batch_size: int | None = None
    evaluations: frozenset[int] = frozenset()
    seed: int = 0


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    data: Dataset,
    schedule: Schedule,
    report: StepReport | None = None,
    takes_closure: bool = False,
) -> Run:
    """Train a model in place and measure it; the clock runs only while it trains.

    With full batches the training curve is the loss of each step, before that step's update, and
    one evaluation after the last. With mini-batches that is the batch curve, and the training curve
    is evaluated on the full set whenever the test curve is.

    Args:
        model: Network on the data's device.
        optimizer: Its optimizer.
        objective: The loss.
        data: Training and test data.
        schedule: Steps, batches and evaluations.
        report: Told of each step.
        takes_closure: Whether the optimizer evaluates the loss by a closure.

    Returns:
        The measurements. A loss that is not finite or 10⁶ times the first one ends the run as
        "diverged", an error in the numerics as "failed", Ctrl-C as "interrupted".
    """
    run = Run("completed", batch=None if schedule.batch_size is None else Curve())
    targets = objective.encode(data.train_labels, data.classes).to(data.train_labels.device)
    durations: list[float] = []
    step = 0

    def evaluate_all(with_train: bool) -> None:
        if with_train:
            loss, correct = evaluate(model, objective, data.train_inputs, data.train_labels)
            run.train.append(step, run.seconds, loss, correct)
        loss, correct = evaluate(model, objective, data.test_inputs, data.test_labels)
        run.test.append(step, run.seconds, loss, correct)

    try:
        for batch in _batches(len(targets), schedule):
            if step in schedule.evaluations:
                evaluate_all(with_train=run.batch is not None)
            inputs, labels, goal = (
                (data.train_inputs, data.train_labels, targets)
                if batch is None
                else (data.train_inputs[batch], data.train_labels[batch], targets[batch])
            )
            began = _now(inputs.device)
            if takes_closure:
                outputs, loss = _step_by_closure(model, optimizer, objective, inputs, goal)
            else:
                optimizer.zero_grad()
                outputs = model(inputs)
                loss = objective(outputs, goal)
                loss.backward()
                optimizer.step()
            duration = _now(inputs.device) - began

            value, correct = loss.item(), accuracy(outputs.detach(), labels)
            curve = run.train if run.batch is None else run.batch
            curve.append(step, run.seconds, value, correct)
            if not math.isfinite(value) or value > _DIVERGED * max(curve.loss[0], 1e-12):
                run.status = "diverged"
                break
            run.seconds += duration
            durations.append(duration)
            step += 1
            if report is not None:
                report(step, value, correct)
    except KeyboardInterrupt:
        run.status = "interrupted"
    except (RuntimeError, ValueError, ArithmeticError) as error:
        run.status, run.message = "failed", f"{type(error).__name__}: {error}"

    if run.status in ("completed", "interrupted"):
        if schedule.evaluations:
            evaluate_all(with_train=True)
        else:
            run.train.append(
                step,
                run.seconds,
                *evaluate(model, objective, data.train_inputs, data.train_labels),
            )
        if run.status == "completed" and not math.isfinite(run.train.loss[-1]):
            run.status = "diverged"
    run.milliseconds_per_step = 1000 * statistics.median(durations) if durations else None
    return run


def _step_by_closure(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    inputs: Tensor,
    goal: Tensor,
) -> tuple[Tensor, Tensor]:
    """Take a step and return outputs and loss before it."""
    found: list[tuple[Tensor, Tensor]] = []

    def closure() -> Any:
        outputs = model(inputs)
        loss = objective(outputs, goal)
        if not found:
            found.append((outputs.detach(), loss.detach()))
        return loss

    optimizer.step(closure)
    return found[0]


@torch.no_grad()
def evaluate(
    model: nn.Module, objective: Objective, inputs: Tensor, labels: Tensor, chunk: int = 2000
) -> tuple[float, float]:
    """Return mean loss and accuracy of a model in evaluation mode, its mode put back afterwards.

    So many samples as `chunk` says go through the model at a time.
    """
    training = model.training
    model.eval()
    loss = correct = 0.0
    for part, truth in zip(inputs.split(chunk), labels.split(chunk), strict=True):
        outputs = model(part)
        goal = objective.encode(truth, outputs.shape[1])
        loss += objective(outputs, goal).item() * len(part)
        correct += accuracy(outputs, truth) * len(part)
    model.train(training)
    return loss / len(inputs), correct / len(inputs)


def _batches(samples: int, schedule: Schedule) -> Iterator[Tensor | None]:
    """Yield `schedule.steps` index tensors, reshuffled each epoch, or None for the full batch."""
    if schedule.batch_size is None:
        yield from [None] * schedule.steps
        return
    generator = torch.Generator().manual_seed(schedule.seed)
    taken = 0
    while True:
        for batch in torch.randperm(samples, generator=generator).split(schedule.batch_size):
            if taken == schedule.steps:
                return
            taken += 1
            yield batch


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
