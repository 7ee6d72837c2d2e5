"""What a comparison found: plain data that converts to and from JSON.

The fields and their meaning are documented in ``docs/results-schema.md``; change both together and
raise `SCHEMA_VERSION` when a reader of the old form would misread the new one.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = [
    "SCHEMA_VERSION",
    "Curve",
    "MethodResult",
    "QualityPoint",
    "Results",
    "Search",
    "Target",
    "Trial",
    "to_json",
]

SCHEMA_VERSION = 1

Status = Literal["completed", "diverged", "failed", "interrupted", "not run"]


@dataclass
class Curve:
    """Measurements along a training run; entry i was taken before step ``step[i]``.

    Attributes:
        step: Steps taken so far.
        seconds: Seconds spent in training so far.
        loss: Mean loss.
        accuracy: Fraction of samples classified correctly.
    """

    step: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)

    def append(self, step: int, seconds: float, loss: float, accuracy: float) -> None:
        """Add one measurement."""
        self.step.append(step)
        self.seconds.append(seconds)
        self.loss.append(loss)
        self.accuracy.append(accuracy)

    def first_below(self, target: float) -> int | None:
        """Return the index of the first measurement with a loss of at most `target`, or None."""
        return next((i for i, loss in enumerate(self.loss) if loss <= target), None)


@dataclass
class Trial:
    """One run of the learning-rate search.

    Attributes:
        learning_rate: The learning rate tried.
        loss: Training loss at the end; NaN if the run diverged.
    """

    learning_rate: float
    loss: float


@dataclass
class Search:
    """The learning-rate search of one method.

    Attributes:
        steps: Training steps per trial.
        trials: Every trial, in the order of their learning rates.
    """

    steps: int
    trials: list[Trial]


@dataclass
class MethodResult:
    """The outcome of one method.

    Attributes:
        name: Its name in the registry.
        title: Its name in tables.
        family: "first-order" or "natural".
        description: What it does, in one sentence.
        steps: Training steps it was to take.
        status: How its run ended.
        message: Why it failed, or what it warned of; empty otherwise.
        learning_rate: The learning rate used.
        learning_rate_source: "search", "theory", "measured", "default" or "given".
        learning_rate_seconds: Seconds spent on choosing the learning rate; not part of `seconds`.
        theory_learning_rate: 1/α where the theory has an α for the method.
        measured_learning_rate: The rate that minimises the quadratic model along the first
            direction.
        damping: The damping used; None for first-order methods.
        search: The learning-rate search, for methods that had one; its time is in
            `learning_rate_seconds`.
        train: Loss and accuracy on the full training set.
        test: Loss and accuracy on the test set.
        batch: Loss and accuracy of each mini-batch; None with full batches.
        seconds: Seconds spent in training.
        milliseconds_per_step: Median over the steps.
        peak_memory_bytes: Peak memory above the level before the model was built.
        steps_to_target: Steps until the training loss reached the target; None if it did not.
        seconds_to_target: Seconds until then.
    """

    name: str
    title: str
    family: str
    description: str
    steps: int = 0
    status: Status = "not run"
    message: str = ""
    learning_rate: float | None = None
    learning_rate_source: str | None = None
    learning_rate_seconds: float = 0.0
    theory_learning_rate: float | None = None
    measured_learning_rate: float | None = None
    damping: float | None = None
    search: Search | None = None
    train: Curve = field(default_factory=Curve)
    test: Curve = field(default_factory=Curve)
    batch: Curve | None = None
    seconds: float = 0.0
    milliseconds_per_step: float | None = None
    peak_memory_bytes: int | None = None
    steps_to_target: int | None = None
    seconds_to_target: float | None = None


@dataclass
class QualityPoint:
    """The quality of one approximation's update at one point of a training run.

    Attributes:
        step: Steps taken so far.
        structure: Structure of the approximation.
        fisher: Its Fisher type.
        share: The largest decrease of the loss along its update that the quadratic model allows,
            relative to that along the exact natural gradient; None if the update failed.
    """

    step: int
    structure: str
    fisher: str
    share: float | None


@dataclass
class Target:
    """The training loss that steps and seconds are counted to.

    Attributes:
        loss: The loss; None if there is none to speak of.
        rule: Where it comes from, in words.
    """

    loss: float | None
    rule: str


@dataclass
class Results:
    """Everything a comparison found.

    Attributes:
        created: Time of the start, UTC, ISO 8601.
        seconds: Time of the whole comparison.
        interrupted: Whether it was stopped before its end.
        command: The command line that repeats it.
        config: The options, as asked for.
        data: Name, title, sizes and number of classes of the data set.
        model: Name, width, depth, number of parameters and text of the network.
        environment: Versions and machine.
        target: The loss that steps and seconds are counted to.
        methods: One entry per method, in the order asked for.
        quality: The quality of every approximation's update along the run of the first method;
            empty if that was not asked for or the run did not complete.
        schema_version: Version of this form.
    """

    created: str
    seconds: float
    interrupted: bool
    command: str
    config: dict[str, Any]
    data: dict[str, Any]
    model: dict[str, Any]
    environment: dict[str, Any]
    target: Target
    methods: list[MethodResult]
    quality: list[QualityPoint] = field(default_factory=list)
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        """Return the results as JSON; NaN and infinite numbers become null."""
        return to_json(dataclasses.asdict(self))


def to_json(value: Any) -> str:
    """Return strict JSON, with null for numbers that are not finite."""
    return json.dumps(_finite(value), indent=1, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
