r"""One dense block per output unit of a layer.

For unit ``o`` of a layer with inputs ``a`` the block is
``F_o = (1/count) Σ_r s_ro a_r a_rᵀ`` with ``s_ro = Σ_k δ_rko²``. With fewer rows than inputs the
block is never formed: its rows ``√s_ro a_r`` have the Gram matrix ``√s √sᵀ ∘ (a aᵀ)``, and the
product ``a aᵀ`` is shared by all units.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from natgrad import linalg
from natgrad.arguments import check_damping
from natgrad.jacobians import CHUNK_ELEMENTS, Jacobians, LinearJacobian
from natgrad.layouts import BlockLayout
from natgrad.operators.combined import DerivedOperator
from natgrad.operators.operator import Operator, map_by_columns

#: Largest factorisation of one layer, in entries (2^31 float32 = 8 GiB).
MAX_ENTRIES = 2**31


def check_unit_memory(layout: BlockLayout, side: int) -> None:
    """Raise a ValueError if one matrix per unit is too much."""
    units = layout.groups * layout.d_out
    if units * side**2 > MAX_ENTRIES:
        name = layout.names[0].rpartition(".")[0] or layout.names[0]
        raise ValueError(
            f"unit-wise curvature of {name!r} needs {units} matrices of size {side} x {side} "
            f"({units * side**2 * 4 / 2**30:.0f} GiB); use structure 'kfac' or a smaller batch"
        )


def units_of(layout: BlockLayout, columns: Tensor) -> Tensor:
    """Turn flat columns ``(P_l, k)`` into ``(units, d, k)``."""
    return layout.matrix(columns.T).flatten(1, 2).permute(1, 2, 0)


def columns_of(layout: BlockLayout, units: Tensor) -> Tensor:
    """Turn ``(units, d, k)`` into flat columns ``(P_l, k)``."""
    matrices = units.permute(2, 0, 1).unflatten(1, (layout.groups, layout.d_out))
    return layout.flat(matrices).T


@dataclass(frozen=True, eq=False)
class UnitBlocksOperator(Operator):
    """Blocks kept entry by entry.

    Attributes:
        layout: Layout of the layer's block.
        blocks: ``F_o``, or what was made of them, ``(units, d, d)``.
    """

    layout: BlockLayout
    blocks: Tensor

    def multiply(self, columns: Tensor) -> Tensor:
        """Return ``F V``."""
        return columns_of(self.layout, self.blocks @ units_of(self.layout, columns))

    def diagonal(self) -> Tensor:
        """Return the diagonal."""
        diagonal = self.blocks.diagonal(dim1=1, dim2=2)
        return columns_of(self.layout, diagonal.unsqueeze(-1))[:, 0]

    def eigenvalues(self) -> Tensor:
        """Return every unit's eigenvalues."""
        return self._spectra().flatten()

    def _spectra(self) -> Tensor:
        values: Tensor = torch.linalg.eigvalsh(self.blocks).clamp(min=0)
        return values

    def logdet(self, damping: float = 0.0) -> Tensor:
        """Return the sum of the units' log-determinants."""
        check_damping(damping)
        return linalg.log_determinant(self._spectra(), damping)

    def direct_inverse(self, damping: float) -> Operator:
        """Factorise by Cholesky, all units together; eigendecompose for the pseudo-inverse."""
        if damping > 0:
            factor = linalg.cholesky(linalg.add_to_diagonal(self.blocks, damping))
            return _UnitCholesky(self.layout, factor)
        return self._with_eigenvalues(linalg.inverse_on_range)

    def inverse_root(self, damping: float) -> Operator:
        """Return every unit's root by its eigenvalues."""
        return self._with_eigenvalues(lambda e: (e.clamp(min=0.0) + damping).rsqrt())

    def _with_eigenvalues(self, function: Callable[[Tensor], Tensor]) -> Operator:
        """Return the blocks with a function of their eigenvalues in place of these."""
        values, vectors = linalg.eigh(self.blocks)
        scaled = vectors * function(values).unsqueeze(-2)
        return replace(self, blocks=scaled @ vectors.mT)


