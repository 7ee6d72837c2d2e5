"""Checks of arguments, each with one clear sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import NoReturn

from torch import Tensor


def check_choice(name: str, value: object, *choices: str) -> None:
    """Raise a ValueError unless an option has one of its values."""
    if value not in choices:
        listed = ", ".join(map(repr, choices[:-1]))
        raise ValueError(f"{name} must be {listed} or {choices[-1]!r}, got {value!r}")


def check_damping(damping: float) -> None:
    """Raise a ValueError if a damping is negative or not finite."""
    check_range("damping", damping)


def check_integer(name: str, value: object, least: int = 1) -> None:
    """Raise a ValueError unless a value, Python's or NumPy's, is whole and not below the least."""
    if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def check_kind(name: str, value: object, kind: type) -> None:
    """Raise a TypeError unless an argument is one of natgrad's objects of a kind."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a natgrad.{kind.__name__}, got {value!r}")


def check_parameters(parameters: Mapping[str, Tensor], shards: bool = False) -> None:
    """Raise a ValueError for trainable parameters of no real matrix; ``shards`` may be."""
    for name, parameter in parameters.items():
        if parameter.is_complex():
            raise ValueError(
                f"parameter {name!r} is {parameter.dtype}, and this takes real parameters only: "
                "hold real and imaginary part as two (torch.view_as_real), or freeze it"
            )
        if hasattr(parameter, "_fsdp_flattened"):
            raise ValueError(
                f"parameter {name!r} is part of a flat vector of FullyShardedDataParallel (FSDP1), "
                "of which no part is a matrix to be preconditioned: shard the model with "
                "fully_shard (FSDP2)"
            )
        if hasattr(parameter, "device_mesh") and not shards:
            refuse_shards(f"parameter {name!r}")


def refuse_shards(what: str) -> NoReturn:
    """Raise a ValueError for something that is spread over processes."""
    raise ValueError(
        f"{what} is sharded, as by fully_shard (FSDP2), and whole parameters are needed here on "
        "every process; optimizers of natgrad take such models"
    )


def check_rate(name: str, value: float | Tensor) -> None:
    """Raise a ValueError unless a learning rate is a number, or a tensor of one, of at least 0."""
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(
            f"{name} must be a number or a tensor of one element, got a tensor of shape "
            f"{tuple(value.shape)}"
        )
    check_range(name, float(value))


def check_range(name: str, value: float, below: float = math.inf) -> None:
    """Raise a ValueError unless ``0 <= value < below``."""
    if not is_number(value) or not 0 <= value < below:
        bound = "a finite number >= 0" if below == math.inf else f"in [0, {below:g})"
        raise ValueError(f"{name} must be {bound}, got {value!r}")


def is_number(value: object) -> bool:
    """Return whether something can be compared with a number: a real one, or a tensor of one."""
    return isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)
