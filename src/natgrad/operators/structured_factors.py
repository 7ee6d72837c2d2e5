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
from functools import cached_property
from typing import ClassVar, Literal, TypeVar, cast, get_args

import torch
from torch import Tensor
from torch.nn import functional

from natgrad import linalg
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

#: To how many sets of rows ``K Kᵀ`` is expected to be applied before K changes.
METRIC_USES = 8


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


def _gram(rows: Tensor) -> Tensor:
    """Return ``XᵀX`` for rows ``(G, R, d)``."""
    if rows.shape[0] == 1:
        return linalg.symmetric(linalg.lower_gram(rows[0])).unsqueeze(0)
    return rows.mT @ rows


# -- structures that are multiplied as dense matrices ----------------------------------------------


class _ExpandedMatrix(StructuredMatrix):
    """A matrix with of the order of d² entries to compute with, however few it stores."""

    @abstractmethod
    def _stored(self, dense: Tensor) -> tuple[Tensor, ...]:
        """Return the entries of dense matrices that have the structure already."""

    @abstractmethod
    def _projected(self, symmetric: Tensor) -> tuple[Tensor, ...]:
        """Return the entries of Π(S)."""

    def identity(self: Matrix) -> Matrix:
        """Return the identity, alike in all else."""
        cls = cast("type[_ExpandedMatrix]", type(self))
        return cast("Matrix", _identity(cls, self.groups, self.size, self.entries[0]))

    def project(self: Matrix, symmetric: Tensor) -> Matrix:
        """Return Π(S) of symmetric matrices."""
        return replace(self, entries=cast("_ExpandedMatrix", self)._projected(symmetric))

    def project_rows(self: Matrix, rows: Tensor) -> Matrix:
        """Return ``Π(XᵀX)``, by the dense product."""
        return self.project(_gram(rows))

    def gram(self: Matrix, weights: Tensor | None = None) -> Matrix:
        """Return ``Π(Kᵀ diag(w) K)``, by the dense product."""
        dense = self.to_dense()
        if weights is None:
            return self.project(_gram(dense))
        return self.project((dense * weights.unsqueeze(-1)).mT @ dense)

    def multiply(self: Matrix, other: Matrix) -> Matrix:
        """Return the product ``K M``."""
        product = self.to_dense() @ other.to_dense()
        return replace(self, entries=cast("_ExpandedMatrix", self)._stored(product))

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

    def congruence(self: Matrix, rows: Tensor) -> Matrix:
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


class DenseMatrix(_ExpandedMatrix):
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


class _TriangularMatrix(_ExpandedMatrix):
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


class _ToeplitzMatrix(_ExpandedMatrix):
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


# -- structures that never form a d × d matrix -----------------------------------------------------


class DiagonalMatrix(StructuredMatrix):
    """The diagonal, ``(G, d)``."""

    structure: ClassVar[FactorStructure] = "diagonal"

    def identity(self) -> DiagonalMatrix:
        """Return the identity."""
        return self.map(torch.ones_like)

    def to_dense(self) -> Tensor:
        """Return the matrices."""
        return torch.diag_embed(self.entries[0])

    def project(self, symmetric: Tensor) -> DiagonalMatrix:
        """Return the diagonal."""
        return replace(self, entries=(symmetric.diagonal(dim1=-2, dim2=-1).clone(),))

    def project_rows(self, rows: Tensor) -> DiagonalMatrix:
        """Return the sums of squares."""
        return replace(self, entries=(rows.square().sum(1),))

    def gram(self, weights: Tensor | None = None) -> DiagonalMatrix:
        """Return ``w k²``."""
        square = self.entries[0].square()
        return replace(self, entries=(square if weights is None else square * weights,))

    def multiply(self, other: DiagonalMatrix) -> DiagonalMatrix:
        """Return the product."""
        return self.map(torch.mul, other)

    def multiply_rows(self, rows: Tensor) -> Tensor:
        """Return ``X K``."""
        return rows * self.entries[0].unsqueeze(1)

    def multiply_rows_transposed(self, rows: Tensor) -> Tensor:
        """Return ``X Kᵀ``, the same."""
        return self.multiply_rows(rows)

    def multiply_metric(self, rows: Tensor) -> Tensor:
        """Return ``X K²``."""
        return rows * self.entries[0].square().unsqueeze(1)

    def forms_metric(self, rows: int) -> bool:
        """Return True."""
        return True

    def trace(self) -> Tensor:
        """Return the trace of every group."""
        return self.entries[0].sum(1)

    def _absolute_sums(self) -> tuple[Tensor, Tensor]:
        largest = self.entries[0].abs().amax(1)
        return largest, largest


