"""What natgrad would do with a user's model, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.capture import Capture
from natgrad.capture.model_output import require_output
from natgrad.experiments.factories import described
from natgrad.jacobians import LayerJacobian, SumJacobian
from natgrad.optim import Preconditioner
from natgrad.optim.summary import Summary, summarize


class InspectionError(ValueError):
    """A model that cannot be inspected; the message says why."""


def shared_positions(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, int]:
    """Run a model once, in evaluation mode, and count the positions sharing each block's weights.

    Block name → T: pixels of a convolution, tokens of a sequence, 1 for a plain layer.
    """
    training = model.training
    model.eval()
    try:
        with Capture(model) as capture:
            output = require_output(model(*inputs), None)
            jacobians = capture.pull_back(output, torch.ones_like(output).unsqueeze(0))
    except Exception as error:
        raise InspectionError(f"The model fails on the example: {described(error)}.") from error
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

    Costs are for a batch of so many samples, and blocks whose positions are not given count as one.
    """
    try:
        preconditioner = Preconditioner(model, likelihood, structure=structure, fisher=fisher)
    except (ValueError, TypeError) as error:
        raise InspectionError(f"{described(error)}.") from error
    return summarize(preconditioner, samples, positions)


def summary_values(summary: Summary, positions: Mapping[str, int] | None) -> dict[str, Any]:
    """Return a summary as JSON values; positions are null where they were not counted."""
    values = asdict(summary)
    for layer in values["layers"]:
        layer["positions"] = (positions or {}).get(layer["name"])
    totals = ("parameters", "covered", "memory", "refresh", "step")
    return {**values, **{name: getattr(summary, name) for name in totals}}


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
