"""Conjugate gradients: solutions without a matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from natgrad.arguments import check_integer, check_range
from natgrad.solvers.solver import IterativeSolver, Product


@dataclass(frozen=True)
class ConjugateGradient(IterativeSolver):
    """Solves by conjugate gradients, from the last solution on.

    Attributes:
        tolerance: Residual, relative to the right-hand side, at which the iteration ends.
        max_iterations: Most iterations.
        warm_start: Begin with the last solution instead of zero.

    Raises:
        ValueError: If an option is out of range.

    Source: Martens, Deep learning via Hessian-free optimization (2010), with the Fisher matrix.
    """

    tolerance: float = 1e-3
    max_iterations: int = 50
    warm_start: bool = True

    def __post_init__(self) -> None:
        """Check the options."""
        check_range("tolerance", self.tolerance, below=1.0)
        check_integer("max_iterations", self.max_iterations)

    @property
    def products(self) -> float:
        """Products with the matrix that one solution takes at most."""
        return self.max_iterations + 1

    def solve(
        self, multiply: Product, right: Tensor, state: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return the solution; it is kept in the state for the next one."""
        if not bool(right.any()):
            x = torch.zeros_like(right)  # Beginning elsewhere would never quite end.
            return x, {"last": x}
        start = state.get("last") if self.warm_start else None
        x = torch.zeros_like(right) if start is None else start
        residual = right if start is None else right - multiply(x)
        direction, square = residual, residual.square().sum()
        limit = float(right.norm()) * self.tolerance
        for _ in range(self.max_iterations):
            if not float(square) > limit**2:
                break
            product = multiply(direction)
            curvature = (direction * product).sum()
            if not float(curvature) > 0:
                break  # A singular matrix and nothing left in its range.
            step = square / curvature
            x = x + step * direction
            residual = residual - step * product
            following = residual.square().sum()
            direction = residual + (following / square) * direction
            square = following
        return x, {"last": x}