@dataclass(frozen=True, eq=False)
class _UnitCholesky(UnitBlocksOperator):
    """Inverses by their Cholesky factors, ``blocks``."""

    def multiply(self, columns: Tensor) -> Tensor:
        """Solve with the factors."""
        solved = torch.cholesky_solve(units_of(self.layout, columns), self.blocks)
        return columns_of(self.layout, solved)

    def diagonal(self) -> Tensor:
        """Return the diagonal."""
        diagonal = torch.cholesky_inverse(self.blocks).diagonal(dim1=1, dim2=2)
        return columns_of(self.layout, diagonal.unsqueeze(-1))[:, 0]

    def _spectra(self) -> Tensor:
        values: Tensor = torch.linalg.svdvals(self.blocks).square().reciprocal()
        return values

    def direct_inverse(self, damping: float) -> Operator:
        """Return the inverse of the blocks."""
        return self._as_blocks().direct_inverse(damping)

    def inverse_root(self, damping: float) -> Operator:
        """Return the root of the blocks."""
        return self._as_blocks().inverse_root(damping)

    def _as_blocks(self) -> UnitBlocksOperator:
        return UnitBlocksOperator(self.layout, torch.cholesky_inverse(self.blocks))


@dataclass(frozen=True, eq=False)
class UnitRowsOperator(Operator):
    """Blocks in sample space, by the rows of their units.

    Attributes:
        layout: Layout of the layer's block.
        inputs: a, ``(R, G, d)``.
        weights: s, ``(R, G, d_out)``.
        count: What the mean divides by, a scalar.
    """

    layout: BlockLayout
    inputs: Tensor
    weights: Tensor
    count: Tensor

    def chunks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield (units, inputs ``(R, d)``, roots ``(units, R)``) in chunks of one group."""
        rows, d_out = self.inputs.shape[0], self.layout.d_out
        step = max(1, CHUNK_ELEMENTS // max(1, rows * max(rows, self.inputs.shape[2])))
        for group in range(self.layout.groups):
            a, roots = self.inputs[:, group], self.weights[:, group].T.sqrt()
            for first in range(0, d_out, step):
                last = min(first + step, d_out)
                base = group * d_out
                yield slice(base + first, base + last), a, roots[first:last]

    def grams(self) -> Iterator[Tensor]:
        """Yield ``(units, R, R)``; the units of a group share the product ``a aᵀ``."""
        shared: tuple[Tensor, Tensor] | None = None
        for _, a, root in self.chunks():
            if shared is None or shared[0] is not a:
                shared = (a, a @ a.T)
            yield shared[1] * root.unsqueeze(1) * root.unsqueeze(2)

    @property
    def _count(self) -> Tensor:
        return self.count.to(self.inputs.dtype)

    def multiply(self, columns: Tensor) -> Tensor:
        """Return ``F V``."""
        values = units_of(self.layout, columns)
        result = torch.zeros_like(values)
        for units, a, root in self.chunks():
            weights = a @ values[units] * root.square().unsqueeze(-1)
            result[units] = a.T @ weights / self._count
        return columns_of(self.layout, result)

    def diagonal(self) -> Tensor:
        """Return the diagonal."""
        sums = torch.einsum("rgo,rgi->goi", self.weights, self.inputs.square())
        return self.layout.flat(sums) / self._count

    def eigenvalues(self) -> Tensor:
        """Return every unit's eigenvalues, padded with zeros."""
        values = torch.cat(
            [torch.linalg.eigvalsh(gram / self._count).flatten() for gram in self.grams()]
        ).clamp(min=0)
        return torch.cat([values, values.new_zeros(self.layout.numel - values.numel())])

    def direct_inverse(self, damping: float) -> Operator:
        """Factorise every unit's Gram matrix."""
        check_unit_memory(self.layout, self.inputs.shape[0])
        if damping > 0:
            shift = self._count * damping
            factors = [linalg.cholesky(linalg.add_to_diagonal(g, shift)) for g in self.grams()]
            return _UnitRowsInverse(self.layout, self, damping, tuple(factors), ())
        spectra = [linalg.eigh(gram) for gram in self.grams()]
        values = tuple(linalg.inverse_on_range(v) for v, _ in spectra)
        return _UnitRowsInverse(self.layout, self, 0.0, tuple(u for _, u in spectra), values)

    def inverse_root(self, damping: float) -> Operator:
        """Return every unit's root, ``(d, d)`` each."""
        check_unit_memory(self.layout, self.inputs.shape[2])
        rows = [a * root.unsqueeze(-1) for _, a, root in self.chunks()]
        blocks = torch.cat([one.mT @ one for one in rows]) / self._count
        return UnitBlocksOperator(self.layout, blocks).inverse_root(damping)

    def function_space_map(
        self, names: Collection[str], rows: Jacobians, other: Jacobians, damping: float
    ) -> dict[str, Tensor]:
        """Return ``Σ_o (δ'_o δ_oᵀ) ∘ a'(F_o + λI)⁻¹aᵀ``, in sample space where that is possible."""
        (name,) = names
        left, right = other.get(name), rows.get(name)
        if (
            type(left) is LinearJacobian
            and type(right) is LinearJacobian
            and left.positions == right.positions == 1
            and self._is_made_of(right)
        ):
            result = self._map_in_sample_space(right, left, damping)
            if result is not None:
                return {name: result}
        return map_by_columns(name, rows, other, self.direct_inverse(damping))

    def _is_made_of(self, rows: LinearJacobian) -> bool:
        found = rows.unit_factors()
        return (
            found is not None
            and found[1].shape == self.weights.shape
            and bool(torch.equal(found[0], self.inputs))
            and bool(torch.equal(found[1], self.weights))
        )

    def _map_in_sample_space(
        self, rows: LinearJacobian, other: LinearJacobian, damping: float
    ) -> Tensor | None:
        """Return the map through ``N × N`` matrices per unit, or None if they are singular.

        With ``D = diag(√s_o)``, ``(aᵀD²a/count + λI)⁻¹aᵀD = aᵀD (D aaᵀ D/count + λI)⁻¹``, and
        samples that leave the unit silent (``s = 0``) take no part. At λ = 0 the scale of D cancels
        and ``aaᵀ`` of the active samples is all there is to invert.
        """
        shape = (other.samples, other.directions, rows.samples, rows.directions)
        result = rows.output_gradients.new_zeros(shape)
        a_other = other.augmented_inputs()[:, 0]
        epsilon = rows.samples * torch.finfo(rows.dtype).eps
        step = max(1, CHUNK_ELEMENTS // (max(rows.samples, other.samples) * rows.samples))
        for group in range(self.layout.groups):
            a, weights = self.inputs[:, group], self.weights[:, group].T
            gram, cross = a @ a.T, a_other[:, group] @ a.T
            for first in range(0, self.layout.d_out, step):
                units = slice(first, first + step)
                active = weights[units] > 0
                s = torch.where(active, weights[units], 1.0).unsqueeze(1)
                both = active.unsqueeze(1) & active.unsqueeze(2)
                matrix = torch.where(both, gram, 0.0)
                scale = (s.mT * s).sqrt()
                if damping > 0:
                    matrix = linalg.add_to_diagonal(matrix * scale / self._count, damping)
                else:
                    matrix = matrix / self._count
                matrix.diagonal(dim1=1, dim2=2).add_((~active).to(matrix.dtype))
                factor, info = torch.linalg.cholesky_ex(matrix)
                pivots = factor.diagonal(dim1=1, dim2=2).square().amin(1)
                limit = matrix.diagonal(dim1=1, dim2=2).amax(1) * epsilon
                if bool((info != 0).any() | (pivots <= limit).any()):
                    return None
                # a'(F_o + λI)⁻¹aᵀ, up to columns of silent samples.
                roots = s.sqrt() if damping > 0 else s
                right = cross * (s.sqrt() if damping > 0 else 1.0)
                solved = torch.cholesky_solve(right.mT, factor).mT / roots
                solved = torch.where(active.unsqueeze(1), solved, 0.0)
                delta = rows.output_gradients[:, :, 0, group, units]
                moved = other.output_gradients[:, :, 0, group, units]
                result += torch.einsum("aku,uab,blu->akbl", moved, solved, delta)
        return result.flatten(2, 3).flatten(0, 1)


@dataclass(frozen=True, eq=False)
class _UnitRowsInverse(DerivedOperator):
    """``(F + λI)⁻¹`` by factorised Gram matrices, chunk by chunk of units.

    Attributes:
        layout: Layout of the layer's block.
        operator: F.
        damping: λ; 0 for the pseudo-inverse.
        factors: Cholesky factors of ``√s√sᵀ∘aaᵀ + count·λI``, or eigenvectors without the shift.
        values: Inverse eigenvalues on the range, for the pseudo-inverse.
    """

    layout: BlockLayout
    operator: UnitRowsOperator
    damping: float
    factors: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    def multiply(self, columns: Tensor) -> Tensor:
        """Solve unit by unit, batched."""
        values, operator, damping = units_of(self.layout, columns), self.operator, self.damping
        count = operator.count.to(values.dtype)
        result = torch.zeros_like(values)
        for index, (units, a, root) in enumerate(operator.chunks()):
            v, r, factor = values[units], root.unsqueeze(-1), self.factors[index]
            if damping == 0:
                scale = self.values[index].square().unsqueeze(-1)
                inner = factor @ (scale * (factor.mT @ (a @ v * r)))
                result[units] = a.T @ (inner * r) * count
                continue

            def once(v: Tensor, a: Tensor = a, r: Tensor = r, factor: Tensor = factor) -> Tensor:
                inner = torch.cholesky_solve(a @ v * r, factor)
                return (v - a.T @ (inner * r)) / damping

            solution = once(v)
            # One step of refinement: the difference loses digits when λ is small beside F.
            product = a.T @ (a @ solution * r.square()) / count
            result[units] = solution + once(v - product - damping * solution)
        return columns_of(self.layout, result)

    def diagonal(self) -> Tensor:
        """Return the diagonal, in float64 where it is a difference of large numbers."""
        operator, pieces = self.operator, []
        count = operator.count.double()
        grams = operator.grams() if self.damping else iter(())
        for index, (_, a, root) in enumerate(operator.chunks()):
            rows = a.double() * root.double().unsqueeze(-1)
            if self.damping == 0:
                scaled = self.factors[index].double() * self.values[index].double().unsqueeze(-2)
                pieces.append((scaled.mT @ rows).square().sum(1) * count)
                continue
            gram = linalg.add_to_diagonal(next(grams).double(), count * self.damping)
            left = torch.linalg.solve_triangular(linalg.cholesky(gram), rows, upper=False)
            pieces.append((1.0 - left.square().sum(1)) / self.damping)
        found = torch.cat(pieces).to(self.dtype)
        return columns_of(self.layout, found.unsqueeze(-1))[:, 0]

    def eigenvalues(self) -> Tensor:
        """Return every unit's eigenvalues; beyond its rows they are ``1/λ``, or zero."""
        operator, count = self.operator, self.operator.count.to(self.dtype)
        if self.damping == 0:
            values = torch.cat([one.flatten() for one in self.values]) * count
        else:
            spectra = [torch.linalg.eigvalsh(gram / count).flatten() for gram in operator.grams()]
            values = 1.0 / (torch.cat(spectra).clamp(min=0.0) + self.damping)
        rest = 1.0 / self.damping if self.damping else 0.0
        return torch.cat([values, values.new_full((self.layout.numel - len(values),), rest)])
