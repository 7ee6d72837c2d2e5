"""The exact natural gradient by conjugate gradients, without a matrix."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from natgrad.curvature.base import refuse_options
from natgrad.curvature.cost import Cost, Workload
from natgrad.curvature.full import FullFisher
from natgrad.curvature.matrix_free import MatrixFreeRows
from natgrad.curvature.partitioned import CurvaturePart
from natgrad.curvature.registry import register_structure
from natgrad.layouts import BlockLayout, ParameterLayout

__all__ = ["ConjugateGradientFisher"]


class ConjugateGradientPart(MatrixFreeRows):
    """Solves by conjugate gradients, from the last solution on.

    Args:
        blocks: Block name → layout.
        layout: Order of all trainable parameters.
        tolerance: Residual, relative to the gradient, at which the iteration ends.
        max_iterations: Most iterations.
        warm_start: Begin with the last solution instead of zero.
    """

    def __init__(
        self,
        blocks: dict[str, BlockLayout],
        layout: ParameterLayout,
        tolerance: float,
        max_iterations: int,
        warm_start: bool,
    ) -> None:
        super().__init__(blocks, layout)
        self.tolerance, self.max_iterations = tolerance, max_iterations
        self.warm_start = warm_start
        self._last: Tensor | None = None

    def approximate_solution(self, gradient: Tensor) -> Tensor:
        """Return the solution; the last one is kept for the next step."""
        if not bool(gradient.any()):
            self._last = torch.zeros_like(gradient)  # Beginning elsewhere would never quite end.
            return self._last
        start = self._last if self.warm_start else None
        x = torch.zeros_like(gradient) if start is None else start
        residual = gradient if start is None else gradient - self.damped_product(x)
        direction, square = residual, residual.square().sum()
        limit = float(gradient.norm()) * self.tolerance
        for _ in range(self.max_iterations):
            if not float(square) > limit**2:
                break
            product = self.damped_product(direction)
            curvature = (direction * product).sum()
            if not float(curvature) > 0:
                break  # A singular matrix and nothing left in its range.
            step = square / curvature
            x = x + step * direction
            residual = residual - step * product
            following = residual.square().sum()
            direction = residual + (following / square) * direction
            square = following
        self._last = x
        return x

    def cost(self, workload: Workload) -> Cost:
        """Return the cost of all iterations."""
        return self.products_cost(workload, self.max_iterations + 1)

    def state_dict(self) -> dict[str, Any]:
        """Return count and last solution."""
        return {**super().state_dict(), "last": self._last}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore them."""
        super().load_state_dict(state, device)
        self._last = None if state["last"] is None else state["last"].to(device)


@register_structure
class ConjugateGradientFisher(FullFisher):
    """The exact Fisher matrix, solved by conjugate gradients when it preconditions.

    Memory is that of the factored rows; a step costs two products with them per iteration
    (Martens 2010, with the Fisher matrix in place of the Hessian).

    Options: ``tolerance`` (default 1e-3), ``max_iterations`` (50) and ``warm_start`` (True) of
    :class:`ConjugateGradientPart`.
    """

    structure: ClassVar[str] = "conjugate_gradient"

    def make_parts(
        self,
        tolerance: float = 1e-3,
        max_iterations: int = 50,
        warm_start: bool = True,
        **options: Any,
    ) -> dict[str, CurvaturePart]:
        """Return one part with every block.

        Raises:
            ValueError: If an option is out of range.
            TypeError: If an option is unknown.
        """
        refuse_options(self.structure, options)
        if not 0 <= tolerance < 1:
            raise ValueError(f"tolerance must be in [0, 1), got {tolerance}")
        if max_iterations < 1:
            raise ValueError(f"max_iterations must be at least 1, got {max_iterations}")
        part = ConjugateGradientPart(
            self.blocks, self.layout, tolerance, max_iterations, warm_start
        )
        return {"all layers": part}
