"""Damped linear systems: the damping of every part, and solutions by products alone."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from natgrad.arguments import check_damping
from natgrad.operators import FisherMatrix
from natgrad.optim import RelativeDamping
from natgrad.solvers import ConjugateGradient
from natgrad.solvers.solver import Product


def part_dampings(matrix: FisherMatrix, damping: float | RelativeDamping) -> dict[str, float]:
    """Return part name → λ: the same for all, or a share of the part's own mean eigenvalue."""
    if isinstance(damping, RelativeDamping):
        parts = matrix.parts.items()
        return {n: damping.share * max(0.0, float(f.trace())) / f.shape[0] for n, f in parts}
    check_damping(damping)
    return dict.fromkeys(matrix.parts, float(damping))


def solved(
    multiply: Product, right: Tensor, diagonal: Tensor, tolerance: float, max_iterations: int
) -> Tensor:
    """Return the solution ``(P,)`` by conjugate gradients, scaled by the diagonal.

    Diagonal systems are solved in one iteration; entries of the diagonal that are not positive are
    left unscaled. A warning says if the residual, relative to the right-hand side, stays above the
    tolerance.
    """
    scale = torch.where(diagonal > 0, diagonal, 1.0).rsqrt()
    solver = ConjugateGradient(tolerance, max_iterations)
    found, _ = solver.solve(lambda v: scale * multiply(scale * v), scale * right, {})
    solution = scale * found
    norm = float((scale * right).norm())
    left = float((scale * (multiply(solution) - right)).norm())
    if left > 10 * tolerance * norm:  # Rounding adds to what the iteration knows of it.
        warnings.warn(
            f"conjugate gradients ended at a relative residual of {left / norm:.1e}, not at "
            f"{tolerance:.1e}: raise max_iterations or damping",
            stacklevel=3,
        )
    return solution
