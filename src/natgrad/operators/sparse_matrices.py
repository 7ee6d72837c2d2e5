"""Structured matrices of few entries, which never form a d × d matrix."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from natgrad.operators.structured_matrix import FactorStructure, StructuredMatrix


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
