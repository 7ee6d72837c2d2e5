r"""Square matrices that keep few entries, in classes closed under multiplication.

A structure 𝓛 is a linear space of matrices that holds the identity and all products of its members.
Factors K of a preconditioner :math:`K K^\top` may live there for good (Lin et al. 2024, arXiv
2312.05705): they are updated by products alone, and their symmetric statistics S are projected to
Π(S) ∈ 𝓛.

Every structure but the dense one drops entries of S. Those it keeps off the diagonal blocks appear
on one side of the diagonal only and count twice there, so that for triangular matrices

.. math:: \Pi(S) + \Pi(S)^\top = 2 S

and the change of :math:`K K^\top` by a small step :math:`K (I - β Π(S))` is that of
:math:`K (I - β S)`, to first order.

Matrices come as one per group, ``(G, d, d)``; rows as ``(G, R, d)``. Nothing here inverts or
decomposes anything, so all of it works in half precision.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from natgrad.records import Record

FactorStructure = Literal[
    "dense",
    "diagonal",
    "block_diagonal",
    "lower_triangular",
    "upper_triangular",
    "lower_toeplitz",
    "upper_toeplitz",
    "hierarchical",
]

Matrix = TypeVar("Matrix", bound="StructuredMatrix")


@dataclass(frozen=True, eq=False)
class StructuredMatrix(Record, ABC):
    """One square matrix per group, of a structure closed under multiplication.

    Instances are immutable: operations return new ones.

    Attributes:
        size: d.
        entries: What is stored, each tensor with the groups as its first dimension.
    """

    size: int
    entries: tuple[Tensor, ...]

    #: Name of the structure.
    structure: ClassVar[FactorStructure]

    # What a structure implements.

    @abstractmethod
    def identity(self: Matrix) -> Matrix:
        """Return the identity, alike in all else."""

    @abstractmethod
    def to_dense(self) -> Tensor:
        """Return the matrices in full, ``(G, d, d)``."""

    @abstractmethod
    def project(self: Matrix, symmetric: Tensor) -> Matrix:
        """Return Π(S) of symmetric matrices ``(G, d, d)``."""

    @abstractmethod
    def project_rows(self: Matrix, rows: Tensor) -> Matrix:
        """Return ``Π(XᵀX)`` for rows X, ``(G, R, d)``."""

    @abstractmethod
    def gram(self: Matrix, weights: Tensor | None = None) -> Matrix:
        """Return ``Π(Kᵀ diag(w) K)`` for weights ``(G, d)``, all ones by default."""

    @abstractmethod
    def multiply(self: Matrix, other: Matrix) -> Matrix:
        """Return the product ``K M`` with a matrix of the same structure."""

    @abstractmethod
    def multiply_rows(self, rows: Tensor) -> Tensor:
        """Return ``X K`` for rows X, ``(G, R, d)``."""

    @abstractmethod
    def multiply_rows_transposed(self, rows: Tensor) -> Tensor:
        """Return ``X Kᵀ`` for rows X, ``(G, R, d)``."""

    @abstractmethod
    def trace(self) -> Tensor:
        """Return the trace of every group, ``(G,)``."""

    @abstractmethod
    def _absolute_sums(self) -> tuple[Tensor, Tensor]:
        """Return the largest sum of absolute values in a row and in a column, ``(G,)`` each."""

    # What follows from it.

    @property
    def numel(self) -> int:
        """How many numbers are stored."""
        return sum(tensor.numel() for tensor in self.entries)

    @property
    def groups(self) -> int:
        """G."""
        return self.entries[0].shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the entries and of products with them."""
        return self.entries[0].dtype

    def __matmul__(self: Matrix, other: Matrix) -> Matrix:
        """Return the product ``K M`` with a matrix of the same structure."""
        return self.multiply(other)

    def congruence(self: Matrix, rows: Tensor) -> Matrix:
        """Return ``Π(Kᵀ XᵀX K)`` for rows X, ``(G, R, d)``, through the rows ``X K``."""
        return self.project_rows(self.multiply_rows(rows))

    def multiply_metric(self, rows: Tensor) -> Tensor:
        """Return ``X K Kᵀ`` for rows X, ``(G, R, d)``."""
        return self.multiply_rows_transposed(self.multiply_rows(rows))

    def forms_metric(self, rows: int) -> bool:
        """Return whether :meth:`multiply_metric` multiplies so many rows once, by ``K Kᵀ``."""
        return False

    def map(self: Matrix, function: Callable[..., Tensor], *others: Matrix) -> Matrix:
        """Return the matrix whose stored tensors are functions of those of one or several."""
        pieces = zip(self.entries, *(other.entries for other in others), strict=True)
        return replace(self, entries=tuple(function(*tensors) for tensors in pieces))

    def scaled(self: Matrix, factor: Tensor | float) -> Matrix:
        """Return ``factor · K``, with one factor or one per group, ``(G,)``."""
        return self.map(lambda tensor: tensor * _per_group(factor, tensor))

    def plus(self: Matrix, other: Matrix, factor: Tensor | float = 1.0) -> Matrix:
        """Return ``K + factor · M``, with one factor or one per group, ``(G,)``."""
        return self.map(lambda a, b: a + b * _per_group(factor, a), other)

    def norm_bound(self) -> Tensor:
        """Return an upper bound of the spectral norm of every group, ``(G,)``.

        It is the smaller one of the Frobenius norm and ``√(‖K‖₁ ‖K‖_∞)``: exact for multiples of
        the identity and for matrices of rank one.
        """
        rows, columns = self._absolute_sums()
        return torch.minimum(self._squared_norm().sqrt(), (rows * columns).sqrt())

    def _squared_norm(self) -> Tensor:
        """Return ``tr KᵀK`` of every group, ``(G,)``."""
        total = self.entries[0].flatten(1).square().sum(1)
        for tensor in self.entries[1:]:
            total = total + tensor.flatten(1).square().sum(1)
        return total

    def is_finite(self) -> Tensor:
        """Return whether no entry is NaN or infinite, as a tensor on the device."""
        return torch.stack([torch.isfinite(tensor).all() for tensor in self.entries]).all()


def _per_group(factor: Tensor | float, like: Tensor) -> Tensor | float:
    """Return factors ``(G,)`` in a shape and type that multiply a tensor ``(G, ...)``."""
    if not isinstance(factor, Tensor):
        return factor
    factor = factor.to(like.dtype)
    return factor.reshape(-1, *[1] * (like.dim() - 1)) if factor.dim() else factor
