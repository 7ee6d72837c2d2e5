"""The layer-wise block-diagonal Fisher matrix."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from natgrad.curvature.base import refuse_options
from natgrad.curvature.exact_rows import ExactRows, exact_quadratic
from natgrad.curvature.partitioned import CurvaturePart, PartitionedFisher
from natgrad.curvature.registry import register_structure

__all__ = ["BlockDiagonalFisher"]


@register_structure
class BlockDiagonalFisher(PartitionedFisher):
    """The exact block of every layer; nothing between layers.

    In wide networks its update is isotropic in function space with α = L (Karakida & Osawa 2020):
    with learning rate ``1/L`` it follows the same function-space dynamics as exact NGD.
    """

    structure: ClassVar[str] = "block_diagonal"
    additive: ClassVar[bool] = False

    def make_parts(self, **options: Any) -> dict[str, CurvaturePart]:
        """Return one exact part per block."""
        refuse_options(self.structure, options)
        return {n: ExactRows({n: block}, self.layout) for n, block in self.blocks.items()}

    def quadratic(self, direction: dict[str, Tensor], inner: Tensor) -> Tensor:
        """Return ``ΔᵀFΔ`` with the exact Fisher matrix where rows are at hand."""
        exact = exact_quadratic(self.parts.values(), direction)
        return super().quadratic(direction, inner) if exact is None else exact
