r"""The layer-wise block tri-diagonal matrix: every layer's block and its neighbours'.

With ``S = blockdiag(J_1, ..., J_L)`` and ``Σ`` the ``L × L`` tri-diagonal matrix of ones,

.. math:: F = \tfrac{1}{count} S^\top (\Sigma \otimes I) S .

``Σ`` has eigenvalues ``1 + 2cos(kπ/(L+1))``: F is indefinite from three layers on and singular for
``L = 3s + 2``. So Cholesky and conjugate gradients do not apply, damping can hit an eigenvalue,
and single layers may be moved uphill (Karakida & Osawa 2020).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from natgrad import linalg
from natgrad.arguments import check_damping
from natgrad.jacobians import Jacobians
from natgrad.layouts import BlockLayout, ParameterLayout
from natgrad.operators.combined import DerivedOperator
from natgrad.operators.dense import SpectralOperator
from natgrad.operators.operator import GradientSource, Operator
from natgrad.operators.rows import (
    cross_gram,
    matching_coordinates,
    nothing_left,
    split_gradient,
)
from natgrad.statistics.rows import RowStatistics


def tridiagonal_coefficients(depth: int) -> Tensor:
    """Return ``Σ⁻¹1`` for ``L = depth``, the weight of each layer at zero damping, in float64.

    Its sum is α: ``s`` for ``L = 3s`` and ``s + 1`` for ``L = 3s + 1``.

    Raises:
        ValueError: For ``L = 3s + 2``, where ``Σ`` is singular.
    """
    _check_depth(depth)
    ones = torch.ones(depth, dtype=torch.float64)
    index = torch.arange(depth)
    pattern = ((index[:, None] - index[None, :]).abs() <= 1).to(torch.float64)
    found: Tensor = torch.linalg.solve(pattern, ones).round()
    return found


def _check_depth(depth: int) -> None:
    if depth % 3 == 2:
        raise ValueError(
            f"the block tri-diagonal Fisher matrix of a network with {depth} layers is singular at "
            f"zero damping (depth 3s + 2 = {depth}): use damping > 0, or a depth of {depth - 1} or "
            f"{depth + 1} layers, or structure 'block_diagonal'"
        )


@dataclass(frozen=True, eq=False)
class BlockTridiagonalOperator(Operator):
    """Blocks ``F_ll`` and ``F_l,l±1``.

    Solved in sample space by block elimination, ``O(L R³)`` for ``R`` rows, or in parameter space
    by LU, ``O(P³)``, whichever system is smaller.

    Attributes:
        layout: Order of all parameters.
        blocks: Block name → layout.
        order: Block names in the order of their layers' first call.
        statistics: Rows or their moment; None means zero.
    """

    layout: ParameterLayout
    blocks: dict[str, BlockLayout]
    order: tuple[str, ...]
    statistics: RowStatistics | None

    @property
    def dtype(self) -> torch.dtype:
        """Type of the entries."""
        return self.layout.dtype

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.layout.device

    @property
    def depth(self) -> int:
        """Number of blocks ``L``."""
        return len(self.order)

    @property
    def is_zero(self) -> bool:
        """Whether nothing was seen."""
        return self.statistics is None

    @property
    def in_sample_space(self) -> bool:
        """Whether rows are kept."""
        return self.statistics is not None and self.statistics.moment is None

    @cached_property
    def count(self) -> Tensor:
        """What the mean divides by."""
        assert self.statistics is not None
        return self.statistics.count.to(self.layout.dtype)

    def dense(self) -> Tensor:
        """Return the matrix, ``(P, P)``."""
        if self.statistics is None:
            return self.layout.zeros(self.layout.numel, self.layout.numel)
        moment = self.statistics.moment
        if moment is None:
            pieces = self.statistics.pieces
            rows = torch.cat([piece.to_dense() * weight**0.5 for weight, piece in pieces])
            moment = rows.T @ rows
        position = self.layout.zeros(self.layout.numel)
        for index, name in enumerate(self.order):
            for segment in self.layout.slices(self.blocks[name]):
                position[segment] = index
        mask = ((position[:, None] - position[None, :]).abs() <= 1).to(moment.dtype)
        return moment / self.count * mask

    # Sample space: S V and Sᵀ W for stacked per-layer weights (L, R, k).

    def rows_times(self, columns: Tensor) -> Tensor:
        """Return ``S V``."""
        return torch.stack([self._layer_times(name, columns) for name in self.order])

    def _layer_times(self, name: str, columns: Tensor) -> Tensor:
        assert self.statistics is not None
        local = self.layout.gather(self.blocks[name], columns)
        parts = []
        for weight, rows in self.statistics.pieces:
            if name in rows:
                parts.append(rows[name].matvec(local) * weight**0.5)
            else:
                parts.append(columns.new_zeros(rows.rows, columns.shape[1]))
        return torch.cat(parts)

    def transposed_times(self, weights: Tensor) -> Tensor:
        """Return ``Sᵀ W``, ``(P, k)``."""
        assert self.statistics is not None
        pieces = self.statistics.pieces
        result = weights.new_zeros(self.layout.numel, weights.shape[2])
        for layer, name in enumerate(self.order):
            parts = weights[layer].split([rows.rows for _, rows in pieces])
            total = weights.new_zeros(self.blocks[name].numel, weights.shape[2])
            for (weight, rows), part in zip(pieces, parts, strict=True):
                if name in rows:
                    total += rows[name].rmatvec(part * weight**0.5)
            self.layout.scatter(self.blocks[name], total, result)
        return result

    @cached_property
    def layer_grams(self) -> list[Tensor]:
        """``Θ_l = J_l J_lᵀ / count`` for every layer."""
        assert self.statistics is not None
        pieces = self.statistics.pieces
        grams = []
        for name in self.order:
            gram = self.layout.zeros(self.statistics.number, self.statistics.number)
            row = 0
            for v, left in pieces:
                column = 0
                for w, right in pieces:
                    if name in left and name in right:
                        part = cross_gram(left[name], right[name])
                        part = part * ((v * w) ** 0.5 / self.count)
                        gram[row : row + left.rows, column : column + right.rows] = part
                    column += right.rows
                row += left.rows
            grams.append(gram)
        return grams

    @staticmethod
    def couple(weights: Tensor) -> Tensor:
        """Return ``(Σ ⊗ I) W``: each layer's weights plus its neighbours'."""
        result = weights.clone()
        result[1:] += weights[:-1]
        result[:-1] += weights[1:]
        return result

    # The matrix.

    def multiply(self, columns: Tensor) -> Tensor:
        """Return ``F V``."""
        if self.is_zero:
            return torch.zeros_like(columns)
        if not self.in_sample_space:
            return self.dense() @ columns
        return self.transposed_times(self.couple(self.rows_times(columns))) / self.count

    def diagonal(self) -> Tensor:
        """Return the diagonal."""
        result = self.layout.zeros(self.layout.numel)
        if self.statistics is None:
            return result
        if self.statistics.moment is not None:
            return self.statistics.moment.diagonal() / self.count
        for weight, rows in self.statistics.pieces:
            for block in rows.values():
                self.layout.add(block.layout, block.diagonal() * (weight / self.count), result)
        return result

    def eigenvalues(self) -> Tensor:
        """Return all eigenvalues; some are negative from three layers on."""
        if self.is_zero:
            return self.layout.zeros(self.layout.numel)
        if not self.in_sample_space:
            values: Tensor = torch.linalg.eigvalsh(self.dense())
            return values
        core, _, _ = _core([linalg.eigh(gram) for gram in self.layer_grams])
        values = torch.linalg.eigvalsh(core)
        return torch.cat([values, values.new_zeros(self.layout.numel - values.shape[0])])

    def logdet(self, damping: float = 0.0) -> Tensor:
        """Return ``log det(F + damping I)``; −inf where that is singular.

        Raises:
            ValueError: If that matrix is regular but not positive definite, as F is indefinite.
        """
        check_damping(damping)
        values = self.eigenvalues()
        values = torch.where(values.abs() <= linalg.rounding(values), 0.0, values) + damping
        if bool((values == 0).any()):
            return values.new_tensor(-math.inf)
        if bool((values < 0).any()):
            raise ValueError(
                "the block tri-diagonal Fisher matrix plus damping is not positive definite "
                f"(smallest eigenvalue {float(values.min()):.3g}), so it has no log-determinant; "
                "use more damping or structure 'block_diagonal'"
            )
        return values.log().sum()

    def to_dense(self) -> Tensor:
        """Return the matrix, ``(P, P)``."""
        return self.dense()

    def row_products(self, direction: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """Return ``JΔ`` and the count: the indefinite matrix itself would not bound a step."""
        if not self.in_sample_space:
            return None
        return self.rows_times(self.layout.to_column(direction)).sum(0)[:, 0], self.count

    # Inverses.

    def direct_inverse(self, damping: float) -> Operator:
        """Factorise; the pseudo-inverse for 0.

        Raises:
            ValueError: At zero damping with ``3s + 2`` layers.
            FactorizationError: If damping hits an eigenvalue.
        """
        if damping == 0:
            _check_depth(self.depth)
        if self.is_zero:
            return _Solver(self.layout, self, damping)
        if not self.in_sample_space:
            if damping == 0:
                values, vectors = linalg.eigh(self.dense())
                return SpectralOperator(self.layout, _signed_inverse(values), vectors)
            shifted = linalg.add_to_diagonal(self.dense(), damping)
            return _Solver(self.layout, self, damping, lu=_checked_lu(shifted, damping, self.depth))
        if damping == 0:
            spectra = tuple(linalg.eigh(gram) for gram in self.layer_grams)
            return _Solver(self.layout, self, 0.0, spectra=spectra)
        elimination = BlockElimination(self.layer_grams, damping)
        return _Solver(self.layout, self, damping, elimination=elimination)

    def function_space_map(
        self, names: Collection[str], rows: Jacobians, other: Jacobians, damping: float
    ) -> dict[str, Tensor]:
        """Return ``J'_l J_lᵀ Z_l`` with ``Z = ((Σ ⊗ I)Θ + λI)⁻¹(1 ⊗ I)`` for the rows kept."""
        mine = [name for name in self.order if name in rows and name in other]
        pieces = () if self.statistics is None else self.statistics.pieces
        if not (len(pieces) == 1 and all(rows.get(n) is pieces[0][1][n] for n in pieces[0][1])):
            return super().function_space_map(mine, rows, other, damping)
        inverse = self.direct_inverse(damping)
        assert isinstance(inverse, _Solver)
        eye = torch.eye(rows.rows, dtype=self.dtype, device=self.device)
        if inverse.elimination is not None:
            weights = inverse.elimination.solve(eye.expand(self.depth, *eye.shape))
            return {n: cross_gram(other[n], rows[n]) @ weights[self.order.index(n)] for n in mine}
        shares = dict(zip(self.order, tridiagonal_coefficients(self.depth).tolist(), strict=True))
        result = {}
        for name in mine:
            values, vectors = inverse.spectra[self.order.index(name)]
            cross = cross_gram(other[name], rows[name])
            solved = linalg.symmetric_pseudo_solve(values, vectors, cross.mT).mT
            result[name] = shares[name] * solved
        return result


