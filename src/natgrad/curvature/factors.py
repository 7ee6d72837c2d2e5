"""Kronecker factors: one symmetric matrix per group, ``(G, d, d)``, or its diagonal ``(G, d)``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from natgrad import linalg
from natgrad.jacobians import LayerJacobian, LinearJacobian
from natgrad.jacobians.layer import WeightSharing
from natgrad.layouts import BlockLayout

__all__ = [
    "discounted_sum",
    "eigenbasis",
    "enough_rows",
    "factor_diagonal",
    "multiply_left",
    "multiply_right",
    "pi_shifts",
    "pseudo_inverse",
    "random_subset",
    "rotate",
    "rotate_back",
    "shifted_inverse",
    "solve_rows",
    "with_enough_rows",
]


def discounted_sum(total: Tensor | None, part: Tensor | None, discount: float) -> Tensor | None:
    """Return ``discount · total + part``, either of which may be missing."""
    if total is None:
        return part
    return total * discount if part is None else torch.add(part, total, alpha=discount)


def random_subset(size: int, count: int, seed: int, device: torch.device) -> Tensor:
    """Return ``count`` of the indices below ``size``, drawn uniformly, in ascending order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(size, generator=generator)[:count].sort().values.to(device)


def enough_rows(layout: BlockLayout, rows_per_unit: float | None) -> int | None:
    """Return how many rows suffice for a layer's factors; None where all are taken."""
    if rows_per_unit is None:
        return None
    return math.ceil(rows_per_unit * max(layout.d_augmented, layout.d_out))


def with_enough_rows(
    rows: LayerJacobian, rows_per_unit: float | None, weight_sharing: WeightSharing, seed: int
) -> LayerJacobian:
    """Return rows at a random subset of positions where there are more than enough.

    Args:
        rows: The layer's rows.
        rows_per_unit: Rows that suffice, per unit of the larger factor; None for all.
        weight_sharing: "reduce" sums over positions, so that none may be left out.
        seed: Seed of the subset.
    """
    limit = enough_rows(rows.layout, rows_per_unit)
    if limit is None or weight_sharing == "reduce" or not isinstance(rows, LinearJacobian):
        return rows
    kept = max(1, -(-limit // rows.samples))
    if kept >= rows.positions:
        return rows
    return rows.subsampled(random_subset(rows.positions, kept, seed, rows.device))


def multiply_left(factor: Tensor, matrices: Tensor) -> Tensor:
    """Return ``X M`` for matrices ``(..., G, d, e)``."""
    return factor @ matrices if factor.dim() == 3 else factor.unsqueeze(-1) * matrices


def multiply_right(matrices: Tensor, factor: Tensor) -> Tensor:
    """Return ``M X`` for matrices ``(..., G, e, d)``."""
    return matrices @ factor if factor.dim() == 3 else matrices * factor.unsqueeze(-2)


def factor_diagonal(factor: Tensor) -> Tensor:
    """Return the diagonal, ``(G, d)``."""
    return factor.diagonal(dim1=-2, dim2=-1) if factor.dim() == 3 else factor


def pi_shifts(a: Tensor, b: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Return ``π√λ`` for A and ``√λ/π`` for B, ``π² = (tr A/d_a)/(tr B/d_g)``, ``(G,)`` each."""
    mean_a, mean_b = factor_diagonal(a).mean(-1), factor_diagonal(b).mean(-1)
    both = (mean_a > 0) & (mean_b > 0)
    one = torch.ones_like(mean_a)
    pi = torch.where(both, (mean_a / torch.where(both, mean_b, one)).sqrt(), one)
    root = damping**0.5
    return root * pi, root / pi


def shifted_inverse(factor: Tensor, shift: Tensor) -> Tensor:
    """Return ``(X + shift I)⁻¹`` per group; the pseudo-inverse where nothing is added."""
    if bool((shift == 0).all()):
        return pseudo_inverse(factor)
    if factor.dim() == 2:
        return 1.0 / (factor + shift.unsqueeze(-1))
    return linalg.inverse(linalg.add_to_diagonal(factor, shift))


def solve_rows(rows: Tensor, factor: Tensor, shift: Tensor, count: Tensor | float) -> Tensor:
    """Return ``x (X + shift I)⁻¹`` for rows x, ``(..., G, d)``, of a factor per group.

    Where the factor is ``Σ x xᵀ/count`` of just these rows, and they are fewer than d, their Gram
    matrix is inverted instead: ``x (xᵀx/count + ρI)⁻¹ = (xxᵀ/count + ρI)⁻¹x``.
    """
    grouped = rows.movedim(-2, 0)
    x = grouped.flatten(1, -2)  # (G, R, d)
    if factor.dim() == 3 and x.shape[1] < x.shape[2] and _is_moment_of(factor, x, count):
        solved = shifted_inverse(x @ x.mT / count, shift) @ x
    else:
        inverse = shifted_inverse(factor, shift)
        solved = x @ inverse if inverse.dim() == 3 else x * inverse.unsqueeze(-2)
    return solved.view(grouped.shape).movedim(0, -2)


def _is_moment_of(factor: Tensor, x: Tensor, count: Tensor | float) -> bool:
    """Check with a random vector whether a factor is ``xᵀx/count``."""
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(x.shape[2], 1, generator=generator, dtype=x.dtype).to(x.device)
    expected = x.mT @ (x @ probe) / count
    difference = (factor @ probe - expected).norm()
    return bool(difference <= torch.finfo(x.dtype).eps ** 0.5 * expected.norm())


def eigenbasis(factor: Tensor) -> tuple[Tensor | None, Tensor]:
    """Return eigenvectors (None for a diagonal factor) and eigenvalues, negatives cut to 0."""
    if factor.dim() == 2:
        return None, factor
    values, vectors = linalg.eigh(factor)
    return vectors, values.clamp(min=0.0)


def rotate(left: Tensor | None, matrices: Tensor, right: Tensor | None) -> Tensor:
    """Return ``U_Lᵀ M U_R``; None stands for the identity."""
    rotated = matrices if left is None else left.mT @ matrices
    return rotated if right is None else rotated @ right


def rotate_back(left: Tensor | None, matrices: Tensor, right: Tensor | None) -> Tensor:
    """Return ``U_L M U_Rᵀ``; None stands for the identity."""
    rotated = matrices if left is None else left @ matrices
    return rotated if right is None else rotated @ right.mT


def pseudo_inverse(factor: Tensor) -> Tensor:
    """Return the pseudo-inverse of a factor, in the same form."""
    basis, values = eigenbasis(factor)
    inverse = linalg.inverse_on_range(values)
    if basis is None:
        return inverse
    return (basis * inverse.unsqueeze(-2)) @ basis.mT
