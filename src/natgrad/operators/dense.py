"""Dense matrices."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from natgrad import linalg
from natgrad.operators.operator import Operator, VectorLayout


@dataclass(frozen=True, eq=False)
class DenseOperator(Operator):
    """A matrix kept entry by entry; eigenvalues below zero are kept as they are.

    Attributes:
        layout: How vectors are cut into parameters.
        matrix: ``(P, P)``, symmetric.
    """

    layout: VectorLayout
    matrix: Tensor

    def multiply(self, columns: Tensor) -> Tensor:
        """Return ``F V``."""
        return self.matrix @ columns

    def trace(self) -> Tensor:
        """Return the trace."""
        return self.matrix.trace()

    def diagonal(self) -> Tensor:
        """Return the diagonal."""
        return self.matrix.diagonal()

    def eigenvalues(self) -> Tensor:
        """Return the eigenvalues."""
        values: Tensor = torch.linalg.eigvalsh(self.matrix)
        return values

    def to_dense(self) -> Tensor:
        """Return the matrix."""
        return self.matrix

    def direct_inverse(self, damping: float) -> Operator:
        """Factorise by Cholesky; eigendecompose for the pseudo-inverse."""
        if damping > 0:
            factor = linalg.cholesky(linalg.add_to_diagonal(self.matrix, damping))
            return CholeskyInverse(self.layout, factor)
        values, vectors = linalg.eigh(self.matrix)
        return SpectralOperator(self.layout, linalg.inverse_on_range(values), vectors)

    def inverse_root(self, damping: float) -> Operator:
        """Return the root by the eigendecomposition, negative eigenvalues cut to 0."""
        values, vectors = linalg.eigh(self.matrix)
        return SpectralOperator(self.layout, (values.clamp(min=0.0) + damping).rsqrt(), vectors)


@dataclass(frozen=True, eq=False)
class SpectralOperator(Operator):
    """``U diag(e) Uᵀ``.

    Attributes:
        layout: How vectors are cut into parameters.
        values: e, ``(P,)``.
        vectors: U, ``(P, P)``.
    """

    layout: VectorLayout
    values: Tensor
    vectors: Tensor

    def multiply(self, columns: Tensor) -> Tensor:
        """Return ``U (e ∘ UᵀV)``."""
        return self.vectors @ (self.values.unsqueeze(1) * (self.vectors.mT @ columns))

    def trace(self) -> Tensor:
        """Return ``Σ e``."""
        return self.values.sum()

    def diagonal(self) -> Tensor:
        """Return the diagonal."""
        return self.vectors.square() @ self.values

    def eigenvalues(self) -> Tensor:
        """Return e."""
        return self.values

    def direct_inverse(self, damping: float) -> SpectralOperator:
        """Invert the eigenvalues; those that vanish stay zero without damping."""
        damped = self.values + damping
        inverse = 1.0 / damped if damping > 0 else linalg.inverse_on_range(damped)
        return replace(self, values=inverse)

    def inverse_root(self, damping: float) -> SpectralOperator:
        """Invert the roots of the eigenvalues.

        Raises:
            FactorizationError: If the damped matrix is not positive definite.
        """
        return replace(self, values=_inverse_roots(self.values, damping))


@dataclass(frozen=True, eq=False)
class CholeskyInverse(Operator):
    """``(L Lᵀ)⁻¹``, applied by two triangular solves.

    Attributes:
        layout: How vectors are cut into parameters.
        factor: L, ``(P, P)``.
    """

    layout: VectorLayout
    factor: Tensor

    def multiply(self, columns: Tensor) -> Tensor:
        """Solve with the factor."""
        return torch.cholesky_solve(columns, self.factor)

    def diagonal(self) -> Tensor:
        """Return the diagonal."""
        return torch.cholesky_inverse(self.factor).diagonal()

    def eigenvalues(self) -> Tensor:
        """Return the eigenvalues."""
        values: Tensor = torch.linalg.svdvals(self.factor).square().reciprocal()
        return values


def spectral_root(matrix: Operator, damping: float) -> SpectralOperator:
    """Return the inverse root of a damped matrix that may have negative eigenvalues.

    Raises:
        FactorizationError: If it is not positive definite.
        ValueError: If the dense matrix does not fit memory.
    """
    linalg.check_memory(matrix.shape[0], 3, matrix.dtype, matrix.device)
    values, vectors = linalg.eigh(matrix.to_dense())
    return SpectralOperator(matrix.layout, _inverse_roots(values, damping), vectors)


def _inverse_roots(values: Tensor, damping: float) -> Tensor:
    """Return ``1/√(e + damping)``, with 0 for eigenvalues e below it by rounding."""
    cut = torch.where(values.abs() <= linalg.rounding(values), values.clamp(min=0.0), values)
    if not bool((cut + damping > 0).all()):
        raise linalg.FactorizationError("the damped matrix is not positive definite")
    return (cut + damping).rsqrt()
