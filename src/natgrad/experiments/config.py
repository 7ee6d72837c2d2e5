"""What a comparison is asked to do, checked before anything runs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import torch

from natgrad.experiments.data import DATASETS
from natgrad.experiments.methods import DEFAULT_METHODS, METHODS
from natgrad.experiments.models import DEFAULT_WIDTHS, MODELS
from natgrad.experiments.objectives import OBJECTIVES
from natgrad.fisher import FISHER_TYPES

__all__ = ["CompareConfig", "Config", "ConfigError", "check_choice", "find_device"]

FULL_BATCH_TRAIN_SAMPLES = 200
FULL_BATCH_FIRST_ORDER_FACTOR = 10


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
        return {
            name: list(value) if isinstance(value, tuple)
            else str(value) if isinstance(value, Path) else value
            for name, value in options.items()
        }  # fmt: skip


@dataclass(frozen=True)
class CompareConfig(Config):
    """Options of one comparison: those of ``natgrad compare``, whose help explains them.

    None stands for the default that the help states, for `batch_size` for full batches.

    Raises:
        ConfigError: If an option is out of range or they do not go together.
    """

    data: str = "digits"
    data_dir: Path | None = None
    train_samples: int | None = None
    test_samples: int | None = None
    model: str = "mlp"
    width: int | None = None
    depth: int = 3
    loss: str = "mse"
    methods: tuple[str, ...] = DEFAULT_METHODS
    steps: int = 30
    first_order_steps: int | None = None
    batch_size: int | None = None
    damping: float | None = None
    learning_rates: dict[str, float] = field(default_factory=dict)
    fisher: str | None = None
    search_steps: int | None = None
    target_loss: float | None = None
    eval_every: int | None = None
    quality: bool = True
    seed: int = 0
    device: str = "auto"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Check every option."""
        check_choice("data set", self.data, DATASETS)
        check_choice("model", self.model, MODELS)
        check_choice("loss", self.loss, OBJECTIVES)
        if self.fisher is not None:
            check_choice("Fisher type", self.fisher, FISHER_TYPES)
        check_choice("floating-point type", self.dtype, ("float32", "float64"))
        if not self.methods:
            raise ConfigError("At least one method is needed.")
        for method in self.methods:
            check_choice("method", method, METHODS)
        if len(set(self.methods)) < len(self.methods):
            raise ConfigError("Every method can be named only once.")
        for option in ("steps", "depth"):
            _positive(option, getattr(self, option))
        for option in (
            "width",
            "train_samples",
            "test_samples",
            "batch_size",
            "first_order_steps",
            "search_steps",
            "eval_every",
            "target_loss",
        ):
            if getattr(self, option) is not None:
                _positive(option.replace("_", " "), getattr(self, option))
        if self.model == "cnn" and self.depth < 2:
            raise ConfigError("A cnn needs a depth of at least 2 weight layers.")
        if self.damping is not None and not 0 <= self.damping < float("inf"):
            raise ConfigError(f"The damping must be a number of at least 0, not {self.damping}.")
        for method, rate in self.learning_rates.items():
            check_choice("method", method, METHODS)
            _positive(f"learning rate of {method}", rate)
        if "block-tridiagonal" in self.methods and self.depth % 3 == 2:
            raise ConfigError(
                f"The block-tridiagonal Fisher matrix is singular for {self.depth} weight layers "
                f"(and for every depth 3s + 2): choose --depth {self.depth + 1} or leave "
                "block-tridiagonal out of --methods."
            )
        self.torch_device()

    @property
    def effective_width(self) -> int:
        """The width asked for, or the model's default."""
        return DEFAULT_WIDTHS[self.model] if self.width is None else self.width

    @property
    def effective_first_order_steps(self) -> int:
        """The number of training steps of every first-order method."""
        if self.first_order_steps is not None:
            return self.first_order_steps
        return self.steps * (FULL_BATCH_FIRST_ORDER_FACTOR if self.batch_size is None else 1)

    @property
    def effective_train_samples(self) -> int | None:
        """The number of training samples to draw; None means all."""
        if self.train_samples is None and self.batch_size is None:
            return FULL_BATCH_TRAIN_SAMPLES
        return self.train_samples

    def torch_dtype(self) -> torch.dtype:
        """Return the floating-point type of weights and inputs."""
        return {"float32": torch.float32, "float64": torch.float64}[self.dtype]


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


def check_choice(what: str, value: str, choices: object) -> None:
    """Raise a ConfigError that lists the choices unless the value is one of them."""
    names = list(choices)  # type: ignore[call-overload]
    if value not in names:
        raise ConfigError(f"Unknown {what} {value!r}: choose one of {', '.join(names)}.")


def _positive(what: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ConfigError(f"The {what} must be greater than 0, not {value}.")
