"""The diagonal of the Fisher matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from natgrad import linalg
from natgrad.curvature.base import GradientSource, refuse_options
from natgrad.curvature.cost import Cost, Workload
from natgrad.curvature.function_space import map_by_columns
from natgrad.curvature.partitioned import CurvaturePart, PartitionedFisher
from natgrad.curvature.registry import register_structure
from natgrad.jacobians import Jacobians
from natgrad.layouts import BlockLayout, ParameterLayout

__all__ = ["DiagonalFisher"]


class DiagonalPart(CurvaturePart):
    """Mean squared rows of one block.

    Args:
        name: Block name.
        layout: Its layout.
        parameters: Order, dtype and device of all parameters.
    """

    def __init__(self, name: str, layout: BlockLayout, parameters: ParameterLayout) -> None:
        self.name = name
        self.parameters = parameters
        self.names, self.sizes, self.numel = layout.names, layout.sizes, layout.numel
        self.shapes = layout.shapes
        self.count = 0.0
        self.sum: Tensor | None = None
        self._inverse: Tensor | None = None

    def update(self, jacobians: Jacobians, count: Tensor | float) -> None:
        """Add ``Σ rows²``; rows that are not finite are left out with their count."""
        total = jacobians[self.name].diagonal() if self.name in jacobians else None
        if total is not None and not bool(torch.isfinite(total).all()):
            return
        self.count += float(count)
        if total is not None:
            self.sum = total if self.sum is None else self.sum + total

    def discount(self, factor: float) -> None:
        """Discount the sum."""
        self.count *= factor
        if self.sum is not None:
            self.sum = self.sum * factor

    def diagonal(self) -> Tensor:
        """Return the diagonal."""
        if self.sum is None or self.count == 0:
            return self.parameters.zeros(self.numel)
        return self.sum / self.count

    def matvec(self, columns: Tensor) -> Tensor:
        """Return ``F_l V``."""
        return self.diagonal().unsqueeze(1) * columns

    def solver(self, damping: float) -> Callable[[Tensor], Tensor]:
        """Divide entry by entry; zero damping leaves out zero entries."""
        diagonal = self.diagonal().unsqueeze(1) + damping
        return lambda columns: torch.where(diagonal > 0, columns / diagonal, 0.0)

    def inverse_root(self, damping: float) -> Callable[[Tensor], Tensor]:
        """Divide by the root entry by entry."""
        root = (self.diagonal().unsqueeze(1) + damping).sqrt()
        return lambda columns: columns / root

    def function_space_map(
        self, rows: Jacobians, other: Jacobians, damping: float
    ) -> dict[str, Tensor]:
        """Return ``J' diag(F + λ)⁻¹ Jᵀ``, by columns."""
        return map_by_columns(self.name, rows, other, self.solver(damping))

    def trace(self) -> Tensor:
        """Return the trace."""
        return self.diagonal().sum()

    def eigenvalues(self) -> Tensor:
        """Return the diagonal."""
        return self.diagonal()

    def to_dense(self) -> Tensor:
        """Return the diagonal matrix."""
        return torch.diag(self.diagonal())

    def refresh(self, damping: float) -> None:
        """Invert ``diagonal + damping``."""
        if self.sum is None:
            return
        inverse = 1.0 / (self.diagonal() + damping)
        if not bool(torch.isfinite(inverse).all()):
            raise linalg.FactorizationError("an entry of the diagonal plus damping is zero")
        self._inverse = inverse

    def precondition(self, source: GradientSource) -> dict[str, Tensor]:
        """Return ``gradient / (diagonal + damping)``."""
        if self._inverse is None:
            return {name: source.gradients[name] for name in self.names}
        pieces = self._inverse.split(list(self.sizes))
        return {
            name: source.gradients[name] * piece.reshape(shape)
            for name, piece, shape in zip(self.names, pieces, self.shapes, strict=True)
        }

    def cost(self, workload: Workload) -> Cost:
        """Return the cost: one square per weight and row, one product per weight."""
        refresh = float(workload.samples) * workload.directions * self.numel
        entry = self.parameters.dtype.itemsize
        return Cost(f"{self.numel}", 2 * entry * self.numel, refresh, float(self.numel))

    def state_dict(self) -> dict[str, Any]:
        """Return sum, count and inverse."""
        return {"count": self.count, "sum": self.sum, "inverse": self._inverse}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore them."""
        self.count = state["count"]
        self.sum = None if state["sum"] is None else state["sum"].to(device)
        self._inverse = None if state["inverse"] is None else state["inverse"].to(device)


@register_structure
class DiagonalFisher(PartitionedFisher):
    """Entry-wise curvature, ``O(P)`` memory.

    Unlike the layer-wise structures its update is *not* isotropic in function space, whatever the
    width (Karakida & Osawa 2020), so it does not inherit the fast convergence of exact NGD.
    """

    structure: ClassVar[str] = "diagonal"

    def make_parts(self, **options: Any) -> dict[str, CurvaturePart]:
        """Return one part per block."""
        refuse_options(self.structure, options)
        return {n: DiagonalPart(n, block, self.layout) for n, block in self.blocks.items()}