class BlockDiagonalMatrix(StructuredMatrix):
    """Blocks of size b along the diagonal, ``(G, n, b, b)``, and the rest of d, ``(G, r, r)``."""

    structure: ClassVar[FactorStructure] = "block_diagonal"

    def identity(self) -> BlockDiagonalMatrix:
        """Return the identity."""
        return self.map(
            lambda x: torch.eye(x.shape[-1], dtype=x.dtype, device=x.device).expand_as(x).clone()
        )

    def _pieces(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the coordinates ``(G, n, R, b)`` of the blocks and ``(G, R, r)`` of the rest."""
        blocks = self.entries[0]
        first = blocks.shape[1] * blocks.shape[2]
        return rows[..., :first].unflatten(-1, blocks.shape[1:3]).transpose(1, 2), rows[..., first:]

    def _times(self, rows: Tensor, transposed: bool) -> Tensor:
        products = [
            piece @ (x.mT if transposed else x)
            for piece, x in zip(self._pieces(rows), self.entries, strict=True)
        ]
        joined = products[0].transpose(1, 2).flatten(2)
        return torch.cat([joined, products[1]], dim=-1) if products[1].shape[-1] else joined

    def to_dense(self) -> Tensor:
        """Return the matrices."""
        blocks, rest = self.entries
        groups = zip(blocks.unbind(0), rest.unbind(0), strict=True)
        return torch.stack([torch.block_diag(*group.unbind(0), last) for group, last in groups])

    def project(self, symmetric: Tensor) -> BlockDiagonalMatrix:
        """Return the blocks."""
        count, side = self.entries[0].shape[1:3]
        first = count * side
        pieces = symmetric[:, :first, :first].unflatten(-1, (count, side))
        blocks = pieces.unflatten(1, (count, side)).diagonal(dim1=1, dim2=3).movedim(-1, 1)
        return replace(self, entries=(blocks.clone(), symmetric[:, first:, first:].clone()))

    def project_rows(self, rows: Tensor) -> BlockDiagonalMatrix:
        """Return the blocks of ``XᵀX``."""
        return replace(self, entries=tuple(piece.mT @ piece for piece in self._pieces(rows)))

    def gram(self, weights: Tensor | None = None) -> BlockDiagonalMatrix:
        """Return ``Kᵀ diag(w) K``."""
        if weights is None:
            return self.map(lambda x: x.mT @ x)
        pieces = self._pieces(weights.unsqueeze(1))
        products = [(x * w.mT).mT @ x for x, w in zip(self.entries, pieces, strict=True)]
        return replace(self, entries=tuple(products))

    def multiply(self, other: BlockDiagonalMatrix) -> BlockDiagonalMatrix:
        """Return the product."""
        return self.map(torch.matmul, other)

    def multiply_rows(self, rows: Tensor) -> Tensor:
        """Return ``X K``."""
        return self._times(rows, False)

    def multiply_rows_transposed(self, rows: Tensor) -> Tensor:
        """Return ``X Kᵀ``."""
        return self._times(rows, True)

    def multiply_metric(self, rows: Tensor) -> Tensor:
        """Return ``X K Kᵀ``, by the blocks of ``K Kᵀ``, which take little."""
        return self.map(lambda x: x @ x.mT).multiply_rows(rows)

    def forms_metric(self, rows: int) -> bool:
        """Return True."""
        return True

    def trace(self) -> Tensor:
        """Return the trace of every group."""
        blocks, rest = (x.diagonal(dim1=-2, dim2=-1).flatten(1).sum(1) for x in self.entries)
        return blocks + rest

    def _absolute_sums(self) -> tuple[Tensor, Tensor]:
        absolute = [x.abs() for x in self.entries]
        rows, columns = (
            torch.cat([x.sum(dim).flatten(1) for x in absolute], dim=1).amax(1) for dim in (-1, -2)
        )
        return rows, columns


class HierarchicalMatrix(StructuredMatrix):
    """Matrices ``[[A, B₁, B₂], [0, C, 0], [0, D, E]]`` with dense A, E and diagonal C.

    Memory is ``(k₁ + k₂) d``: the first ``k₁`` coordinates are coupled to all, the last ``k₂`` to
    the middle. Π keeps A, E and the diagonal, and doubles B₁, B₂ and D. Stored are A ``(G, k₁,
    k₁)``, B₁ ``(G, k₁, n)``, B₂ ``(G, k₁, k₂)``, C ``(G, n)``, D ``(G, k₂, n)``, E ``(G, k₂, k₂)``.
    """

    structure: ClassVar[FactorStructure] = "hierarchical"

    def identity(self) -> HierarchicalMatrix:
        """Return the identity."""
        a, b1, b2, c, d, e = self.entries
        eyes = [
            torch.eye(x.shape[-1], dtype=x.dtype, device=x.device).repeat(x.shape[0], 1, 1)
            for x in (a, e)
        ]
        zeros = [torch.zeros_like(x) for x in (b1, b2, d)]
        entries = (eyes[0], zeros[0], zeros[1], torch.ones_like(c), zeros[2], eyes[1])
        return replace(self, entries=entries)

    def _split(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the coordinates of the three parts."""
        first, middle = self.entries[0].shape[-1], self.entries[3].shape[-1]
        one, two, three = rows.split([first, middle, self.size - first - middle], dim=-1)
        return one, two, three

    def to_dense(self) -> Tensor:
        """Return the matrices."""
        a, b1, b2, c, d, e = self.entries
        first = torch.cat([a, b1, b2], dim=-1)
        middle = functional.pad(torch.diag_embed(c), (a.shape[-1], e.shape[-1]))
        last = functional.pad(torch.cat([d, e], dim=-1), (a.shape[-1], 0))
        return torch.cat([first, middle, last], dim=-2)

    def project(self, symmetric: Tensor) -> HierarchicalMatrix:
        """Return A, C, E of the symmetric matrix and twice B₁, B₂, D."""
        one, two, three = (part.mT for part in self._split(symmetric))  # Rows, as S = Sᵀ.
        a, b1, b2 = self._split(one)
        _, c, _ = self._split(two)
        _, d, e = self._split(three)
        diagonal = c.diagonal(dim1=-2, dim2=-1)
        entries = (a.clone(), 2 * b1, 2 * b2, diagonal.clone(), 2 * d, e.clone())
        return replace(self, entries=entries)

    def project_rows(self, rows: Tensor) -> HierarchicalMatrix:
        """Return Π of the products of the parts' coordinates."""
        one, two, three = self._split(rows)
        return self._of_products(one, one, two, three, two.square().sum(1), three, two, three)

    def _of_products(
        self,
        left: Tensor,
        one: Tensor,
        two: Tensor,
        three: Tensor,
        squares: Tensor,
        last: Tensor,
        last_two: Tensor,
        last_three: Tensor,
    ) -> HierarchicalMatrix:
        """Return ``(leftᵀ one, 2 leftᵀ two, 2 leftᵀ three, squares, 2 lastᵀ two, lastᵀ three)``."""
        a, b1, b2 = left.mT @ one, left.mT @ two, left.mT @ three
        d, e = last.mT @ last_two, last.mT @ last_three
        return replace(self, entries=(a, 2 * b1, 2 * b2, squares, 2 * d, e))

    def gram(self, weights: Tensor | None = None) -> HierarchicalMatrix:
        """Return ``Π(Kᵀ diag(w) K)`` from the parts."""
        a, b1, b2, c, d, e = self.entries
        w1, w2, w3 = (
            (1.0, 1.0, 1.0)
            if weights is None
            else (part.unsqueeze(-1) for part in self._split(weights))
        )
        middle = w2 if isinstance(w2, float) else w2[..., 0]
        squares = (w1 * b1.square()).sum(1) + middle * c.square() + (w3 * d.square()).sum(1)
        weighted_a, weighted_b2, weighted_e = w1 * a, w1 * b2, w3 * e
        last = torch.cat([weighted_b2, weighted_e], dim=1)
        return self._of_products(
            weighted_a, a, b1, b2, squares, last, torch.cat([b1, d], 1), torch.cat([b2, e], 1)
        )

    def multiply(self, other: HierarchicalMatrix) -> HierarchicalMatrix:
        """Return the product, block by block."""
        a, b1, b2, c, d, e = self.entries
        a2, b12, b22, c2, d2, e2 = other.entries
        entries = (
            a @ a2,
            a @ b12 + b1 * c2.unsqueeze(1) + b2 @ d2,
            a @ b22 + b2 @ e2,
            c * c2,
            d * c2.unsqueeze(1) + e @ d2,
            e @ e2,
        )
        return replace(self, entries=entries)

    def multiply_rows(self, rows: Tensor) -> Tensor:
        """Return ``X K``."""
        a, b1, b2, c, d, e = self.entries
        one, two, three = self._split(rows)
        middle = one @ b1 + two * c.unsqueeze(1) + three @ d
        return torch.cat([one @ a, middle, one @ b2 + three @ e], dim=-1)

    def multiply_rows_transposed(self, rows: Tensor) -> Tensor:
        """Return ``X Kᵀ``."""
        a, b1, b2, c, d, e = self.entries
        one, two, three = self._split(rows)
        first = one @ a.mT + two @ b1.mT + three @ b2.mT
        return torch.cat([first, two * c.unsqueeze(1), two @ d.mT + three @ e.mT], dim=-1)

    def trace(self) -> Tensor:
        """Return the trace of every group."""
        a, _, _, c, _, e = self.entries
        ends = sum(x.diagonal(dim1=-2, dim2=-1).sum(-1) for x in (a, e))
        return c.sum(-1) + ends

    def _absolute_sums(self) -> tuple[Tensor, Tensor]:
        a, b1, b2, c, d, e = (x.abs() for x in self.entries)
        rows = [a.sum(-1) + b1.sum(-1) + b2.sum(-1), c, d.sum(-1) + e.sum(-1)]
        columns = [a.sum(-2), b1.sum(-2) + c + d.sum(-2), b2.sum(-2) + e.sum(-2)]
        return torch.cat(rows, dim=-1).amax(-1), torch.cat(columns, dim=-1).amax(-1)


# -- making one ------------------------------------------------------------------------------------

_STRUCTURES: dict[str, type[StructuredMatrix]] = {
    cls.structure: cls
    for cls in (
        DenseMatrix,
        DiagonalMatrix,
        BlockDiagonalMatrix,
        LowerTriangularMatrix,
        UpperTriangularMatrix,
        LowerToeplitzMatrix,
        UpperToeplitzMatrix,
        HierarchicalMatrix,
    )
}


def identity_matrix(
    structure: FactorStructure,
    groups: int,
    size: int,
    *,
    block_size: int = 32,
    hierarchical_sizes: tuple[int, int] = (16, 16),
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> StructuredMatrix:
    """Return one identity matrix per group in a structure.

    Args:
        structure: ``"dense"``, ``"diagonal"``, ``"block_diagonal"``, ``"lower_triangular"``,
            ``"upper_triangular"``, ``"lower_toeplitz"``, ``"upper_toeplitz"`` or
            ``"hierarchical"``.
        groups: G.
        size: d, at least 1.
        block_size: Size of the blocks of ``"block_diagonal"``; the last one has what is left of d.
        hierarchical_sizes: ``(k₁, k₂)``, sizes of the dense corners of ``"hierarchical"``; what
            does not fit d is taken off the middle, then off the last, then off the first.
        dtype: Type of the entries.
        device: Device of the entries.

    Raises:
        ValueError: If the structure is unknown or a size is out of range.
    """
    if structure not in _STRUCTURES:
        raise ValueError(
            f"a factor structure must be one of {', '.join(get_args(FactorStructure))}, got "
            f"{structure!r}"
        )
    if size < 1:
        raise ValueError(f"a structured matrix must have a size of at least 1, got {size}")
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    if len(hierarchical_sizes) != 2 or min(hierarchical_sizes) < 0:
        raise ValueError(
            f"hierarchical_sizes must be two sizes >= 0 of the dense corners, got "
            f"{hierarchical_sizes}"
        )
    like = torch.empty(0, dtype=dtype, device=device)
    cls = _STRUCTURES[structure]
    if cls is DiagonalMatrix:
        return DiagonalMatrix(size, (like.new_ones(groups, size),))
    if cls is BlockDiagonalMatrix:
        side = min(block_size, size)
        rest = size % side
        blocks = like.new_zeros(groups, size // side, side, side)
        return BlockDiagonalMatrix(size, (blocks, like.new_zeros(groups, rest, rest))).identity()
    if cls is HierarchicalMatrix:
        first = min(hierarchical_sizes[0], size)
        last = min(hierarchical_sizes[1], size - first)
        middle = size - first - last
        shapes = (
            (first, first), (first, middle), (first, last), (middle,), (last, middle), (last, last)
        )  # fmt: skip
        parts = tuple(like.new_zeros(groups, *shape) for shape in shapes)
        return HierarchicalMatrix(size, parts).identity()
    return _identity(cast("type[_ExpandedMatrix]", cls), groups, size, like)


def _identity(cls: type[_ExpandedMatrix], groups: int, size: int, like: Tensor) -> _ExpandedMatrix:
    """Return identities of a structure that is multiplied as dense matrices."""
    if issubclass(cls, _ToeplitzMatrix):
        values = like.new_zeros(groups, size)
        values[:, 0] = 1.0
        return cls(size, (values,))
    eye = torch.eye(size, dtype=like.dtype, device=like.device).repeat(groups, 1, 1)
    return cls(size, cls(size, (eye,))._stored(eye))
