r"""The layer-wise block tri-diagonal Fisher matrix: every layer's block and its neighbours'.

With ``S = blockdiag(J_1, ..., J_L)`` and ``Σ`` the ``L × L`` tri-diagonal matrix of ones,

.. math:: F = \tfrac{1}{count} S^\top (\Sigma \otimes I) S .

``Σ`` has eigenvalues ``1 + 2cos(kπ/(L+1))``: F is indefinite from three layers on and singular for
``L = 3s + 2``. So Cholesky and conjugate gradients do not apply, damping can hit an eigenvalue,
and single layers may be moved uphill (Karakida & Osawa 2020).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from natgrad import linalg
from natgrad.curvature.base import (
    FisherMatrix,
    GradientSource,
    check_damping,
    damping_of,
    refuse_options,
)
from natgrad.curvature.cost import Cost, Workload
from natgrad.curvature.exact_rows import (
    ExactRows,
    cross_gram,
    matching_coordinates,
    split_gradient,
)
from natgrad.curvature.registry import register_structure
from natgrad.jacobians import Jacobians
from natgrad.layouts import ParameterLayout

if TYPE_CHECKING:
    from natgrad.capture import Block

__all__ = ["BlockElimination", "BlockTridiagonalFisher", "tridiagonal_coefficients"]


def tridiagonal_coefficients(depth: int) -> Tensor:
    """Return ``Σ⁻¹1`` for ``L = depth``, the weight of each layer at zero damping, in float64.

    Its sum is α: ``s`` for ``L = 3s`` and ``s + 1`` for ``L = 3s + 1``.

    Raises:
        ValueError: For ``L = 3s + 2``, where ``Σ`` is singular.
    """
    if depth % 3 == 2:
        raise ValueError(_singular(depth))
    ones = torch.ones(depth, dtype=torch.float64)
    return torch.linalg.solve(_pattern(depth, ones), ones).round()


def _pattern(depth: int, like: Tensor) -> Tensor:
    index = torch.arange(depth, device=like.device)
    return ((index[:, None] - index[None, :]).abs() <= 1).to(like.dtype)


def _singular(depth: int) -> str:
    return (
        f"the block tri-diagonal Fisher matrix of a network with {depth} layers is singular at "
        f"zero damping (depth 3s + 2 = {depth}): use damping > 0, or a depth of {depth - 1} or "
        f"{depth + 1} layers, or structure 'block_diagonal'"
    )


@register_structure
class BlockTridiagonalFisher(FisherMatrix):
    """Blocks ``F_ll`` and ``F_l,l±1``; layers are ordered by their first call.

    Solved in sample space by block elimination, ``O(L R³)`` for ``R`` rows, or in parameter space
    by LU, ``O(P³)``, whichever system is smaller.
    """

    structure: ClassVar[str] = "block_tridiagonal"
    additive: ClassVar[bool] = False

    def __init__(
        self, blocks: Mapping[str, Block], layout: ParameterLayout, **options: Any
    ) -> None:
        refuse_options(self.structure, options)
        super().__init__(blocks, layout)
        self.order: list[str] = list(self.blocks)
        # A system of L·R rows is worth it while it is smaller than P.
        self._exact = ExactRows(self.blocks, layout, layout.numel // len(self.blocks))
        self._factor: tuple[Any, ...] | None = None

    @property
    def depth(self) -> int:
        """Number of blocks ``L``."""
        return len(self.order)

    def update(self, jacobians: Jacobians, count: Tensor | float) -> None:
        """Add rows; the first update fixes the order of layers."""
        if self._exact.count == 0:
            called = list(jacobians)
            self.order = called + [name for name in self.blocks if name not in jacobians]
        self._exact.update(jacobians, count)

    def discount(self, factor: float) -> None:
        """Discount sums, or forget the rows for factor 0."""
        self._exact.discount(factor)

    # Parameter space.

    def _mask(self) -> Tensor:
        position = self.layout.zeros(self.layout.numel)
        for index, name in enumerate(self.order):
            for segment in self.layout.slices(self.blocks[name]):
                position[segment] = index
        return ((position[:, None] - position[None, :]).abs() <= 1).to(self.layout.dtype)

    def _dense(self) -> Tensor:
        return self._exact.to_dense() * self._mask()

    # Sample space: S V and Sᵀ W for stacked per-layer weights (L, R, k).

    def _rows_times(self, columns: Tensor, rows: list[tuple[float, Jacobians]]) -> Tensor:
        return torch.stack([self._layer_times(name, columns, rows) for name in self.order])

    def _layer_times(
        self, name: str, columns: Tensor, kept: list[tuple[float, Jacobians]]
    ) -> Tensor:
        local = self.layout.gather(self.blocks[name], columns)
        parts = []
        for weight, rows in kept:
            if name in rows:
                parts.append(rows[name].matvec(local) * weight**0.5)
            else:
                parts.append(columns.new_zeros(rows.rows, columns.shape[1]))
        return torch.cat(parts)

    def _transposed(self, weights: Tensor, rows: list[tuple[float, Jacobians]]) -> Tensor:
        result = weights.new_zeros(self.layout.numel, weights.shape[2])
        for layer, name in enumerate(self.order):
            pieces = weights[layer].split([jacobians.rows for _, jacobians in rows])
            total = weights.new_zeros(self.blocks[name].numel, weights.shape[2])
            for (weight, jacobians), piece in zip(rows, pieces, strict=True):
                if name in jacobians:
                    total += jacobians[name].rmatvec(piece * weight**0.5)
            self.layout.scatter(self.blocks[name], total, result)
        return result

    def _layer_grams(self) -> list[Tensor]:
        """Return ``Θ_l = J_l J_lᵀ / count`` for every layer."""
        rows = self._exact.rows
        size = sum(jacobians.rows for _, jacobians in rows)
        grams = []
        for name in self.order:
            gram = self.layout.zeros(size, size)
            row = 0
            for v, left in rows:
                column = 0
                for w, right in rows:
                    if name in left and name in right:
                        other = None if left is right else right[name]
                        gram[row : row + left.rows, column : column + right.rows] = left[name].gram(
                            other
                        ) * ((v * w) ** 0.5 / self._exact.count)
                    column += right.rows
                row += left.rows
            grams.append(gram)
        return grams

    @staticmethod
    def _couple(weights: Tensor) -> Tensor:
        """Return ``(Σ ⊗ I) W``: each layer's weights plus its neighbours'."""
        result = weights.clone()
        result[1:] += weights[:-1]
        result[:-1] += weights[1:]
        return result

    # The matrix.

    def _matvec(self, columns: Tensor) -> Tensor:
        if self._exact.moment is not None:
            return self._dense() @ columns
        if not self._exact.rows:
            return torch.zeros_like(columns)
        coupled = self._couple(self._rows_times(columns, self._exact.rows))
        return self._transposed(coupled, self._exact.rows) / self._exact.count

    def _solve(self, columns: Tensor, damping: float) -> Tensor:
        if self._exact.moment is None and not self._exact.rows:
            return columns / damping if damping else torch.zeros_like(columns)
        try:
            factor = self._factorize(damping)
        except linalg.FactorizationError as error:
            raise ValueError(str(error)) from error
        return self._apply(factor, columns)

    def _factorize(self, damping: float) -> tuple[Any, ...]:
        if damping == 0 and self.depth % 3 == 2:
            raise ValueError(_singular(self.depth))
        if self._exact.moment is not None:
            dense = self._dense()
            if damping == 0:
                return ("eigen", *linalg.eigh(dense))
            shifted = linalg.add_to_diagonal(dense, damping)
            return "dense", _checked_lu(shifted, damping, self.depth), damping
        rows, count = self._exact.rows, self._exact.count
        grams = self._layer_grams()
        if damping == 0:
            return "decoupled", [linalg.eigh(gram) for gram in grams], rows, count
        return "elimination", BlockElimination(grams, damping), damping, rows, count

    def _apply(self, factor: tuple[Any, ...], columns: Tensor) -> Tensor:
        kind = factor[0]
        if kind == "dense":
            return torch.linalg.lu_solve(*factor[1], columns)
        if kind == "eigen":
            values, vectors = factor[1:]
            return vectors @ (_signed_inverse(values).unsqueeze(1) * (vectors.T @ columns))
        if kind == "decoupled":
            return self._pseudo_inverse(factor, columns)
        _, elimination, damping, rows, count = factor

        def once(v: Tensor) -> Tensor:
            weights = elimination.solve(self._couple(self._rows_times(v, rows)))
            return (v - self._transposed(weights, rows) / count) / damping

        solution = once(columns)
        product = self._transposed(self._couple(self._rows_times(solution, rows)), rows) / count
        return solution + once(columns - product - damping * solution)

    def _pseudo_inverse(self, factor: tuple[Any, ...], columns: Tensor) -> Tensor:
        """Apply ``F⁺`` through an orthonormal basis of the rows' range.

        With ``J_l = U_l E_l^½ V_lᵀ·√count`` the matrix is ``V C Vᵀ`` for the small symmetric
        ``C = E^½ Uᵀ(Σ ⊗ I)U E^½``, so ``F⁺ = V C⁺ Vᵀ``.
        """
        _, grams, rows, count = factor
        core, roots, vectors = self._core(grams)
        values, basis = linalg.eigh(core)
        weights = self._rows_times(columns, rows) / count**0.5
        local = torch.cat(
            [(u.T @ w) / r.unsqueeze(1) for u, r, w in zip(vectors, roots, weights, strict=True)]
        )
        local = basis @ (_signed_inverse(values).unsqueeze(1) * (basis.T @ local))
        pieces = local.split([r.shape[0] for r in roots])
        stacked = torch.stack(
            [u @ (p / r.unsqueeze(1)) for u, r, p in zip(vectors, roots, pieces, strict=True)]
        )
        return self._transposed(stacked, rows) / count**0.5

    @staticmethod
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

    def trace(self) -> Tensor:
        """Return the trace; neighbours do not enter it."""
        return self._exact.trace()

    def diagonal(self) -> Tensor:
        """Return the diagonal."""
        return self._exact.diagonal()

    def eigenvalues(self) -> Tensor:
        """Return all eigenvalues, largest first; some are negative from three layers on."""
        if self._exact.moment is not None:
            return torch.linalg.eigvalsh(self._dense()).flip(0)
        if not self._exact.rows:
            return self.layout.zeros(self.layout.numel)
        core, _, _ = self._core([linalg.eigh(gram) for gram in self._layer_grams()])
        values = torch.linalg.eigvalsh(core)
        padding = values.new_zeros(self.layout.numel - values.shape[0])
        return torch.cat([values, padding]).sort(descending=True).values

    def logdet(self, damping: float = 0.0) -> Tensor:
        """Return ``log det(F + damping I)``.

        Raises:
            ValueError: If that matrix is not positive definite, as F is indefinite.
        """
        check_damping(damping)
        values = self.eigenvalues() + damping
        if bool((values < 0).any()):
            raise ValueError(
                "the block tri-diagonal Fisher matrix plus damping is not positive definite "
                f"(smallest eigenvalue {float(values.min()):.3g}), so it has no log-determinant; "
                "use more damping or structure 'block_diagonal'"
            )
        return values.log().sum()

    def to_dense(self) -> Tensor:
        """Return the matrix, ``(P, P)``."""
        return self._dense()

    def _function_space_map(
        self, rows: Jacobians, other: Jacobians, damping: float
    ) -> dict[str, Tensor]:
        names = [name for name in self.order if name in rows and name in other]
        kept = self._exact.rows
        if len(kept) == 1 and all(rows.get(name) is kept[0][1][name] for name in kept[0][1]):
            return self._map_in_sample_space(rows, other, names, damping)
        columns = self.layout.zeros(self.layout.numel, rows.rows)
        for name in names:
            self.layout.scatter(rows[name].layout, rows[name].to_dense().T, columns)
        solution = self._solve(columns, damping)
        return {
            name: other[name].matvec(self.layout.gather(self.blocks[name], solution))
            for name in names
        }

    def _map_in_sample_space(
        self, rows: Jacobians, other: Jacobians, names: list[str], damping: float
    ) -> dict[str, Tensor]:
        """Return ``J'_l J_lᵀ Z_l`` with ``Z = ((Σ ⊗ I)Θ + λI)⁻¹(1 ⊗ I)``."""
        grams = self._layer_grams()
        if damping > 0:
            try:
                elimination = BlockElimination(grams, damping)
            except linalg.FactorizationError as error:
                raise ValueError(str(error)) from error
            eye = torch.eye(rows.rows, dtype=grams[0].dtype, device=grams[0].device)
            weights = elimination.solve(eye.expand(self.depth, *eye.shape))
            return {n: cross_gram(other[n], rows[n]) @ weights[self.order.index(n)] for n in names}
        shares = dict(zip(self.order, tridiagonal_coefficients(self.depth).tolist(), strict=True))
        result = {}
        for name in names:
            values, vectors = linalg.eigh(grams[self.order.index(name)])
            cross = cross_gram(other[name], rows[name])
            inverse = linalg.symmetric_pseudo_solve(values, vectors, cross.mT).mT
            result[name] = shares[name] * inverse
        return result

    # Training.

    def refresh(self, damping: float | Mapping[str, float]) -> None:
        """Factorise; a failure keeps the last factorisation and warns.

        Raises:
            ValueError: At zero damping with ``3s + 2`` layers.
        """
        if self._exact.moment is None and not self._exact.rows:
            return
        try:
            self._factor = self._factorize(damping_of("all layers", damping))
        except linalg.FactorizationError as error:
            linalg.warn_kept(self, "all layers", error)

    def precondition(self, source: GradientSource) -> dict[str, Tensor]:
        """Return the natural gradient of all covered parameters."""
        covered = {name for block in self.blocks.values() for name in block.names}
        gradients = {name: source.gradients[name] for name in covered}
        if self._factor is None:
            return gradients
        columns = self.layout.to_column(gradients)
        solution = torch.zeros_like(columns)
        if self._factor[0] in ("decoupled", "elimination"):
            rows = self._factor[-2]
            coordinates = matching_coordinates(source, rows, self.layout.dtype)
            if coordinates is not None:
                spread = coordinates.expand(self.depth, *coordinates.shape)
                columns, share = split_gradient(columns, self._transposed(spread, rows))
                solution = self._apply_coordinates(coordinates * share)
        if bool(columns.any()):
            solution = solution + self._apply(self._factor, columns)
        result = self.layout.to_dict(solution[:, 0])
        return {name: result[name] for name in covered}

    def _apply_coordinates(self, u: Tensor) -> Tensor:
        """Return ``(F + λI)⁻¹ Jᵀu = Sᵀ (ΣΘ + λI)⁻¹ (1 ⊗ u)``; ``Σ_l c_l J_lᵀ Θ_l⁺ u`` for λ = 0."""
        assert self._factor is not None
        rows = self._factor[-2]
        if self._factor[0] == "elimination":
            weights = self._factor[1].solve(u.expand(self.depth, *u.shape))
        else:
            share = tridiagonal_coefficients(self.depth).tolist()
            weights = torch.stack(
                [
                    c * linalg.symmetric_pseudo_solve(values, vectors, u)
                    if c
                    else torch.zeros_like(u)
                    for c, (values, vectors) in zip(share, self._factor[1], strict=True)
                ]
            )
        return self._transposed(weights, rows)

    def quadratic(self, direction: dict[str, Tensor], inner: Tensor) -> Tensor:
        """Return ``ΔᵀFΔ`` with the exact Fisher matrix where rows are at hand.

        The indefinite matrix itself would not bound the step.
        """
        if self._factor is None or self._factor[0] not in ("decoupled", "elimination"):
            return super().quadratic(direction, inner)
        rows, count = self._factor[-2:]
        products = self._rows_times(self.layout.to_column(direction), rows).sum(0)
        return products.square().sum() / count

    def costs(self, workload: Workload) -> dict[str, Cost]:
        """Return the cost of the joint system."""
        one = self._exact.cost(workload)
        rows = workload.samples * workload.directions
        if rows > self._exact.row_limit:
            size = self.layout.numel
            refresh = one.refresh + 2 * size**3 / 3
            return {"all layers": Cost(f"{size} x {size}", one.memory, refresh, one.step)}
        entry = self.layout.dtype.itemsize
        memory = 3 * self.depth * rows**2 * entry
        refresh = one.refresh + self.depth * 14 / 3 * rows**3
        factors = f"{self.depth} coupled {rows} x {rows}"
        return {"all layers": Cost(factors, memory, refresh, one.step)}

    def snapshot(self) -> dict[str, Any]:
        """Return the state by reference."""
        return {"own": dict(self.__dict__), "exact": dict(self._exact.__dict__)}

    def rollback(self, saved: dict[str, Any]) -> None:
        """Return to a snapshot."""
        self.__dict__.update(saved["own"])
        self._exact.__dict__.update(saved["exact"])

    def state_dict(self) -> dict[str, Any]:
        """Return sums and the order of layers."""
        return {"order": list(self.order), "exact": self._exact.state_dict()}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore them."""
        self.order = list(state["order"])
        self._exact.load_state_dict(state["exact"], device)


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
    if not bool(torch.isfinite(diagonal).all()) or bool(diagonal.min() <= limit):
        raise linalg.FactorizationError(
            f"the block tri-diagonal Fisher matrix of {depth} layers is indefinite, and with "
            f"damping {damping:g} it is singular: change the damping, or use structure "
            "'block_diagonal'"
        )
    return factor, pivots


def _signed_inverse(values: Tensor) -> Tensor:
    magnitude = linalg.inverse_on_range(values.abs())
    return magnitude * values.sign()
