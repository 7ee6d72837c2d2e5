"""The sums of which Kronecker factors are made."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from natgrad.statistics.statistics import Statistics

__all__ = ["KroneckerStatistics", "factor_diagonal"]


@dataclass(frozen=True, eq=False)
class KroneckerStatistics(Statistics):
    """Second moments of one layer's inputs and output gradients.

    Matrices are right in their lower triangles, which is all that factorisations read.

    Attributes:
        inputs: ``Σ a aᵀ``, ``(G, d_in + bias, d_in + bias)``, or its diagonal ``(G, d_in + bias)``;
            None in a further chunk of output gradients of samples that are counted already.
        positions: How many terms ``inputs`` sums, a scalar.
        outputs: ``Σ δ δᵀ``, ``(G, d_out, d_out)``, or its diagonal ``(G, d_out)``.
    """

    inputs: Tensor | None
    positions: Tensor
    outputs: Tensor

    def is_finite(self) -> Tensor:
        """Return whether the diagonals are finite: Σ x xᵀ is exactly if its diagonal is."""
        factors = [self.outputs] if self.inputs is None else [self.inputs, self.outputs]
        return torch.stack([torch.isfinite(factor_diagonal(f)).all() for f in factors]).all()

    def mean_factors(self) -> tuple[Tensor, Tensor]:
        """Return ``(A, B)``, right in their lower triangles."""
        assert self.inputs is not None
        outputs = self.outputs * self.count.clamp(min=1e-300).reciprocal().to(self.outputs.dtype)
        return self.inputs / self.positions.clamp(min=1e-30), outputs


def factor_diagonal(factor: Tensor) -> Tensor:
    """Return the diagonal ``(G, d)`` of a factor, ``(G, d, d)`` or already its diagonal."""
    return factor.diagonal(dim1=-2, dim2=-1) if factor.dim() == 3 else factor