@dataclass(frozen=True, eq=False)
class _Solver(DerivedOperator):
    """``(F + λI)⁻¹`` by what was factorised."""

    layout: ParameterLayout
    operator: BlockTridiagonalOperator
    damping: float
    lu: tuple[Tensor, Tensor] | None = None
    elimination: BlockElimination | None = None
    spectra: tuple[tuple[Tensor, Tensor], ...] = ()

    def multiply(self, columns: Tensor) -> Tensor:
        """Return the product with ``(P, k)``."""
        operator = self.operator
        if operator.is_zero:
            return columns / self.damping if self.damping else torch.zeros_like(columns)
        if self.lu is not None:
            solution: Tensor = torch.linalg.lu_solve(*self.lu, columns)
            return solution
        if self.spectra:
            return self._pseudo_inverse(columns)
        elimination = self.elimination
        assert elimination is not None

        def once(v: Tensor) -> Tensor:
            weights = elimination.solve(operator.couple(operator.rows_times(v)))
            return (v - operator.transposed_times(weights) / operator.count) / self.damping

        solution = once(columns)
        return solution + once(columns - operator.multiply(solution) - self.damping * solution)

    def _pseudo_inverse(self, columns: Tensor) -> Tensor:
        """Apply ``F⁺`` through an orthonormal basis of the rows' range.

        With ``J_l = U_l E_l^½ V_lᵀ·√count`` the matrix is ``V C Vᵀ`` for the small symmetric
        ``C = E^½ Uᵀ(Σ ⊗ I)U E^½``, so ``F⁺ = V C⁺ Vᵀ``.
        """
        core, roots, vectors = _core(list(self.spectra))
        values, basis = linalg.eigh(core)
        scale = self.operator.count.sqrt()
        weights = self.operator.rows_times(columns) / scale
        local = torch.cat(
            [(u.T @ w) / r.unsqueeze(1) for u, r, w in zip(vectors, roots, weights, strict=True)]
        )
        local = basis @ (_signed_inverse(values).unsqueeze(1) * (basis.T @ local))
        parts = local.split([r.shape[0] for r in roots])
        stacked = torch.stack(
            [u @ (p / r.unsqueeze(1)) for u, r, p in zip(vectors, roots, parts, strict=True)]
        )
        return self.operator.transposed_times(stacked) / scale

    def natural_gradient(self, source: GradientSource) -> dict[str, Tensor]:
        """Solve for the gradient's coordinates where they are known, else for the gradient."""
        operator, names = self.operator, self.layout.names
        columns = self.layout.to_column({name: source.gradients[name] for name in names})
        solution = torch.zeros_like(columns)
        coordinates = None
        if operator.in_sample_space and operator.statistics is not None:
            pieces = operator.statistics.pieces
            coordinates = matching_coordinates(source, pieces, self.layout.dtype)
        if coordinates is not None:
            spread = coordinates.expand(operator.depth, *coordinates.shape)
            columns, share = split_gradient(columns, operator.transposed_times(spread))
            solution = self._apply_coordinates(coordinates * share)
        if coordinates is None or not nothing_left(columns):
            solution = solution + self.multiply(columns)
        return self.layout.to_dict(solution[:, 0])

    def _apply_coordinates(self, u: Tensor) -> Tensor:
        """Return ``(F + λI)⁻¹ Jᵀu = Sᵀ (ΣΘ + λI)⁻¹ (1 ⊗ u)``; ``Σ_l c_l J_lᵀ Θ_l⁺ u`` for λ = 0."""
        depth = self.operator.depth
        if self.elimination is not None:
            weights = self.elimination.solve(u.expand(depth, *u.shape))
        else:
            share = tridiagonal_coefficients(depth).tolist()
            weights = torch.stack(
                [
                    c * linalg.symmetric_pseudo_solve(values, vectors, u)
                    if c
                    else torch.zeros_like(u)
                    for c, (values, vectors) in zip(share, self.spectra, strict=True)
                ]
            )
        return self.operator.transposed_times(weights)

    def row_products(self, direction: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """Return ``JΔ`` and the count."""
        return self.operator.row_products(direction)

    def for_checkpoint(self) -> None:
        """Return None: rows belong to one batch."""

    def direct_inverse(self, damping: float) -> Operator:
        """Return ``F`` itself without further damping."""
        if damping == 0 and self.damping == 0:
            return self.operator
        dense = linalg.add_to_diagonal(self.to_dense(), damping)
        lu = _checked_lu(dense, damping, self.operator.depth)
        return replace(self, lu=lu, elimination=None, spectra=())


def _core(
    grams: list[tuple[Tensor, Tensor]],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return ``C``, and per layer ``E^½`` and ``U`` on the range of its Gram matrix."""
    roots, vectors = [], []
    for values, basis in grams:
        keep = linalg.inverse_on_range(values) > 0
        roots.append(values[keep].sqrt())
        vectors.append(basis[:, keep])
    size = sum(r.shape[0] for r in roots)
    core = vectors[0].new_zeros(size, size)
    start = 0
    for layer, (root, basis) in enumerate(zip(roots, vectors, strict=True)):
        stop = start + root.shape[0]
        core[start:stop, start:stop] = torch.diag(root.square())
        if layer + 1 < len(roots):
            following, after = roots[layer + 1], vectors[layer + 1]
            end = stop + following.shape[0]
            block = root.unsqueeze(1) * (basis.T @ after) * following
            core[start:stop, stop:end] = block
            core[stop:end, start:stop] = block.T
        start = stop
    return core, roots, vectors


class BlockElimination:
    """Block elimination for ``((Σ ⊗ I) blockdiag(Θ) + λI) z = r``.

    Row ``l`` reads ``Θ_{l-1} z_{l-1} + (Θ_l + λ) z_l + Θ_{l+1} z_{l+1} = r_l``; eliminating from
    the first layer gives ``D_l = λI + (I − Θ_{l-1} D_{l-1}⁻¹) Θ_l``.

    Args:
        grams: ``Θ_l``, ``(R, R)`` each.
        damping: λ > 0.

    Raises:
        FactorizationError: If the system is singular at this damping.
    """

    def __init__(self, grams: list[Tensor], damping: float) -> None:
        self.grams = grams
        self.factors: list[tuple[Tensor, Tensor]] = []
        self.carried: list[Tensor] = []
        for layer, gram in enumerate(grams):
            pivot = linalg.add_to_diagonal(gram, damping)
            if layer:
                carried = torch.linalg.lu_solve(*self.factors[-1], grams[layer - 1], left=False)
                self.carried.append(carried)
                pivot = torch.addmm(pivot, carried, gram, alpha=-1.0)
            self.factors.append(_checked_lu(pivot, damping, len(grams)))

    def solve(self, rhs: Tensor) -> Tensor:
        """Return ``z`` for right-hand sides ``(L, R, k)``."""
        reduced = [rhs[0]]
        for layer, carried in enumerate(self.carried):
            reduced.append(rhs[layer + 1] - carried @ reduced[layer])
        solution = [torch.linalg.lu_solve(*self.factors[-1], reduced[-1])]
        for layer in range(len(self.grams) - 2, -1, -1):
            right = reduced[layer] - self.grams[layer + 1] @ solution[0]
            solution.insert(0, torch.linalg.lu_solve(*self.factors[layer], right))
        return torch.stack(solution)


def _checked_lu(matrix: Tensor, damping: float, depth: int) -> tuple[Tensor, Tensor]:
    factor, pivots, _ = torch.linalg.lu_factor_ex(matrix)
    diagonal = factor.diagonal().abs()
    limit = torch.finfo(matrix.dtype).eps * diagonal.max()
    linalg.require(
        torch.isfinite(diagonal).all() & (diagonal.min() > limit),
        f"the block tri-diagonal Fisher matrix of {depth} layers is indefinite, and with damping "
        f"{damping:g} it is singular: change the damping, or use structure 'block_diagonal'",
    )
    return factor, pivots


def _signed_inverse(values: Tensor) -> Tensor:
    magnitude = linalg.inverse_on_range(values.abs())
    return magnitude * values.sign()
