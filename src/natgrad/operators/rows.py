r"""The exact Fisher matrix in sample space.

With rows ``J`` (weighted, ``R`` of them) and ``F = JᵀJ/count`` the Woodbury identity needs the Gram
matrix ``JJᵀ`` only,

.. math:: (F + \lambda I)^{-1} v = \tfrac1\lambda
          \left(v - J^\top (JJ^\top + count\,\lambda I)^{-1} J v\right)

and for a gradient ``∇L = Jᵀu`` with known ``u`` the push-through form
``Jᵀ (JJᵀ/count + λI)⁻¹ u``, which divides by nothing small and has a limit at λ = 0.

Rows may come with scales t (:class:`natgrad.jacobians.collection.ScaledRows`): damping is then
added to the Gram matrix of the scaled rows ``TJ``, ``T = diag(t)``, that is λ/t² instead of λ to
each row of ``JJᵀ/count``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from natgrad import linalg
from natgrad.jacobians import CHUNK_ELEMENTS, Jacobians, LayerJacobian
from natgrad.jacobians.collection import ScaledRows, in_type
from natgrad.layouts import ParameterLayout
from natgrad.operators.operator import GradientSource, Operator
from natgrad.statistics.rows import Pieces


@dataclass(frozen=True, eq=False)
class RowsOperator(Operator):
    """``JᵀJ/count``.

    Attributes:
        layout: Order of the part's parameters.
        pieces: Rows with weights; none means zero.
        count: What the mean divides by, a scalar.
    """

    layout: ParameterLayout
    pieces: Pieces
    count: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Type of the rows."""
        for _, rows in self.pieces:
            if rows.shares is not None:
                return rows.shares.dtype
            for block in rows.values():
                return block.dtype
        return self.layout.dtype

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.layout.device

    @cached_property
    def gram(self) -> Tensor:
        """``JJᵀ``, ``(R, R)``."""
        if len(self.pieces) == 1:
            weight, rows = self.pieces[0]
            gram = rows.gram()
            return gram if weight == 1.0 else gram * weight
        return torch.cat(
            [
                torch.cat([cross_gram(a, b) * (v * w) ** 0.5 for w, b in self.pieces], 1)
                for v, a in self.pieces
            ]
        )

    @property
    def mean_gram(self) -> Tensor:
        """``JJᵀ/count``."""
        return self.gram / self.count.to(self.gram.dtype)

    def multiply(self, columns: Tensor) -> Tensor:
        """Return ``Jᵀ(JV)/count``."""
        if not self.pieces:
            return torch.zeros_like(columns)
        product = transposed_times(self.pieces, times(self.pieces, columns))
        return product / self.count.to(product.dtype)

    def diagonal(self) -> Tensor:
        """Return the diagonal."""
        if not self.pieces:
            return self.layout.zeros(self.layout.numel)
        squares = [(weight / self.count, rows.diagonal()) for weight, rows in self.pieces]
        return torch.stack([value * weight.to(value.dtype) for weight, value in squares]).sum(0)

    def eigenvalues(self) -> Tensor:
        """Return ``P_l`` eigenvalues, padded with exact zeros beyond the number of rows."""
        if not self.pieces:
            return self.layout.zeros(self.layout.numel)
        values = torch.linalg.eigvalsh(self.mean_gram).clamp(min=0.0)
        return torch.cat([values, values.new_zeros(self.layout.numel - values.shape[0])])

    def to_dense(self) -> Tensor:
        """Return ``(P_l, P_l)``."""
        if not self.pieces:
            return self.layout.zeros(self.layout.numel, self.layout.numel)
        dense = torch.cat([rows.to_dense() * weight**0.5 for weight, rows in self.pieces])
        return dense.T @ dense / self.count.to(dense.dtype)

    # Inverses.

    def direct_inverse(self, damping: float) -> Operator:
        """Factorise the Gram matrix; eigendecompose for the pseudo-inverse at 0."""
        if not self.pieces:
            return _zero_inverse(self, damping)
        gram = self.mean_gram
        if damping == 0:
            values, vectors = linalg.eigh(gram)
            return RowsInverse(self.layout, self, 0.0, vectors, linalg.inverse_on_range(values))
        scaled = scaled_rows(self.pieces)
        if scaled is not None:
            gram = scaled[0] * gram * scaled[0].mT
        factor = linalg.cholesky(linalg.add_to_diagonal(gram, damping))
        return RowsInverse(self.layout, self, damping, factor)

    def truncated_inverse(self, damping: float, cutoff: float) -> Operator:
        """Invert on the larger eigenvalues, found in sample space."""
        if not self.pieces:
            return _zero_inverse(self, 0.0)
        values, vectors = linalg.eigh(self.mean_gram)
        kept = values > cutoff * values[-1].clamp(min=0.0)
        safe = torch.where(kept, values, torch.ones_like(values))
        inverse = torch.where(kept, 1.0 / (safe + damping), 0.0)
        squared = torch.where(kept, 1.0 / (safe * (safe + damping)), 0.0)
        return RowsInverse(self.layout, self, 0.0, vectors, inverse, squared)

    def inverse_root(self, damping: float) -> Operator:
        r"""Return the symmetric root from the eigenvalues a of the Gram matrix.

        With ``JJᵀ/count = U diag(a) Uᵀ``,

        .. math:: (F + \lambda I)^{-1/2} = \lambda^{-1/2} I - \frac{1}{count} J^\top U
                  \, \mathrm{diag}\Big(\frac{1}{\sqrt{\lambda} \sqrt{a + \lambda}
                  (\sqrt{\lambda} + \sqrt{a + \lambda})}\Big) U^\top J,

        which divides by no eigenvalue.
        """
        root = damping**0.5
        if not self.pieces:
            return _zero_inverse(self, root)
        values, vectors = linalg.eigh(self.mean_gram)
        shifted = (values.clamp(min=0.0) + damping).sqrt()
        scale = 1.0 / (root * shifted * (root + shifted))
        return _IdentityMinusRows(self.layout, self, 1.0 / root, vectors, scale)

    def row_products(self, direction: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """Return ``JΔ``, ``(R,)``, and the count."""
        if not self.pieces:
            return None
        columns = self.layout.to_column(direction).to(self.dtype)
        return times(self.pieces, columns)[:, 0], self.count.to(self.dtype)

    def function_space_map(
        self, names: Collection[str], rows: Jacobians, other: Jacobians, damping: float
    ) -> dict[str, Tensor]:
        """Return ``J'_l Jᵀ_l (JJᵀ/count + λI)⁻¹``, by push-through, if ``J`` are the rows kept."""
        mine = [name for name in names if name in rows and name in other]
        kept = self.pieces[0][1] if len(self.pieces) == 1 else None
        unscaled = scaled_rows(self.pieces) is None
        if kept is not None and unscaled and all(rows.get(n) is kept[n] for n in kept):
            inverse = self.direct_inverse(damping)
            assert isinstance(inverse, RowsInverse)
            return {
                name: inverse.in_sample_space(cross_gram(other[name], rows[name]).mT).mT
                for name in mine
            }
        return super().function_space_map(names, rows, other, damping)


@dataclass(frozen=True, eq=False)
class RowsInverse(Operator):
    """``(JᵀJ/count + λI)⁻¹`` through a factorisation of the Gram matrix.

    Attributes:
        layout: Order of the part's parameters.
        operator: ``JᵀJ/count``.
        damping: λ; 0 where the inverse acts on the range of the rows alone.
        factor: Cholesky factor of ``JJᵀ/count + λI``, or eigenvectors of ``JJᵀ/count``.
        values: In eigenvectors: what :meth:`in_sample_space` multiplies by.
        squared_values: Likewise for gradients whose coordinates are unknown; the square of
            ``values`` by default.
    """

    layout: ParameterLayout
    operator: RowsOperator
    damping: float
    factor: Tensor
    values: Tensor | None = None
    squared_values: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Type of the factorisation."""
        return self.factor.dtype

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.factor.device

    @property
    def _count(self) -> Tensor:
        return self.operator.count.to(self.dtype)

    def in_sample_space(self, weights: Tensor) -> Tensor:
        """Return ``(JJᵀ/count + λI)⁻¹ W``, ``(R, k)``."""
        if self.values is None:
            return torch.cholesky_solve(weights, self.factor)
        return self.factor @ (self.values.unsqueeze(1) * (self.factor.mT @ weights))

    def multiply(self, columns: Tensor) -> Tensor:
        """Return the product with ``(P, k)``; scales of rows are for gradients alone."""
        return self._solve(columns, 1.0, self._unscaled_factor)

    def diagonal(self) -> Tensor:
        """Return the diagonal, by ``R`` products with ``Jᵀ``.

        What is subtracted from ``1/λ`` loses digits where λ is small beside F, so it is in float64.
        """
        if self.values is not None:
            scales = self.values.square() if self.squared_values is None else self.squared_values
            return self._square_sums(self.operator, self.factor, scales)
        precise = self._in_float64()
        gram = linalg.add_to_diagonal(precise.mean_gram, self.damping)
        eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        root = torch.linalg.solve_triangular(linalg.cholesky(gram), eye, upper=False)
        sums = self._square_sums(precise, root.mT, torch.ones_like(gram[0]))
        return ((1.0 - sums) / self.damping).to(self.dtype)

    def eigenvalues(self) -> Tensor:
        """Return ``P_l`` eigenvalues, from those of the Gram matrix."""
        size, values = self.layout.numel, self.values
        rest = 0.0 if values is not None else 1.0 / self.damping
        if values is None:
            gram = torch.linalg.eigvalsh(self.operator.mean_gram)
            values = 1.0 / (gram.clamp(min=0.0) + self.damping)
            values = values.sort().values  # Beyond P rows there are zeros of the Gram matrix alone.
        else:
            values = values.sort(descending=True).values
        values = values[:size]
        return torch.cat([values, values.new_full((size - len(values),), rest)])

    def _in_float64(self) -> RowsOperator:
        """Return ``JᵀJ/count`` in float64, if this process has all of the rows."""
        pieces = self.operator.pieces
        if any(rows.shares is not None for _, rows in pieces):
            return self.operator
        precise = tuple((weight, in_type(rows, torch.float64)) for weight, rows in pieces)
        return RowsOperator(self.layout, precise, self.operator.count)

    def _square_sums(self, operator: RowsOperator, weights: Tensor, scales: Tensor) -> Tensor:
        """Return ``diag(JᵀW diag(scales) WᵀJ)/count``, some columns of W at a time."""
        total: Tensor | float = 0.0
        step = max(1, CHUNK_ELEMENTS // self.layout.numel)
        for some, own in zip(weights.split(step, 1), scales.split(step), strict=True):
            total = total + transposed_times(operator.pieces, some).square() @ own
        assert isinstance(total, Tensor)
        return total / operator.count.to(total.dtype)

    @cached_property
    def _unscaled_factor(self) -> Tensor:
        """The Cholesky factor of ``JJᵀ/count + λI`` where that of scaled rows is kept."""
        if self.values is not None or scaled_rows(self.operator.pieces) is None:
            return self.factor
        return linalg.cholesky(linalg.add_to_diagonal(self.operator.mean_gram, self.damping))

    def _solve(
        self, columns: Tensor, scales: Tensor | float, factor: Tensor | None = None
    ) -> Tensor:
        factor = self.factor if factor is None else factor
        pieces = self.operator.pieces
        if self.values is not None:
            # Pseudo-inverse of JᵀJ/count through the Gram matrix JJᵀ/count.
            squared = self.values.square() if self.squared_values is None else self.squared_values
            weights = self.factor.mT @ times(pieces, columns)
            weights = self.factor @ (squared.unsqueeze(1) * weights)
            return transposed_times(pieces, weights) / self._count

        def once(v: Tensor) -> Tensor:
            weights = torch.cholesky_solve(scales * times(pieces, v), factor)
            product = transposed_times(pieces, scales * weights) / self._count
            return (v - product) / self.damping

        # The subtraction loses digits when λ is small beside F; one step of iterative refinement
        # brings them back.
        solution = once(columns)
        product = transposed_times(pieces, scales * (scales * times(pieces, solution)))
        return solution + once(columns - product / self._count - self.damping * solution)

    def natural_gradient(self, source: GradientSource) -> dict[str, Tensor]:
        """Solve by push-through for what the rows explain of the gradient, else by Woodbury."""
        pieces, dtype = self.operator.pieces, self.dtype
        gradients = {name: source.gradients[name] for name in self.layout.names}
        columns = self.layout.to_flat(gradients).to(dtype).unsqueeze(1)
        coordinates = matching_coordinates(source, pieces, dtype)
        scales: Tensor | float = 1.0
        scaled = scaled_rows(pieces)
        if scaled is not None:
            coordinates = scaled[1].to(dtype)
            if self.values is None:
                scales = scaled[0].to(dtype)
        if coordinates is None:
            return self.layout.to_dict(self._solve(columns, scales)[:, 0])
        rest, share = split_gradient(columns, transposed_times(pieces, coordinates))
        solution = scales * self.in_sample_space(scales * coordinates * share)
        known = transposed_times(pieces, solution)
        if nothing_left(rest):
            return self.layout.to_dict(known[:, 0])
        if isinstance(scales, Tensor):
            rest = rest * scales.square().mean()
        return self.layout.to_dict((known + self._solve(rest, scales))[:, 0])

    def of_coordinates(self, coordinates: Tensor) -> dict[str, Tensor] | None:
        """Return the natural gradient of ``Jᵀu``; None where rows have weights or scales."""
        pieces = self.operator.pieces
        if len(pieces) != 1 or pieces[0][0] != 1.0 or scaled_rows(pieces) is not None:
            return None
        solution = self.in_sample_space(coordinates.to(self.dtype))
        return self.layout.to_dict(transposed_times(pieces, solution)[:, 0])

    def row_products(self, direction: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """Return ``JΔ`` and the count."""
        return self.operator.row_products(direction)

    def for_checkpoint(self) -> None:
        """Return None: rows belong to one batch."""


@dataclass(frozen=True, eq=False)
class _IdentityMinusRows(RowsInverse):
    """``damping · I − JᵀU diag(values) UᵀJ/count``."""

    def multiply(self, columns: Tensor) -> Tensor:
        """Return the product with ``(P, k)``."""
        pieces = self.operator.pieces
        weights = self.in_sample_space(times(pieces, columns))
        return self.damping * columns - transposed_times(pieces, weights) / self._count

    def diagonal(self) -> Tensor:
        """Return the diagonal, by ``R`` products with ``Jᵀ``."""
        assert self.values is not None
        precise = self._in_float64()
        vectors, values = self.factor.double(), self.values.double()
        sums = self._square_sums(precise, vectors.to(precise.dtype), values.to(precise.dtype))
        return (self.damping - sums).to(self.dtype)

    def eigenvalues(self) -> Tensor:
        """Return ``P_l`` eigenvalues of the root, ``1/√(a + λ)``."""
        gram = torch.linalg.eigvalsh(self.operator.mean_gram).clamp(min=0.0)
        values = (gram + self.damping**-2).rsqrt().sort().values[: self.layout.numel]
        rest = values.new_full((self.layout.numel - len(values),), self.damping)
        return torch.cat([values, rest])


def _zero_inverse(operator: RowsOperator, damping: float) -> Operator:
    """Return the inverse of the zero matrix plus damping; zero without."""
    from natgrad.operators.diagonal import DiagonalOperator

    value = 1.0 / damping if damping else 0.0
    layout = operator.layout
    return DiagonalOperator(layout, layout.zeros(layout.numel) + value)


# Products with weighted rows.


def times(pieces: Pieces, columns: Tensor) -> Tensor:
    """Return ``J V``, ``(R, k)``, each row scaled by the root of its weight."""
    parts = [(weight, rows.times(columns)) for weight, rows in pieces]
    return torch.cat([part if weight == 1.0 else part * weight**0.5 for weight, part in parts])


def transposed_times(pieces: Pieces, weights: Tensor) -> Tensor:
    """Return ``Jᵀ W``, ``(P_l, k)``."""
    parts = zip(pieces, weights.split([rows.rows for _, rows in pieces]), strict=True)
    terms = [
        rows.transposed_times(part if weight == 1.0 else part * weight**0.5)
        for (weight, rows), part in parts
    ]
    return terms[0] if len(terms) == 1 else torch.stack(terms).sum(0)


_Rows = TypeVar("_Rows", Jacobians, LayerJacobian)


def cross_gram(left: _Rows, right: _Rows) -> Tensor:
    """Return ``J J'ᵀ``, by the symmetric route where both are the same."""
    return left.gram() if left is right else left.gram(right)


# Gradients and the rows they are made of.


def matching_coordinates(
    source: GradientSource, pieces: Pieces, dtype: torch.dtype
) -> Tensor | None:
    """Return the gradient's coordinates ``(R, 1)`` if they belong to exactly these rows."""
    if source.coordinates is None or len(pieces) != 1 or pieces[0][0] != 1.0:
        return None
    coordinates = source.coordinates.reshape(-1, 1).to(dtype)
    return coordinates if coordinates.shape[0] == pieces[0][1].rows else None


def scaled_rows(pieces: Pieces) -> tuple[Tensor, Tensor] | None:
    """Return scales and coordinates, ``(R, 1)`` each, of rows that all have them, or None."""
    found = [rows for _, rows in pieces if isinstance(rows, ScaledRows)]
    if not found or len(found) < len(pieces):
        return None
    scales = torch.cat([rows.scales for rows in found])
    return scales.unsqueeze(1), torch.cat([rows.coordinates for rows in found]).unsqueeze(1)


def split_gradient(gradient: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Split ``g = c·Jᵀu + h`` into the remainder ``h`` and the share ``c``.

    ``h`` holds what the output's gradient does not explain: penalties in the loss, or changes
    made to ``.grad`` after the backward pass; clipping only changes ``c``. A remainder at the level
    of rounding is returned as zero.

    Args:
        gradient: ``(P, 1)``.
        known: ``Jᵀu``, ``(P, 1)``.
    """
    norm = known.square().sum()
    share = torch.where(norm > 0, (gradient * known).sum() / norm, torch.zeros_like(norm))
    remainder = gradient - share * known
    limit = 100 * torch.finfo(gradient.dtype).eps * gradient.norm()
    return torch.where(remainder.norm() <= limit, torch.zeros_like(remainder), remainder), share


def nothing_left(remainder: Tensor) -> bool:
    """Return whether a remainder is zero; where nobody waits it is taken so, and noted if not."""
    some = remainder.any()
    if linalg.waits():
        return not bool(some)
    linalg.require(~some, "the rows of the batch do not explain all of the gradient")
    return True
