"""What a comparison found: plain data that converts to and from JSON.

The fields and their meaning are documented in ``docs/results-schema.md``; change both together and
raise `SCHEMA_VERSION` when a reader of the old form would misread the new one.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from torch.utils._pytree import tree_map_only

from natgrad.experiments.config import ConfigError

SCHEMA_VERSION = 1

Status = Literal["completed", "diverged", "failed", "interrupted", "not run"]


@dataclass
class Curve:
    """Measurements along a training run; entry i was taken before step ``step[i]``."""

    step: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)

    def append(self, step: int, seconds: float, loss: float, accuracy: float) -> None:
        """Add one measurement."""
        for values, value in zip(vars(self).values(), (step, seconds, loss, accuracy), strict=True):
            values.append(value)

    def until(self, target: float | None) -> tuple[int, float] | tuple[None, None]:
        """Return steps and seconds until a loss of at most `target` is first measured, if it is."""
        found = (i for i, loss in enumerate(self.loss) if target is not None and loss <= target)
        return next(((self.step[i], self.seconds[i]) for i in found), (None, None))


@dataclass
class Trial:
    """One run of the learning-rate search; its loss is NaN if the run diverged."""

    learning_rate: float
    loss: float


@dataclass
class Search:
    """The learning-rate search of one method, its trials in the order of their learning rates.

    Every trial takes so many steps, or seconds of training.
    """

    steps: int | None
    trials: list[Trial] = field(default_factory=list)
    seconds: float | None = None


@dataclass
class Run:
    """What one training run measured."""

    status: Status = "not run"
    message: str = ""
    train: Curve = field(default_factory=Curve)
    test: Curve = field(default_factory=Curve)
    batch: Curve | None = None
    seconds: float = 0.0
    milliseconds_per_step: float | None = None
    steps_to_target: int | None = None
    seconds_to_target: float | None = None

    @property
    def final_loss(self) -> float:
        """The last training loss on the full set; NaN if the run did not complete."""
        return self.train.loss[-1] if self.status == "completed" else math.nan


@dataclass(kw_only=True)
class Repeat(Run):
    """One more run of a method, with another seed."""

    seed: int


@dataclass(kw_only=True)
class MethodResult(Run):
    """The outcome of one method: its run with the first seed, and those with further ones."""

    name: str
    title: str
    family: str
    description: str
    steps: int | None
    damping: float | None
    learning_rate: float | None = None
    learning_rate_source: str | None = None
    learning_rate_seconds: float = 0.0
    theory_learning_rate: float | None = None
    measured_learning_rate: float | None = None
    search: Search | None = None
    peak_memory_bytes: int | None = None
    repeats: list[Repeat] = field(default_factory=list)

    @property
    def steps_taken(self) -> int | None:
        """Steps it was to take, or with a budget in seconds those it took."""
        return self.steps or (self.train.step[-1] if self.train.step else None)

    @property
    def runs(self) -> list[MethodResult | Repeat]:
        """The runs with all seeds."""
        return [self, *self.repeats]


@dataclass
class QualityPoint:
    """The quality of one approximation's update at one point of a training run."""

    step: int
    structure: str
    fisher: str
    share: float | None


@dataclass
class Target:
    """The training loss that steps and seconds are counted to, and where it comes from."""

    loss: float | None
    rule: str


@dataclass(kw_only=True)
class JobResults:
    """What the results of every job say: when, how long, with what options, data and machine."""

    created: str
    seconds: float
    interrupted: bool
    command: str
    config: dict[str, Any]
    data: dict[str, Any]
    environment: dict[str, Any]

    def to_json(self) -> str:
        """Return the results as strict JSON; NaN and infinite numbers become null."""
        return json.dumps(strict(dataclasses.asdict(self)), indent=1, allow_nan=False) + "\n"


@dataclass(kw_only=True)
class Results(JobResults):
    """Everything a comparison found."""

    model: dict[str, Any]
    metric: str
    target: Target
    methods: list[MethodResult]
    quality: list[QualityPoint] = field(default_factory=list)
    schema_version: int = SCHEMA_VERSION


def read_results(path: Path) -> Results:
    """Read the results of a comparison from its JSON file; null numbers become NaN.

    A ConfigError says that the file does not hold such.
    """
    try:
        found: Results = _restored(Results, json.loads(path.read_text(encoding="utf-8")))
        return found
    except (OSError, TypeError, KeyError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{path} does not hold results of natgrad compare: {error}: leave out --resume, or "
            "give another --output."
        ) from error


def _restored(kind: Any, value: Any) -> Any:
    """Return a value of a type from its JSON form."""
    if dataclasses.is_dataclass(kind):
        kinds = get_type_hints(kind)
        return kind(**{key: _restored(kinds[key], item) for key, item in value.items()})  # type: ignore[operator]
    if get_origin(kind) in (Union, UnionType):
        return None if value is None else _restored(get_args(kind)[0], value)
    if get_origin(kind) is list:
        return [_restored(get_args(kind)[0], item) for item in value]
    if kind is float:
        return math.nan if value is None else float(value)
    return value


def strict(value: Any, told: Callable[[float], str | None] = lambda number: None) -> Any:
    """Return JSON values with something else, by default null, for infinite numbers and NaN."""
    return tree_map_only(float, lambda one: one if math.isfinite(one) else told(one), value)
