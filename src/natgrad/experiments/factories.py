"""What users name as ``package.module:attribute``: imported, and called if it is a function."""

from __future__ import annotations

import importlib
import pkgutil
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from natgrad.likelihoods import Likelihood


class FactoryError(ValueError):
    """A name that leads to nothing usable; the message says why."""


class MadeModel(NamedTuple):
    """What a factory of models gave: a model, and its loss or an example input, if it gave one.

    The loss is a module, a function of outputs and targets, a name, or a likelihood.
    """

    model: nn.Module
    criterion: Any = None
    example: tuple[Any, ...] | None = None


def find(specification: str) -> Any:
    """Import what is named ``package.module:attribute`` from the current folder or environment.

    A FactoryError says what is wrong with it.
    """
    module_name, colon, attribute = specification.partition(":")
    if not colon or not module_name or not attribute:
        raise FactoryError(
            f"Code of yours is named as package.module:factory, not {specification!r}."
        )
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        importlib.import_module(module_name)
    except Exception as error:  # a user's module may raise anything
        told = f"{module_name} cannot be imported: {located(error)}."
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{module_name}.".startswith(f"{missing}."):
            told += f" Modules are looked for in {here} and in the environment's packages."
        raise FactoryError(told) from error
    try:
        return pkgutil.resolve_name(specification)
    except (AttributeError, ValueError) as error:
        raise FactoryError(f"{module_name} has no attribute {attribute!r}.") from error


def make(specification: str, function: Callable[[], Any]) -> Any:
    """Call a user's function; a FactoryError says how it failed."""
    try:
        return function()
    except Exception as error:
        raise FactoryError(f"{specification}() fails: {located(error)}.") from error


def load_model(specification: str, device: torch.device | None = None) -> MadeModel:
    """Import ``package.module:factory``, a factory of models, and call it.

    It takes no arguments and returns a module, or a tuple of a module and its loss, or of a module
    and an example input (a tuple of positional inputs for several); a module by itself will do,
    too. Its tensors are made on the device, by default where torch makes them. A FactoryError says
    that it cannot be imported or called, or returns something else.
    """
    factory = find(specification)
    if isinstance(factory, nn.Module):
        return MadeModel(factory)
    if not callable(factory):
        raise FactoryError(f"{specification} is neither a model nor a function that makes one.")
    with device or nullcontext():  # The import has been made outside it.
        made = make(specification, factory)
    if isinstance(made, nn.Module):
        return MadeModel(made)
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module):
        model, other = made
        if isinstance(other, (Tensor, Mapping)):
            return MadeModel(model, example=(other,))
        if isinstance(other, tuple):
            return MadeModel(model, example=other)
        if isinstance(other, (str, Likelihood)) or callable(other):
            return MadeModel(model, criterion=other)
    raise FactoryError(
        f"{specification}() returns {_shown(made)}, but must return a torch.nn.Module, "
        "or one and its loss or an example input."
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, and at the end every module of it in its own again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def described(error: Exception) -> str:
    """Return the message of an error as one line without a full stop, or else its type."""
    message = " ".join(str(error).split()).rstrip(".")
    if isinstance(error, KeyError):  # Its message is the key alone.
        return f"there is no {message}"
    return message or type(error).__name__


def located(error: Exception) -> str:
    """Return the message of an error of a user's code, and the line of that code it came from.

    That is the innermost one below the current folder; without one the message stands alone.
    """
    here, ours = Path.cwd(), Path(__file__).parents[1]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        installed = "site-packages" in path.parts or path.is_relative_to(ours)
        if path.is_relative_to(here) and not installed:
            return f"{described(error)} ({path.relative_to(here)}, line {frame.lineno})"
    return described(error)


def _shown(made: Any) -> str:
    if isinstance(made, tuple):
        return f"a tuple of {', '.join(type(one).__name__ for one in made)}"
    return type(made).__name__
