"""Weights that stay on a manifold: directions projected on it, points brought back to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Manifold = Literal["sphere", "stiefel"]


def _sphere_tangent(point: Tensor, direction: Tensor) -> Tensor:
    """Return ``d − (x·d/x·x) x``."""
    return direction - point * ((point * direction).sum() / point.square().sum())


def _sphere_point(point: Tensor) -> Tensor:
    """Return ``x/‖x‖``."""
    direction: Tensor = point / point.norm()
    return direction


def _stiefel_tangent(point: Tensor, direction: Tensor) -> Tensor:
    """Return ``d − x sym(xᵀd)`` for columns, or for rows where there are fewer of these."""
    if point.shape[0] < point.shape[1]:
        return _stiefel_tangent(point.T, direction.T).T
    inner = point.T @ direction
    return direction - point @ (0.5 * (inner + inner.T))


def _stiefel_point(point: Tensor) -> Tensor:
    """Return the nearest matrix with orthonormal columns, or rows: the polar factor."""
    u, _, v = torch.linalg.svd(point, full_matrices=False)
    polar: Tensor = u @ v
    return polar


#: Name → projection of a direction at a point on the tangent space, and of a point on the manifold.
MANIFOLDS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "sphere": (_sphere_tangent, _sphere_point),
    "stiefel": (_stiefel_tangent, _stiefel_point),
}


def projected(manifold: str, point: Tensor, direction: Tensor) -> Tensor:
    """Return the part of a direction that is tangent to a manifold at a point."""
    return MANIFOLDS[manifold][0](point, direction)


def retracted(manifold: str, point: Tensor) -> Tensor:
    """Return the point of a manifold that is nearest to one beside it."""
    return MANIFOLDS[manifold][1](point)
