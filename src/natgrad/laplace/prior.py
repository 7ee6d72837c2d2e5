"""The Gaussian prior: its precision, one for all layers or one for each, and its mean."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from natgrad.arguments import is_number
from natgrad.layouts import ParameterLayout


def checked_precision(value: Any) -> float:
    """Return a prior precision as a number; a ValueError unless it is positive and finite."""
    if isinstance(value, (Mapping, str)) or not 0 < float(value) < math.inf:
        raise ValueError(f"prior_precision must be positive and finite, got {value}")
    return float(value)


def checked_precisions(value: Any, layers: Collection[str]) -> float | dict[str, float]:
    """Return a prior precision as a number, or as one for each layer, which must be those named."""
    if not isinstance(value, Mapping):
        return checked_precision(value)
    check_layers(value, layers)
    return {name: checked_precision(value[name]) for name in layers}


def check_layers(value: Mapping[str, Any], layers: Collection[str]) -> None:
    """Raise a ValueError unless a mapping has the names of the layers."""
    if set(value) != set(layers):
        raise ValueError(
            f"prior_precision must be one number, or have one for each layer {list(layers)}, got "
            f"them for {list(value)}"
        )


def checked_center(value: Any) -> float:
    """Return a prior mean that is one number; a ValueError unless it is finite."""
    if not is_number(value) or not math.isfinite(value):
        raise ValueError(
            "prior_mean must be a finite number, or parameter name → tensor, got "
            f"{reprlib.repr(value)}"
        )
    return float(value)


def checked_mean(value: float | Mapping[str, Tensor], layout: ParameterLayout) -> Tensor:
    """Return a prior mean, one number or a tensor by parameter name, as a flat vector ``(P,)``.

    A parameter without one, or with one of another shape or not finite, is a ValueError.
    """
    if not isinstance(value, Mapping):
        return torch.full_like(layout.zeros(layout.numel), checked_center(value))
    for name, shape in layout.shapes.items():
        found = tuple(value[name].shape) if name in value else None
        if found != shape:
            raise ValueError(
                f"prior_mean must have a tensor of shape {shape} for parameter {name!r}, got "
                f"{'none' if found is None else f'one of shape {found}'}"
            )
    tensors = {name: value[name].detach().to(layout.device) for name in layout.names}
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"prior_mean must be finite, and that of parameter {name!r} is not")
    return layout.to_column(tensors)[:, 0]
