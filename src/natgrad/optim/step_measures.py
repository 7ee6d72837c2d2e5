"""The numbers a step depends on, brought to the host at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from natgrad.optim.clipping import clip_scales
from natgrad.optim.preconditioned_groups import PreconditionedGroups
from natgrad.optim.preconditioner import Preconditioner
from natgrad.optim.quadratic_model import (
    BatchFisher,
    QuadraticModel,
    group_grams,
    quadratic_form,
    slopes,
)
from natgrad.replicas import average_over_replicas

__all__ = ["Measures", "damped_model", "group_scales", "measure", "on_host", "predicted_change"]

#: Values measured on the device for one step, by name.
Measures = dict[str, Any]


def measure(
    preconditioner: Preconditioner,
    grouped: PreconditionedGroups,
    directions: Sequence[dict[str, Tensor]],
    gradients: dict[str, Tensor],
    source: dict[str, Tensor],
) -> dict[str, Tensor] | None:
    """Return what the size of a step depends on, on the device; None for a batch without weight.

    Args:
        preconditioner: Where the natural gradient comes from.
        grouped: The parameters the step moves.
        directions: Δ and further directions.
        gradients: Parameter name → gradient of the loss.
        source: What Δ is the preconditioned form of.

    Raises:
        ValueError: If the quadratic model needs a Fisher matrix of the batch and none was seen.
    """
    natural = directions[0]
    if not natural:
        return {}
    batch, options = preconditioner.batch_fisher, grouped.options
    if preconditioner.keeps_batch_fisher:
        if batch is None and preconditioner.saw_pass:
            return None
        if batch is None:
            preconditioner.skip()
            raise ValueError(
                "no backward pass through the model's output was seen, so there is no Fisher "
                "matrix of the batch for the quadratic model: call the model itself (not its "
                "parts), pass output=lambda out: ... if the output is not the first tensor, or "
                "call update_fisher(output) before loss.backward()"
            )
    inner = preconditioner.inner_product(natural, source)
    measures: dict[str, Tensor] = {}
    if options.uses_model and batch is not None:
        measures["fisher"] = batch.gram(directions)
        measures["slopes"] = slopes(directions, gradients)
    elif any(group["kl_clip"] is not None for group in grouped.groups):
        structure = preconditioner.structure
        if options.graft is None:
            measures["quadratic"] = structure.quadratic(natural, inner)
        else:
            column = structure.layout.to_column(natural)
            measures["quadratic"] = (column * (structure @ column)).sum()
    average_over_replicas(measures)
    if options.uses_model or options.norm_clip is not None:
        measures["grams"] = group_grams(directions, grouped.group_names)
    return {"inner": inner, **measures}


def on_host(values: dict[str, Tensor]) -> Measures | None:
    """Return measures as floats and nested lists, or None if anything about them is not finite.

    This is the only place where a step waits for the device.
    """
    scalars = [value.double().reshape(-1) for value in values.values()]
    numbers: list[float] = torch.cat(scalars).tolist()
    if not all(map(math.isfinite, numbers)):
        return None
    result: Measures = {}
    for name, value in values.items():
        size = value.numel()
        piece, numbers = numbers[:size], numbers[size:]
        whole = value.dim() > 0
        result[name] = (
            torch.tensor(piece, dtype=torch.float64).view(value.shape).tolist()
            if whole
            else piece[0]
        )
    return result


def damped_model(measures: Measures, dampings: Sequence[float]) -> QuadraticModel:
    """Return the quadratic model, with the damping of every group."""
    grams = torch.tensor(measures["grams"], dtype=torch.float64)
    weights = torch.tensor(dampings, dtype=torch.float64)
    damping = torch.einsum("g,gij->ij", weights, grams).tolist()
    return QuadraticModel(measures["fisher"], damping, measures["slopes"])


def group_scales(
    measures: Measures, coefficients: Sequence[float], grouped: PreconditionedGroups
) -> list[float]:
    """Return the factor, at most 1, by which the clips shorten every group's step.

    Args:
        measures: What was measured of the directions.
        coefficients: Those of the step along them.
        grouped: The parameters the step moves.
    """
    quadratic, squares = abs(measures.get("quadratic", 0.0)), None
    if "fisher" in measures:
        quadratic = quadratic_form(coefficients, measures["fisher"])
    if "grams" in measures:
        squares = [quadratic_form(coefficients, gram) for gram in measures["grams"]]
    return clip_scales(grouped.groups, quadratic, squares, grouped.options.norm_clip)


def predicted_change(
    batch: BatchFisher,
    grouped: PreconditionedGroups,
    step: dict[str, Tensor],
    gradients: dict[str, Tensor],
) -> float:
    """Return what the quadratic model predicts for a step, ``M(δ) − M(0)``.

    Args:
        batch: The Fisher matrix of the batch.
        grouped: The parameters the step moves.
        step: Parameter name → δ.
        gradients: Parameter name → gradient of the loss.
    """
    measures = {"fisher": batch.gram([step]), "slopes": slopes([step], gradients)}
    average_over_replicas(measures)
    lists: Measures = {name: value.tolist() for name, value in measures.items()}
    lists["grams"] = group_grams([step], grouped.group_names).tolist()
    return damped_model(lists, grouped.dampings).value([1.0])
