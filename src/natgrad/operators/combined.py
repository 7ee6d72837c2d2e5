"""Sums and multiples of operators of one layout."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from natgrad import linalg
from natgrad.arguments import check_damping
from natgrad.jacobians import Jacobians
from natgrad.operators.diagonal import DiagonalOperator
from natgrad.operators.operator import GradientSource, Operator, VectorLayout


@dataclass(frozen=True, eq=False)
class DerivedOperator(Operator):
    """A matrix made of another one, with entries of its type and where its are.

    Attributes:
        layout: How vectors are cut into parameters.
        operator: The other one.
    """

    layout: VectorLayout
    operator: Operator

    @property
    def dtype(self) -> torch.dtype:
        """Type of the entries."""
        return self.operator.dtype

    @property
    def device(self) -> torch.device:
        """Where the entries are."""
        return self.operator.device


@dataclass(frozen=True, eq=False)
class ScaledOperator(DerivedOperator):
    """``c F``, solved as F is: ``(cF + λI)⁻¹ = (F + λ/c I)⁻¹/c``.

    Attributes:
        layout: How vectors are cut into parameters.
        operator: F.
        factor: c.
    """

    factor: float
    semidefinite: ClassVar[bool] = False

    def multiply(self, columns: Tensor) -> Tensor:
        """Return ``c F V``."""
        return self.operator.multiply(columns) * self.factor

    def trace(self) -> Tensor:
        """Return ``c tr F``."""
        return self.operator.trace() * self.factor

    def diagonal(self) -> Tensor:
        """Return c times the diagonal."""
        return self.operator.diagonal() * self.factor

    def eigenvalues(self) -> Tensor:
        """Return c times the eigenvalues."""
        return self.operator.eigenvalues() * self.factor

    def logdet(self, damping: float = 0.0) -> Tensor:
        """Return ``P log c + log det(F + λ/c I)``; NaN where ``cF + λI`` is not definite."""
        check_damping(damping)
        if self.factor > 0:
            scale = self.layout.numel * math.log(self.factor)
            return self.operator.logdet(damping / self.factor) + scale
        return super().logdet(damping)

    def to_dense(self) -> Tensor:
        """Return the matrix."""
        return self.operator.to_dense() * self.factor

    def direct_inverse(self, damping: float) -> Operator:
        """Return ``(F + λ/c I)⁻¹/c``; the pseudo-inverse of 0 for ``c = 0`` without damping."""
        if self.factor > 0:
            inverse = self.operator.direct_inverse(damping / self.factor)
            return replace(self, operator=inverse, factor=1.0 / self.factor)
        return super().direct_inverse(damping)

    def sample_forms(
        self, names: Collection[str], rows: Jacobians, diagonal: bool = False
    ) -> Tensor:
        """Return ``c J_n F J_nᵀ``."""
        return self.operator.sample_forms(names, rows, diagonal) * self.factor

    def inverse_root(self, damping: float) -> Operator:
        """Return ``(F + λ/c I)^(−1/2)/√c``.

        Raises:
            FactorizationError: If ``cF + λI`` is not positive definite.
        """
        if self.factor > 0:
            root = self.operator.inverse_root(damping / self.factor)
            return replace(self, operator=root, factor=self.factor**-0.5)
        return super().inverse_root(damping)

    def natural_gradient(self, source: GradientSource) -> dict[str, Tensor]:
        """Return c times that of F."""
        natural = self.operator.natural_gradient(source)
        return {name: value * self.factor for name, value in natural.items()}


def _diagonal_entries(operator: Operator) -> Tensor | None:
    """Return the entries of a diagonal matrix or a multiple of one; None of others."""
    if isinstance(operator, ScaledOperator) and isinstance(operator.operator, DiagonalOperator):
        return operator.diagonal()
    return operator.entries if isinstance(operator, DiagonalOperator) else None


@dataclass(frozen=True, eq=False)
class SumOperator(Operator):
    """``Σ_i F_i``; products and traces add, everything else goes through the dense matrix.

    Its inverse takes ``P × P``, or products alone with ``solver="conjugate_gradient"``.

    Attributes:
        layout: How vectors are cut into parameters.
        terms: The ``F_i``.
    """

    layout: VectorLayout
    terms: tuple[Operator, ...]
    semidefinite: ClassVar[bool] = False

    @property
    def dtype(self) -> torch.dtype:
        """Type of the entries, the widest of the terms'."""
        return functools.reduce(torch.promote_types, (term.dtype for term in self.terms))

    @property
    def device(self) -> torch.device:
        """Where the entries are."""
        return self.terms[0].device

    @classmethod
    def of(cls, *operators: Operator) -> Operator:
        """Return the sum of operators of one layout, sums among them flattened.

        Of diagonal matrices, or multiples of such, it is one again.

        Raises:
            ValueError: If their layouts differ.
        """
        terms: list[Operator] = []
        for one in operators:
            terms += one.terms if isinstance(one, SumOperator) else [one]
        first = terms[0].layout
        for term in terms[1:]:
            if term.layout.names != first.names or term.layout.sizes != first.sizes:
                left, right = (
                    ", ".join(f"{n} ({k})" for n, k in zip(own.names, own.sizes, strict=True))
                    for own in (first, term.layout)
                )
                raise ValueError(
                    f"only matrices of the same parameters add: one is about {left} entries, the "
                    f"other about {right}"
                )
        found = [_diagonal_entries(term) for term in terms]
        entries = [one for one in found if one is not None]
        if len(entries) == len(terms):
            return DiagonalOperator(first, torch.stack(entries).sum(0))
        return cls(first, tuple(terms))

    def multiply(self, columns: Tensor) -> Tensor:
        """Return ``Σ F_i V``."""
        return torch.stack([term @ columns for term in self.terms]).sum(0)

    def trace(self) -> Tensor:
        """Return ``Σ tr F_i``."""
        return torch.stack([term.trace() for term in self.terms]).sum()

    def diagonal(self) -> Tensor:
        """Return the sum of the diagonals."""
        return torch.stack([term.diagonal() for term in self.terms]).sum(0)

    def to_dense(self) -> Tensor:
        """Return the matrix."""
        linalg.check_memory(
            self.layout.numel, len(self.terms) + 1, self.dtype, self.device,
            what="a sum of matrices, entry by entry,",
            advice="take products, or solver='conjugate_gradient'",
        )  # fmt: skip
        return torch.stack([term.to_dense() for term in self.terms]).sum(0)
