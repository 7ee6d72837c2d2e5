"""Diagonal matrices."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from natgrad.arguments import check_damping
from natgrad.jacobians import Jacobians
from natgrad.layouts import BlockLayout
from natgrad.linalg import require_finite
from natgrad.operators.eigen_kronecker import EigenKroneckerOperator
from natgrad.operators.operator import GradientSource, Operator, VectorLayout


@dataclass(frozen=True, eq=False)
class DiagonalOperator(Operator):
    """``diag(f)``.

    Attributes:
        layout: How vectors are cut into parameters.
        entries: f, ``(P,)``.
    """

    layout: VectorLayout
    entries: Tensor

    def multiply(self, columns: Tensor) -> Tensor:
        """Return ``f ∘ V``."""
        return self.entries.unsqueeze(1) * columns

    def trace(self) -> Tensor:
        """Return ``Σ f``."""
        return self.entries.sum()

    def diagonal(self) -> Tensor:
        """Return f."""
        return self.entries

    def eigenvalues(self) -> Tensor:
        """Return f."""
        return self.entries

    def logdet(self, damping: float = 0.0) -> Tensor:
        """Return ``Σ log(f + damping)``; no entry is rounding, however small beside others."""
        check_damping(damping)
        return (self.entries.clamp(min=0.0) + damping).log().sum()

    def to_dense(self) -> Tensor:
        """Return the matrix."""
        return torch.diag(self.entries)

    def direct_inverse(self, damping: float) -> DiagonalOperator:
        """Divide entry by entry; zero damping leaves out zero entries."""
        damped = self.entries + damping
        inverse = torch.where(damped != 0, 1.0 / damped, 0.0)
        require_finite(inverse, "an entry of the diagonal is NaN or infinite")
        return replace(self, entries=inverse)

    def sample_forms(
        self, names: Collection[str], rows: Jacobians, diagonal: bool = False
    ) -> Tensor:
        """Return ``J_n diag(f) J_nᵀ``."""
        if not isinstance(self.layout, BlockLayout):
            return super().sample_forms(names, rows, diagonal)
        scale = self.layout.matrix(self.entries)
        return EigenKroneckerOperator(self.layout, None, None, scale).sample_forms(
            names, rows, diagonal
        )

    def inverse_root(self, damping: float) -> DiagonalOperator:
        """Divide by the root entry by entry."""
        return replace(self, entries=(self.entries + damping).rsqrt())

    def natural_gradient(self, source: GradientSource) -> dict[str, Tensor]:
        """Multiply entry by entry."""
        entries = self.layout.to_dict(self.entries)
        return {name: source.gradients[name] * value for name, value in entries.items()}
