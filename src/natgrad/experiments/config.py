"""What a comparison is asked to do, checked before anything runs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from natgrad.experiments.data import DATASETS
from natgrad.experiments.methods import DEFAULT_METHODS, METHODS, OWN_METHODS
from natgrad.experiments.models import DEFAULT_WIDTHS, MODELS
from natgrad.experiments.objectives import OBJECTIVES
from natgrad.fisher import FISHER_TYPES
from natgrad.likelihoods.conversion import LIKELIHOODS

FULL_BATCH_TRAIN_SAMPLES = 200
FULL_BATCH_FIRST_ORDER_FACTOR = 10
EVAL_SAMPLES = 2000

#: Defaults of a comparison on a built-in network, and on a model of the user's.
_BUILT_IN_NETWORK: dict[str, Any] = dict(data="digits", model="mlp", depth=3, loss="mse", steps=30)
_BUILT_IN_NETWORK |= {"methods": DEFAULT_METHODS, "quality": True, "dtype": "float32"}
_OWN_MODEL: dict[str, Any] = {"methods": OWN_METHODS, "steps": 200, "quality": False}


class ConfigError(ValueError):
    """A request that cannot be carried out; the message says what to change."""


class Config:
    """What the options of all jobs have in common; a dataclass derives from it."""

    device: str

    def torch_device(self) -> torch.device:
        """Return the device to run on."""
        return find_device(self.device)

    def as_dict(self) -> dict[str, object]:
        """Return the options as JSON values."""
        options = dataclasses.asdict(self)  # type: ignore[call-overload]
        values: dict[str, object] = json.loads(json.dumps(options, default=str))
        return values


@dataclass(frozen=True)
class CompareConfig(Config):
    """Options of one comparison: those of ``natgrad compare``, whose help explains them.

    None stands for the default that the help states, for `batch_size` for full batches. Where the
    default is the same for all comparisons of a kind, `__post_init__` puts it in the place of None,
    and raises a `ConfigError` if an option is out of range or they do not go together.
    """

    factory: str | None = None
    data: str | None = None
    data_dir: Path | None = None
    train_samples: int | None = None
    test_samples: int | None = None
    eval_samples: int | None = None
    model: str | None = None
    width: int | None = None
    depth: int | None = None
    loss: str | None = None
    likelihood: str | None = None
    metric: str | None = None
    methods: tuple[str, ...] | None = None
    steps: int | None = None
    seconds: float | None = None
    first_order_steps: int | None = None
    batch_size: int | None = None
    damping: float | None = None
    learning_rates: dict[str, float] = field(default_factory=dict)
    fisher: str | None = None
    search_steps: int | None = None
    target_loss: float | None = None
    eval_every: int | None = None
    quality: bool | None = None
    seed: int = 0
    seeds: int = 1
    device: str = "auto"
    dtype: str | None = None

    def __post_init__(self) -> None:
        """Put defaults in the place of None, and check every option."""
        self._check_kind()
        defaults = _BUILT_IN_NETWORK if self.factory is None else _OWN_MODEL
        if self.seconds is not None:
            if self.steps is not None or self.first_order_steps is not None:
                raise ConfigError("A budget is given in steps or in seconds, not in both.")
            defaults = {**defaults, "steps": None, "quality": False}
        if self.own_data:
            defaults = {**defaults, "eval_samples": EVAL_SAMPLES}
        for option, default in defaults.items():
            if getattr(self, option) is None:
                object.__setattr__(self, option, default)
        named: list[tuple[str, str | None, Iterable[str]]] = [
            ("model", self.model, MODELS),
            ("loss", self.loss if self.factory is None else None, OBJECTIVES),
            ("data set", None if self.own_data else self.data, DATASETS),
            ("likelihood", self.likelihood, LIKELIHOODS),
            ("Fisher type", self.fisher, FISHER_TYPES),
            ("floating-point type", self.dtype, ("float32", "float64")),
            *(("method", name, METHODS) for name in (*(self.methods or ()), *self.learning_rates)),
        ]
        for what, value, choices in named:
            if value is not None:
                check_choice(what, value, choices)
        if not self.methods:
            raise ConfigError("At least one method is needed.")
        if len(set(self.methods)) < len(self.methods):
            raise ConfigError("Every method can be named only once.")
        for option, value in vars(self).items():
            if type(value) in (int, float) and option not in ("damping", "seed"):
                _positive(option.replace("_", " "), value)
        if self.model == "cnn" and self.depth is not None and self.depth < 2:
            raise ConfigError("A cnn needs a depth of at least 2 weight layers.")
        if self.damping is not None and not 0 <= self.damping < float("inf"):
            raise ConfigError(f"The damping must be a number of at least 0, not {self.damping}.")
        for method, rate in self.learning_rates.items():
            _positive(f"learning rate of {method}", rate)
        if "block-tridiagonal" in self.methods and self.depth is not None and self.depth % 3 == 2:
            raise ConfigError(
                f"The block-tridiagonal Fisher matrix is singular for {self.depth} weight layers "
                f"(and for every depth 3s + 2): choose --depth {self.depth + 1} or leave "
                "block-tridiagonal out of --methods."
            )
        self.torch_device()

    def _check_kind(self) -> None:
        """Refuse options of built-in networks and data where these are the user's."""
        if self.factory is None and self.own_data:
            raise ConfigError(
                "Data of your own take a model of your own: natgrad compare "
                f"package.module:factory --data {self.data}."
            )
        if self.factory is not None and self.data is None:
            raise ConfigError(
                "A model of your own takes data: give --data package.module:loader, or the name of "
                f"a built-in data set ({', '.join(DATASETS)})."
            )
        if self.factory is None:
            self._refuse("is for a model of your own.", "likelihood", "metric")
        else:
            self._refuse("describes a built-in network, not your own.", "model", "width", "depth")
            if self.quality:
                raise ConfigError("--quality is measured for built-in networks only.")
        if self.own_data:
            built_in = "data_dir", "train_samples", "test_samples", "batch_size"
            self._refuse("describes built-in data: your loader decides it.", *built_in)
        else:
            self._refuse("is for data of your own; built-in data use all.", "eval_samples")
        if self.quality and self.seconds is not None:
            raise ConfigError("--quality is measured along a budget in steps, not in seconds.")

    def _refuse(self, why: str, *options: str) -> None:
        for option in options:
            if getattr(self, option) is not None:
                raise ConfigError(f"--{option.replace('_', '-')} {why}")

    @property
    def own_data(self) -> bool:
        """Whether the data are a user's."""
        return self.data is not None and ":" in self.data

    @property
    def full_batch(self) -> bool:
        """Whether every step sees the whole training set."""
        return self.batch_size is None and not self.own_data

    @property
    def effective_width(self) -> int | None:
        """The width asked for, or the built-in network's default."""
        if self.model is None or self.width is not None:
            return self.width
        return DEFAULT_WIDTHS[self.model]

    @property
    def effective_first_order_steps(self) -> int | None:
        """The number of training steps of every first-order method; None for seconds."""
        if self.first_order_steps is not None or self.steps is None:
            return self.first_order_steps
        return self.steps * (FULL_BATCH_FIRST_ORDER_FACTOR if self.full_batch else 1)

    @property
    def effective_train_samples(self) -> int | None:
        """The number of training samples to draw from a built-in data set; None means all."""
        if self.train_samples is None and self.batch_size is None:
            return FULL_BATCH_TRAIN_SAMPLES
        return self.train_samples

    def torch_dtype(self) -> torch.dtype | None:
        """Return the floating-point type of weights and inputs; None for the user's own."""
        found: torch.dtype | None = getattr(torch, self.dtype or "", None)
        return found


def find_device(name: str) -> torch.device:
    """Return the device of a name, or say that there is none; "auto" is a GPU if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"The device {name!r} is not available here.") from error
    return device


def check_choice(what: str, value: str, choices: Iterable[str]) -> None:
    """Raise a ConfigError that lists the choices unless the value is one of them."""
    if value not in (names := list(choices)):
        raise ConfigError(f"Unknown {what} {value!r}: choose one of {', '.join(names)}.")


def _positive(what: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ConfigError(f"The {what} must be greater than 0, not {value}.")
