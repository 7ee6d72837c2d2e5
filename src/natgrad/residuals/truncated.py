"""Exact Fisher matrices solved on the space of their larger eigenvalues."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from natgrad import linalg
from natgrad.curvature.base import refuse_options
from natgrad.curvature.block_diagonal import BlockDiagonalFisher
from natgrad.curvature.exact_rows import ExactRows
from natgrad.curvature.full import FullFisher
from natgrad.curvature.partitioned import CurvaturePart
from natgrad.layouts import BlockLayout, ParameterLayout

__all__ = ["TRUNCATED"]


class TruncatedRows(ExactRows):
    """Solves with eigenvalues above a share of the largest; directions below it do not move.

    Args:
        blocks: Block name → layout.
        layout: Order of all trainable parameters.
        cutoff: That share.
    """

    def __init__(
        self, blocks: Mapping[str, BlockLayout], layout: ParameterLayout, cutoff: float
    ) -> None:
        super().__init__(blocks, layout)
        self.cutoff = cutoff

    def refresh(self, damping: float) -> None:
        """Eigendecompose ``JJᵀ/count`` or F, whichever is smaller."""
        found = self.smaller_matrix()
        if found is None:
            return
        kind, matrix = found
        values, vectors = linalg.eigh(matrix)
        self._factor = (kind, vectors, values, damping)
        self._applied_rows = (self.rows, self.count)

    def _apply(self, rhs: Tensor, power: int = 1) -> Tensor:
        """Apply ``V (E + λ)⁻¹ E^{1 − power} Vᵀ`` on the eigenvalues E that are kept."""
        assert self._factor is not None
        _, vectors, values, damping = self._factor
        assert values is not None
        kept = values > self.cutoff * values[-1].clamp(min=0.0)
        safe = torch.where(kept, values, torch.ones_like(values))
        inverse = torch.where(kept, safe ** (1 - power) / (safe + damping), 0.0)
        return vectors @ (inverse.unsqueeze(1) * (vectors.mT @ rhs))


class TruncatedFullFisher(FullFisher):
    """Every entry kept. Option: ``cutoff``."""

    def make_parts(self, cutoff: float = 0.0, **options: Any) -> dict[str, CurvaturePart]:
        """Return one part with every block."""
        refuse_options(self.structure, options)
        return {"all layers": TruncatedRows(self.blocks, self.layout, cutoff)}


class TruncatedBlockDiagonalFisher(BlockDiagonalFisher):
    """The exact block of every layer. Option: ``cutoff``."""

    def make_parts(self, cutoff: float = 0.0, **options: Any) -> dict[str, CurvaturePart]:
        """Return one part per block."""
        refuse_options(self.structure, options)
        return {
            name: TruncatedRows({name: block}, self.layout, cutoff)
            for name, block in self.blocks.items()
        }


#: Structure → the same solved by truncated eigendecompositions.
TRUNCATED = {"full": TruncatedFullFisher, "block_diagonal": TruncatedBlockDiagonalFisher}
