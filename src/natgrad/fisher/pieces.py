"""Inputs a few samples at a time, where the model gives every sample an output of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.capture.evaluation import call_model, count_samples, take_samples, undisturbed
from natgrad.capture.model_output import require_output, unwrap


def sample_slices(
    model: nn.Module, inputs: Any, size: int, select: Callable[[Any], Any] | None = None
) -> list[slice]:
    """Return which samples of some inputs to take at a time; all of them if they belong together.

    They do where inputs have no common first dimension, where that does not hold the samples, as in
    recurrent layers without ``batch_first``, and where the outputs of some samples depend on which
    others are there, as in a graph or by batch statistics. Two small passes tell.

    Args:
        model: The model, which is left as it was.
        inputs: Its inputs.
        size: How many samples to take at a time, at least 1.
        select: Picks the tensor of interest out of the model's output.

    Returns:
        Slices of the first dimension; ``[slice(None)]`` for all at once.

    Raises:
        ValueError: If there are no samples, or the model does not run on what has no common first
            dimension.
    """
    model = unwrap(model)
    try:
        samples = count_samples(inputs)
    except ValueError as error:
        try:
            samples = len(_output(model, inputs, select))
        except Exception as cause:  # A user's model may raise anything.
            raise error from cause
        if samples == 0:
            raise
        return [slice(None)]
    if samples > size and not _are_apart(model, inputs, min(size, samples - 1), select):
        return [slice(None)]
    starts = range(0, samples, size)
    return [slice(start, min(start + size, samples)) for start in starts]


def piece_of(inputs: Any, samples: slice) -> Any:
    """Return some samples of inputs; for all of them the inputs, as they are."""
    return inputs if samples == slice(None) else take_samples(inputs, samples)


def _output(model: nn.Module, inputs: Any, select: Callable[[Any], Any] | None) -> Tensor:
    with undisturbed(model), torch.no_grad():
        return require_output(call_model(model, inputs), select)


def _are_apart(
    model: nn.Module, inputs: Any, few: int, select: Callable[[Any], Any] | None
) -> bool:
    """Return whether a few samples have the outputs that they have among more of them."""
    found: list[Tensor] = []
    for stop in (few, min(2 * few, count_samples(inputs))):
        try:
            output = _output(model, take_samples(inputs, slice(0, stop)), select)
        except Exception:  # It may raise anything where some inputs are missing.
            return False
        along = [dim for dim, length in enumerate(output.shape[:2]) if length == stop]
        if not along:
            return False
        found.append(output.movedim(along[0], 0)[:few])
    alone, among = found
    bound = torch.finfo(alone.dtype).eps ** 0.5 * among.abs().max()
    return alone.shape == among.shape and bool(((alone - among).abs() <= bound).all())
