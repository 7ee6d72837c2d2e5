"""The layer-wise block-diagonal Fisher matrix."""

from __future__ import annotations

from typing import Any, ClassVar

from natgrad.curvature.base import CurvaturePart, PartitionedFisher
from natgrad.curvature.exact_rows import ExactRows
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
        if options:
            raise TypeError(f"structure 'block_diagonal' has no option {next(iter(options))!r}")
        return {n: ExactRows({n: block}, self.layout) for n, block in self.blocks.items()}
