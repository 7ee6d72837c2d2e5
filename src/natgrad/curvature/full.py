"""The exact Fisher matrix."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from natgrad.curvature.base import refuse_options
from natgrad.curvature.exact_rows import ExactRows, exact_quadratic
from natgrad.curvature.partitioned import CurvaturePart, PartitionedFisher
from natgrad.curvature.registry import register_structure

__all__ = ["FullFisher"]


@register_structure
class FullFisher(PartitionedFisher):
    """Every entry kept; solved in sample or parameter space, whichever is smaller.

    Cost per factorisation ``O(R² P_mean + R³)`` for ``R = N·K`` rows, or ``O(R P² + P³)`` when
    there are fewer parameters than rows. Memory ``R²`` (or ``P²``) beside the factored rows.
    """

    structure: ClassVar[str] = "full"
    additive: ClassVar[bool] = False

    def make_parts(self, **options: Any) -> dict[str, CurvaturePart]:
        """Return one part with every block."""
        refuse_options(self.structure, options)
        return {"all layers": ExactRows(self.blocks, self.layout)}

    def quadratic(self, direction: dict[str, Tensor], inner: Tensor) -> Tensor:
        """Return ``ΔᵀFΔ`` with the exact Fisher matrix where rows are at hand."""
        exact = exact_quadratic(self.parts.values(), direction)
        return super().quadratic(direction, inner) if exact is None else exact
