r"""Matrices that act on the span of some Jacobian rows and as a multiple of I outside of it.

With the rows ``J_Z`` of inducing points and ``J_Z J_Zᵀ = V E Vᵀ``, the columns of
``U = J_Zᵀ V E^(−1/2)``, those with ``E > 0``, are an orthonormal basis of the rows' span. It is
never formed: ``J U = (J J_Zᵀ) V E^(−1/2)`` takes products of rows with rows, which stay factored.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from natgrad import linalg
from natgrad.jacobians import Jacobians
from natgrad.layouts import ParameterLayout
from natgrad.operators import DiagonalOperator, Operator


def sample_grams(rows: Jacobians, diagonal: bool = False) -> Tensor:
    """Return ``J_n J_nᵀ`` of every sample, ``(N, K, K)``, or its diagonal, ``(N, K)``."""
    parts = []
    for name, block in rows.items():
        ones = torch.ones(block.layout.numel, dtype=block.dtype, device=block.device)
        parts.append(DiagonalOperator(block.layout, ones).sample_forms([name], rows, diagonal))
    return torch.stack(parts).sum(0)


@dataclass(frozen=True, eq=False)
class ProjectedOperator(Operator):
    """``U diag(values) Uᵀ + shift (I − U Uᵀ)``.

    Attributes:
        layout: Order of the parameters.
        rows: ``J_Z``, R rows.
        basis: ``Wᵀ`` with ``U = J_Zᵀ W``, ``(r, R)``.
        values: ``(r,)``.
        shift: What it is outside of the span.
    """

    layout: ParameterLayout
    rows: Jacobians
    basis: Tensor
    values: Tensor
    shift: float = 0.0

    @classmethod
    def span(cls, rows: Jacobians) -> ProjectedOperator:
        """Return the projection ``U Uᵀ``, without what eigenvalues that are rounding span."""
        gram = rows.gram()
        values, vectors = linalg.eigh(gram.double())
        kept = values > linalg.rounding(values.to(gram.dtype)).double()
        basis = (vectors[:, kept] * values[kept].rsqrt()).T.to(gram.dtype)
        return cls(rows.layout, rows, basis, basis.new_ones(len(basis)))

    @property
    def dtype(self) -> torch.dtype:
        """Type of the basis."""
        return self.basis.dtype

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.basis.device

    def coordinates(self, rows: Jacobians) -> Tensor:
        """Return ``J U``, ``(N·K, r)``."""
        return rows.gram(self.rows) @ self.basis.T

    def rotated(self, moment: Tensor) -> ProjectedOperator:
        """Return ``U B Uᵀ`` for a positive semi-definite ``B``, ``(r, r)``."""
        values, vectors = linalg.eigh(moment.double())
        basis = (vectors.T @ self.basis.double()).to(self.dtype)
        return replace(self, basis=basis, values=values.clamp(min=0.0).to(self.dtype))

    def multiply(self, columns: Tensor) -> Tensor:
        """Return the product with ``(P, k)``."""
        layout = self.layout
        products = columns.new_zeros(self.rows.rows, columns.shape[1])
        for block in self.rows.values():
            products += block.matvec(layout.gather(block.layout, columns))
        scale = (self.values - self.shift).unsqueeze(1)
        weights = self.basis.T @ (scale * (self.basis @ products))
        result = self.shift * columns
        for block in self.rows.values():
            layout.add(block.layout, block.rmatvec(weights), result)
        return result

    def eigenvalues(self) -> Tensor:
        """Return all ``P`` eigenvalues."""
        rest = self.values.new_full((self.layout.numel - len(self.values),), self.shift)
        return torch.cat([self.values, rest])

    def trace(self) -> Tensor:
        """Return the sum of the eigenvalues."""
        return self.eigenvalues().sum()

    def direct_inverse(self, damping: float) -> ProjectedOperator:
        """Invert the eigenvalues; those that are zero stay so without damping."""
        if damping == 0 and self.shift == 0:
            return replace(self, values=linalg.inverse_on_range(self.values))
        values = (self.values + damping).reciprocal()
        return replace(self, values=values, shift=1.0 / (self.shift + damping))

    def inverse_root(self, damping: float) -> ProjectedOperator:
        """Invert the roots of the eigenvalues."""
        values = (self.values + damping).rsqrt()
        return replace(self, values=values, shift=(self.shift + damping) ** -0.5)

    def sample_forms(
        self, names: Collection[str], rows: Jacobians, diagonal: bool = False
    ) -> Tensor:
        """Return ``J_n (·) J_nᵀ``: a multiple of ``J_n J_nᵀ``, and a part in coordinates."""
        own = self.coordinates(rows).unflatten(0, (rows.samples, rows.directions))
        weighted = own * (self.values - self.shift)
        inside: Tensor = (own * weighted).sum(-1) if diagonal else weighted @ own.mT
        return inside if self.shift == 0 else inside + self.shift * sample_grams(rows, diagonal)
