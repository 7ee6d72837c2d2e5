"""Structured matrices that are multiplied as dense ones, however few entries they store."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from functools import cached_property
from typing import ClassVar, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from natgrad import linalg
from natgrad.operators.structured_matrix import FactorStructure, StructuredMatrix

#: To how many sets of rows ``K Kᵀ`` is expected to be applied before K changes.
METRIC_USES = 8

Expanded = TypeVar("Expanded", bound="ExpandedMatrix")


def _gram(rows: Tensor) -> Tensor:
    """Return ``XᵀX`` for rows ``(G, R, d)``."""
    if rows.shape[0] == 1:
        return linalg.symmetric(linalg.lower_gram(rows[0])).unsqueeze(0)
    return rows.mT @ rows


class ExpandedMatrix(StructuredMatrix):
    """A matrix with of the order of d² entries to compute with, however few it stores."""

    @abstractmethod
    def _stored(self, dense: Tensor) -> tuple[Tensor, ...]:
        """Return the entries of dense matrices that have the structure already."""

    @abstractmethod
    def _projected(self, symmetric: Tensor) -> tuple[Tensor, ...]:
        """Return the entries of Π(S)."""

    @classmethod
    def identities(cls: type[Expanded], groups: int, size: int, like: Tensor) -> Expanded:
        """Return one identity per group, of the type and on the device of another tensor."""
        eye = torch.eye(size, dtype=like.dtype, device=like.device).repeat(groups, 1, 1)
        return cls(size, cls(size, (eye,))._stored(eye))

    def identity(self: Expanded) -> Expanded:
        """Return the identity, alike in all else."""
        return self.identities(self.groups, self.size, self.entries[0])

    def project(self: Expanded, symmetric: Tensor) -> Expanded:
        """Return Π(S) of symmetric matrices."""
        return replace(self, entries=self._projected(symmetric))

    def project_rows(self: Expanded, rows: Tensor) -> Expanded:
        """Return ``Π(XᵀX)``, by the dense product."""
        return self.project(_gram(rows))

    def gram(self: Expanded, weights: Tensor | None = None) -> Expanded:
        """Return ``Π(Kᵀ diag(w) K)``, by the dense product."""
        dense = self.to_dense()
        if weights is None:
            return self.project(_gram(dense))
        return self.project((dense * weights.unsqueeze(-1)).mT @ dense)

    def multiply(self: Expanded, other: Expanded) -> Expanded:
        """Return the product ``K M``."""
        product = self.to_dense() @ other.to_dense()
        return replace(self, entries=self._stored(product))

    def multiply_rows(self, rows: Tensor) -> Tensor:
        """Return ``X K``."""
        return rows @ self.to_dense()

    def multiply_rows_transposed(self, rows: Tensor) -> Tensor:
        """Return ``X Kᵀ``."""
        return rows @ self.to_dense().mT

    def multiply_metric(self, rows: Tensor) -> Tensor:
        """Return ``X K Kᵀ``."""
        dense = self.to_dense()
        return rows @ dense @ dense.mT

    def congruence(self: Expanded, rows: Tensor) -> Expanded:
        """Return ``Π(Kᵀ XᵀX K)``, by ``XᵀX`` where that takes fewer multiplications than ``X K``.

        In half precision it goes through ``X K`` always: ``XᵀX`` has the square of X's condition
        number, and K magnifies what rounding leaves in its small directions.
        """
        if self.dtype == torch.bfloat16 or rows.shape[1] <= 2 * self.size:
            return self.project_rows(self.multiply_rows(rows))
        dense = self.to_dense()
        return self.project(dense.mT @ _gram(rows) @ dense)

    def trace(self) -> Tensor:
        """Return the trace of every group."""
        return self.to_dense().diagonal(dim1=-2, dim2=-1).sum(-1)

    def _squared_norm(self) -> Tensor:
        return self.to_dense().square().sum((-2, -1))

    def _absolute_sums(self) -> tuple[Tensor, Tensor]:
        absolute = self.to_dense().abs()
        return absolute.sum(-1).amax(-1), absolute.sum(-2).amax(-1)


class DenseMatrix(ExpandedMatrix):
    """Every entry, ``(G, d, d)``."""

    structure: ClassVar[FactorStructure] = "dense"

    def to_dense(self) -> Tensor:
        """Return the matrices."""
        return self.entries[0]

    def _stored(self, dense: Tensor) -> tuple[Tensor, ...]:
        return (dense,)

    def _projected(self, symmetric: Tensor) -> tuple[Tensor, ...]:
        return (symmetric,)

    @cached_property
    def _metric(self) -> Tensor:
        return _gram(self.entries[0].mT)

    def multiply_metric(self, rows: Tensor) -> Tensor:
        """Return ``X K Kᵀ``, with ``K Kᵀ`` kept where that pays after some uses."""
        if not self.forms_metric(rows.shape[-2]):
            return super().multiply_metric(rows)
        return rows @ self._metric

    def forms_metric(self, rows: int) -> bool:
        """Return whether ``K Kᵀ`` is formed, and kept, to apply it to so many rows."""
        return rows * METRIC_USES >= self.size


class _TriangularMatrix(ExpandedMatrix):
    """The ``d(d + 1)/2`` entries on one side of the diagonal, folded into a rectangle.

    The last rows of a lower triangle, the longest first, are completed by the first rows, the
    shortest first and reversed: ``(G, d/2, d + 1)`` for even d, ``(G, (d + 1)/2, d)`` for odd d.
    """

    upper: ClassVar[bool]

    def to_dense(self) -> Tensor:
        """Return the matrices, zero on the other side."""
        folded, size = self.entries[0], self.size
        longest = folded.shape[-2]
        long = folded[..., :size].flip(-2).tril(size - longest)
        short = folded[..., size % 2 :, -size:].flip(-1).tril()
        lower = torch.cat([short, long], dim=-2)
        return lower.mT if self.upper else lower

    def _stored(self, dense: Tensor) -> tuple[Tensor, ...]:
        lower, size = dense.mT if self.upper else dense, self.size
        odd, longest = size % 2, (size + 1) // 2
        long = lower[..., size - longest :, :].tril(size - longest).flip(-2)
        short = lower[..., : size - longest, :].tril().flip(-1)
        if odd:
            return (long + functional.pad(short, (0, 0, 1, 0)),)
        return (functional.pad(long, (0, 1)) + functional.pad(short, (1, 0)),)

    def _projected(self, symmetric: Tensor) -> tuple[Tensor, ...]:
        doubled = 2.0 * symmetric - torch.diag_embed(symmetric.diagonal(dim1=-2, dim2=-1))
        return self._stored(doubled)


class LowerTriangularMatrix(_TriangularMatrix):
    """Lower triangular matrices; Π keeps the diagonal and twice the strictly lower triangle."""

    structure: ClassVar[FactorStructure] = "lower_triangular"
    upper: ClassVar[bool] = False


class UpperTriangularMatrix(_TriangularMatrix):
    """Upper triangular matrices; Π keeps the diagonal and twice the strictly upper triangle."""

    structure: ClassVar[FactorStructure] = "upper_triangular"
    upper: ClassVar[bool] = True


class _ToeplitzMatrix(ExpandedMatrix):
    """Triangular matrices with one value per diagonal, ``(G, d)``, the main one first."""

    upper: ClassVar[bool]

    def to_dense(self) -> Tensor:
        """Return the matrices."""
        # Row i of the lower triangle is the window t_i … t_0 0 … 0 of the reversed values.
        values = functional.pad(self.entries[0].flip(-1), (0, self.size - 1))
        lower = values.unfold(-1, self.size, 1).flip(-2)
        return lower.mT if self.upper else lower

    def _stored(self, dense: Tensor) -> tuple[Tensor, ...]:
        # A copy, as a view would keep all of the dense matrix alive.
        return ((dense[..., 0, :] if self.upper else dense[..., :, 0]).clone(),)

    def _projected(self, symmetric: Tensor) -> tuple[Tensor, ...]:
        size = self.size
        # Row i is moved by i to the right, so that columns hold the diagonals of the mirror image.
        wide = functional.pad(symmetric.flip(-1), (0, size)).flatten(1)
        sums = wide[:, : 2 * size * size - size].view(-1, size, 2 * size - 1).sum(1)
        lengths = torch.arange(size, 0, -1, device=sums.device, dtype=torch.float32)
        means = sums[:, :size].flip(-1) / lengths.to(sums.dtype)
        return (torch.cat([means[:, :1], 2.0 * means[:, 1:]], dim=1),)

    @classmethod
    def identities(cls: type[Expanded], groups: int, size: int, like: Tensor) -> Expanded:
        """Return one identity per group, of the type and on the device of another tensor."""
        values = like.new_zeros(groups, size)
        values[:, 0] = 1.0
        return cls(size, (values,))

    def _squared_norm(self) -> Tensor:
        values = self.entries[0]
        lengths = torch.arange(self.size, 0, -1, device=values.device, dtype=torch.float32)
        return (values.square() * lengths.to(values.dtype)).sum(1)

    def _absolute_sums(self) -> tuple[Tensor, Tensor]:
        total = self.entries[0].abs().sum(1)
        return total, total

    def trace(self) -> Tensor:
        """Return the trace of every group."""
        return self.entries[0][:, 0] * self.size


class LowerToeplitzMatrix(_ToeplitzMatrix):
    """Lower triangular Toeplitz matrices; Π takes means of diagonals, doubled below the main."""

    structure: ClassVar[FactorStructure] = "lower_toeplitz"
    upper: ClassVar[bool] = False


class UpperToeplitzMatrix(_ToeplitzMatrix):
    """Upper triangular Toeplitz matrices; Π takes means of diagonals, doubled above the main."""

    structure: ClassVar[FactorStructure] = "upper_toeplitz"
    upper: ClassVar[bool] = True
