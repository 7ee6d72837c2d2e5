"""What natgrad would do with a user's model: loading it by name, and measuring its layers."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.capture import Capture
from natgrad.capture.model_output import require_output
from natgrad.jacobians import LayerJacobian, SumJacobian
from natgrad.optim import Preconditioner
from natgrad.optim.summary import Summary, summarize

__all__ = ["InspectionError", "inspect_model", "load_model", "shared_positions"]


class InspectionError(ValueError):
    """A model that cannot be inspected; the message says why."""


def load_model(
    specification: str, device: torch.device | None = None
) -> tuple[nn.Module, tuple[Any, ...] | None]:
    """Import a factory and call it.

    Args:
        specification: ``package.module:factory``, importable from the current folder or the
            environment. The factory takes no arguments and returns a module, or a tuple of a
            module and an example input (a tuple of positional inputs for several).
        device: Where the factory makes its tensors; by default where torch does.

    Returns:
        The model, and the inputs of an example call if the factory gave any.

    Raises:
        InspectionError: If it cannot be imported or called, or returns something else.
    """
    module_name, colon, attribute = specification.partition(":")
    if not colon or not module_name or not attribute:
        raise InspectionError(f"A model is named as package.module:factory, not {specification!r}.")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        importlib.import_module(module_name)
    except Exception as error:  # a user's module may raise anything
        raise InspectionError(f"{module_name} cannot be imported: {_describe(error)}.") from error
    try:
        factory = pkgutil.resolve_name(specification)
    except (AttributeError, ValueError) as error:
        raise InspectionError(f"{module_name} has no attribute {attribute!r}.") from error
    if isinstance(factory, nn.Module):
        return factory, None
    if not callable(factory):
        raise InspectionError(f"{specification} is neither a model nor a function that makes one.")
    try:
        with device or nullcontext():  # The import has been made outside it.
            made = factory()
    except Exception as error:
        raise InspectionError(f"{specification}() fails: {_describe(error)}.") from error
    if isinstance(made, nn.Module):
        return made, None
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module):
        model, example = made
        return model, example if isinstance(example, tuple) else (example,)
    raise InspectionError(
        f"{specification}() returns {type(made).__name__}, but must return a torch.nn.Module, "
        "or one and an example input."
    )


def shared_positions(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, int]:
    """Run a model once, in evaluation mode, and count the positions sharing each block's weights.

    Returns:
        Block name → T: pixels of a convolution, tokens of a sequence, 1 for a plain layer.

    Raises:
        InspectionError: If the model does not accept the inputs.
    """
    training = model.training
    model.eval()
    try:
        with Capture(model) as capture:
            output = require_output(model(*inputs), None)
            jacobians = capture.pull_back(output, torch.ones_like(output).unsqueeze(0))
    except Exception as error:
        raise InspectionError(f"The model fails on the example: {_describe(error)}.") from error
    finally:
        model.train(training)
    return {name: _positions(jacobian) for name, jacobian in jacobians.items()}


def inspect_model(
    model: nn.Module,
    structure: str,
    likelihood: str,
    fisher: str,
    samples: int,
    positions: Mapping[str, int] | None = None,
) -> Summary:
    """Return, layer by layer, what a structure would precondition, and at what cost.

    Args:
        model: The model.
        structure: Structure of the Fisher matrix.
        likelihood: Name of the likelihood.
        fisher: Fisher type.
        samples: Batch size that costs are stated for.
        positions: Block name → positions that share its weights; 1 where unknown.
    """
    try:
        preconditioner = Preconditioner(model, likelihood, structure=structure, fisher=fisher)
    except (ValueError, TypeError) as error:
        raise InspectionError(f"{_describe(error)}.") from error
    return summarize(preconditioner, samples, positions)


def example_input(shape: str) -> tuple[Tensor, ...]:
    """Return a batch of two random inputs of a shape such as ``3,32,32``."""
    try:
        sizes = [int(size) for size in shape.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise InspectionError(f"An input shape is given as sizes, such as 3,32,32, not {shape!r}.")
    return (torch.randn(2, *sizes),)


def _positions(jacobian: LayerJacobian) -> int:
    if isinstance(jacobian, SumJacobian):
        return sum(_positions(part) for part in jacobian.parts)
    return getattr(jacobian, "positions", 1)


def _describe(error: Exception) -> str:
    message = " ".join(str(error).split()).rstrip(".")
    return message or type(error).__name__
