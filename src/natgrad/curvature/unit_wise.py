r"""The unit-wise Fisher matrix: one dense block for the weights and bias into each unit.

For unit ``o`` of a layer with inputs ``a`` the block is
``F_o = (1/count) Σ_r s_ro a_r a_rᵀ`` with ``s_ro = Σ_k δ_rko²``. With fewer rows than inputs the
block is never formed: its rows ``√s_ro a_r`` have the Gram matrix ``√s √sᵀ ∘ (a aᵀ)``, and the
product ``a aᵀ`` is shared by all units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from natgrad import linalg
from natgrad.curvature.base import GradientSource, refuse_options
from natgrad.curvature.cost import Cost, Workload
from natgrad.curvature.function_space import map_by_columns
from natgrad.curvature.partitioned import CurvaturePart, PartitionedFisher
from natgrad.curvature.registry import register_structure
from natgrad.jacobians import CHUNK_ELEMENTS, Jacobians, LinearJacobian
from natgrad.layouts import BlockLayout, ParameterLayout

__all__ = ["UnitWiseFisher"]

#: Largest factorisation of one layer, in entries (2^31 float32 = 8 GiB).
MAX_ENTRIES = 2**31


class UnitWisePart(CurvaturePart):
    """All units of one layer.

    Args:
        name: Block name.
        layout: Its layout.
        parameters: Order, dtype and device of all parameters.
    """

    def __init__(self, name: str, layout: BlockLayout, parameters: ParameterLayout) -> None:
        self.name = name
        self.layout = layout
        self.parameters = parameters
        self.names, self.sizes, self.numel = layout.names, layout.sizes, layout.numel
        self.units = layout.groups * layout.d_out
        self.count = 0.0
        # Sample space: a (R, G, d) and s (R, G, d_out). Parameter space: (units, d, d).
        self.factors: tuple[Tensor, Tensor] | None = None
        self.moment: Tensor | None = None
        self._factor: dict[str, Any] | None = None

    # Accumulation.

    def update(self, jacobians: Jacobians, count: Tensor | float) -> None:
        """Add rows; they stay rows until there are more of them than inputs.

        Raises:
            ValueError: If a layer is too wide for one dense block per unit.
        """
        if self.name not in jacobians:
            self.count += float(count)
            return
        jacobian = jacobians[self.name]
        factors = jacobian.unit_factors() if self.moment is None else None
        if factors is not None and self._fits(factors[0].shape[0]):
            if not bool(torch.isfinite(factors[0]).all() & torch.isfinite(factors[1]).all()):
                return
            self.count += float(count)
            if self.factors is None:
                self.factors = factors
            else:
                a, s = self.factors
                self.factors = torch.cat([a, factors[0]]), torch.cat([s, factors[1]])
            return
        self._check_size(self.layout.d_augmented)
        moment = jacobian.unit_blocks()
        if not bool(torch.isfinite(moment).all()):
            return
        self.count += float(count)
        if self.factors is not None:
            for units, a, root in self._unit_chunks(self.factors):
                rows = a * root.unsqueeze(-1)
                moment[units] += rows.mT @ rows
            self.factors = None
        self.moment = moment if self.moment is None else self.moment + moment

    def _fits(self, rows: int) -> bool:
        kept = 0 if self.factors is None else self.factors[0].shape[0]
        return kept + rows <= self.layout.d_augmented

    def _check_size(self, side: int) -> None:
        if self.units * side**2 > MAX_ENTRIES:
            raise ValueError(
                f"unit-wise curvature of {self.name!r} needs {self.units} matrices of size "
                f"{side} x {side} ({self.units * side**2 * 4 / 2**30:.0f} GiB); use structure "
                "'kfac' or a smaller batch"
            )

    def discount(self, factor: float) -> None:
        """Discount sums; with 0 forget them."""
        self.count *= factor
        if factor == 0.0:
            self.factors = self.moment = None
            return
        if self.factors is not None:
            self.factors = (self.factors[0], self.factors[1] * factor)
        if self.moment is not None:
            self.moment = self.moment * factor

    # Products with unit rows. A unit's rows are √s_ro a_r.

    def _unit_chunks(
        self, factors: tuple[Tensor, Tensor]
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield (units, inputs ``(R, d)``, roots ``(units, R)``) in chunks of one group."""
        inputs, weights = factors
        rows, d_out = inputs.shape[0], self.layout.d_out
        step = max(1, CHUNK_ELEMENTS // max(1, rows * max(rows, inputs.shape[2])))
        for group in range(self.layout.groups):
            a, roots = inputs[:, group], weights[:, group].T.sqrt()
            for first in range(0, d_out, step):
                last = min(first + step, d_out)
                base = group * d_out
                yield slice(base + first, base + last), a, roots[first:last]

    def _units_of(self, columns: Tensor) -> Tensor:
        """Turn flat columns ``(P_l, k)`` into ``(units, d, k)``."""
        return self.layout.matrix(columns.T).flatten(1, 2).permute(1, 2, 0)

    def _columns_of(self, units: Tensor) -> Tensor:
        """Turn ``(units, d, k)`` into flat columns ``(P_l, k)``."""
        matrices = units.permute(2, 0, 1).unflatten(1, (self.layout.groups, self.layout.d_out))
        return self.layout.flat(matrices).T

    def _grams(self, factors: tuple[Tensor, Tensor]) -> Iterator[Tensor]:
        """Yield ``(units, R, R)``; the units of a group share the product ``a aᵀ``."""
        shared: tuple[Tensor, Tensor] | None = None
        for _, a, root in self._unit_chunks(factors):
            if shared is None or shared[0] is not a:
                shared = (a, a @ a.T)
            yield shared[1] * root.unsqueeze(1) * root.unsqueeze(2)

    # The matrix.

    def matvec(self, columns: Tensor) -> Tensor:
        """Return ``F_l V``."""
        values = self._units_of(columns)
        if self.moment is not None:
            return self._columns_of(self.moment @ values / self.count)
        result = torch.zeros_like(values)
        if self.factors is not None:
            for units, a, root in self._unit_chunks(self.factors):
                weights = a @ values[units] * root.square().unsqueeze(-1)
                result[units] = a.T @ weights / self.count
        return self._columns_of(result)

    def solver(self, damping: float) -> Callable[[Tensor], Tensor]:
        """Factorise unit by unit, batched."""
        if self.moment is None and self.factors is None:
            return lambda v: v / damping if damping else torch.zeros_like(v)
        factor = self._factorize(damping)
        return lambda v: self._columns_of(self._apply(factor, self._units_of(v)))

    def function_space_map(
        self, rows: Jacobians, other: Jacobians, damping: float
    ) -> dict[str, Tensor]:
        """Return ``Σ_o (δ'_o δ_oᵀ) ∘ a'(F_o + λI)⁻¹aᵀ``, in sample space where that is possible."""
        left, right = other.get(self.name), rows.get(self.name)
        if (
            type(left) is LinearJacobian
            and type(right) is LinearJacobian
            and left.positions == right.positions == 1
            and self._keeps_inputs_of(right)
        ):
            result = self._map_in_sample_space(right, left, damping)
            if result is not None:
                return {self.name: result}
        return map_by_columns(self.name, rows, other, self.solver(damping))

    def _keeps_inputs_of(self, rows: LinearJacobian) -> bool:
        """Return whether the kept rows are exactly those of ``rows``."""
        if self.factors is None:
            return False
        found = rows.unit_factors()
        return (
            found is not None
            and found[1].shape == self.factors[1].shape
            and bool(torch.equal(found[0], self.factors[0]))
            and bool(torch.equal(found[1], self.factors[1]))
        )

    def _map_in_sample_space(
        self, rows: LinearJacobian, other: LinearJacobian, damping: float
    ) -> Tensor | None:
        """Return the map through ``N × N`` matrices per unit, or None if they are singular.

        With ``D = diag(√s_o)``, ``(aᵀD²a/count + λI)⁻¹aᵀD = aᵀD (D aaᵀ D/count + λI)⁻¹``, and
        samples that leave the unit silent (``s = 0``) take no part. At λ = 0 the scale of D cancels
        and ``aaᵀ`` of the active samples is all there is to invert.
        """
        assert self.factors is not None
        result = rows.output_gradients.new_zeros(other.samples, other.directions, rows.samples,
                                                 rows.directions)  # fmt: skip
        a_other = other.augmented_inputs()[:, 0]
        epsilon = rows.samples * torch.finfo(rows.dtype).eps
        step = max(1, CHUNK_ELEMENTS // (max(rows.samples, other.samples) * rows.samples))
        for group in range(self.layout.groups):
            a, weights = self.factors[0][:, group], self.factors[1][:, group].T
            gram, cross = a @ a.T, a_other[:, group] @ a.T
            for first in range(0, self.layout.d_out, step):
                units = slice(first, first + step)
                active = weights[units] > 0
                s = torch.where(active, weights[units], 1.0).unsqueeze(1)
                both = active.unsqueeze(1) & active.unsqueeze(2)
                matrix = torch.where(both, gram, 0.0)
                scale = (s.mT * s).sqrt()
                if damping > 0:
                    matrix = linalg.add_to_diagonal(matrix * scale / self.count, damping)
                else:
                    matrix = matrix / self.count
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

    def _factorize(self, damping: float) -> dict[str, Any]:
        """Return what :meth:`_apply` needs, with its own references to the rows."""
        factor: dict[str, Any] = {"damping": damping, "count": self.count}
        if self.moment is not None:
            matrix = self.moment / self.count
            if damping > 0:
                shifted = linalg.add_to_diagonal(matrix, damping)
                return factor | {"cholesky": linalg.cholesky(shifted)}
            values, vectors = linalg.eigh(matrix)
            return factor | {"values": values, "vectors": vectors}
        assert self.factors is not None
        rows = self.factors[0].shape[0]
        self._check_size(rows)
        factor |= {"inputs": self.factors[0], "weights": self.factors[1]}
        pieces: list[Any] = []
        for gram in self._grams(self.factors):
            if damping > 0:
                pieces.append(linalg.cholesky(linalg.add_to_diagonal(gram, self.count * damping)))
            else:
                pieces.append(linalg.eigh(gram))
        return factor | {"pieces": pieces}

    def _apply(self, factor: dict[str, Any], values: Tensor) -> Tensor:
        """Solve for ``(units, d, k)`` with a factorisation."""
        damping, count = factor["damping"], factor["count"]
        if "cholesky" in factor:
            return torch.cholesky_solve(values, factor["cholesky"])
        if "vectors" in factor:
            return linalg.symmetric_pseudo_solve(factor["values"], factor["vectors"], values)
        result = torch.zeros_like(values)
        chunks = self._unit_chunks((factor["inputs"], factor["weights"]))
        for (units, a, root), piece in zip(chunks, factor["pieces"], strict=True):
            v, r = values[units], root.unsqueeze(-1)
            if damping == 0:
                spectrum, basis = piece
                inner = linalg.symmetric_pseudo_solve(spectrum, basis, a @ v * r, power=2)
                result[units] = a.T @ (inner * r) * count
                continue

            def once(v: Tensor, a: Tensor = a, r: Tensor = r, piece: Tensor = piece) -> Tensor:
                inner = torch.cholesky_solve(a @ v * r, piece)
                return (v - a.T @ (inner * r)) / damping

            solution = once(v)
            # One step of refinement: the difference loses digits when λ is small beside F.
            product = a.T @ (a @ solution * r.square()) / count
            result[units] = solution + once(v - product - damping * solution)
        return result

    def trace(self) -> Tensor:
        """Return the trace."""
        return self.diagonal().sum()

    def diagonal(self) -> Tensor:
        """Return the diagonal."""
        if self.moment is not None:
            diagonal = self.moment.diagonal(dim1=1, dim2=2) / self.count
            return self._columns_of(diagonal.unsqueeze(-1))[:, 0]
        if self.factors is None:
            return self.parameters.zeros(self.numel)
        a, s = self.factors
        return self.layout.flat(torch.einsum("rgo,rgi->goi", s, a.square())) / self.count

    def eigenvalues(self) -> Tensor:
        """Return every unit's eigenvalues, padded with zeros."""
        if self.moment is not None:
            return torch.linalg.eigvalsh(self.moment / self.count).clamp(min=0).flatten()
        if self.factors is None:
            return self.parameters.zeros(self.numel)
        values = torch.cat(
            [
                torch.linalg.eigvalsh(gram / self.count).flatten()
                for gram in self._grams(self.factors)
            ]
        ).clamp(min=0)
        return torch.cat([values, values.new_zeros(self.numel - values.numel())])

    def to_dense(self) -> Tensor:
        """Return the block in flat parameter order."""
        return self.matvec(torch.eye(self.numel, dtype=self._dtype(), device=self._device()))

    def _dtype(self) -> torch.dtype:
        present = self.moment if self.factors is None else self.factors[0]
        return self.parameters.dtype if present is None else present.dtype

    def _device(self) -> torch.device:
        present = self.moment if self.factors is None else self.factors[0]
        return self.parameters.device if present is None else present.device

    # Training.

    def refresh(self, damping: float) -> None:
        """Factorise every unit's block or Gram matrix."""
        if self.moment is not None or self.factors is not None:
            self._factor = self._factorize(damping)

    def precondition(self, source: GradientSource) -> dict[str, Tensor]:
        """Return the natural gradient of the layer."""
        gradients = [source.gradients[name] for name in self.names]
        if self._factor is None:
            return dict(zip(self.names, gradients, strict=True))
        flat = self.layout.gather(gradients).to(self._dtype()).unsqueeze(1)
        solved = self._columns_of(self._apply(self._factor, self._units_of(flat)))[:, 0]
        return dict(zip(self.names, self.layout.scatter(solved), strict=True))

    def cost(self, workload: Workload) -> Cost:
        """Return the cost of one factorisation per unit."""
        positions = workload.positions.get(self.name, 1)
        rows = workload.samples * (1 if positions == 1 else workload.directions)
        d = self.layout.d_augmented
        size = min(rows, d)
        forming = float(self.units) * rows * (size**2 if size == d else rows)
        step = 2.0 * self.units * (size**2 + (rows * d if size < d else 0))
        return Cost(
            f"{self.units} of {size} x {size}",
            2 * self.parameters.dtype.itemsize * self.units * size**2,
            forming + self.units * size**3 / 3,
            step,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return sums, counts and the factorisation."""
        factors = None if self.factors is None else list(self.factors)
        return {
            "count": self.count,
            "factors": factors,
            "moment": self.moment,
            "factor": self._factor,
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore them."""
        self.count = state["count"]
        factors, moment = state["factors"], state["moment"]
        self.factors = None if factors is None else (factors[0].to(device), factors[1].to(device))
        self.moment = None if moment is None else moment.to(device)
        self._factor = torch.utils._pytree.tree_map_only(
            Tensor, lambda tensor: tensor.to(device), state["factor"]
        )


@register_structure
class UnitWiseFisher(PartitionedFisher):
    """One dense block per output unit: its incoming weights and its bias.

    In wide networks its update is isotropic in function space with α ≈ γM(L − 1), γ the fraction
    of active units (Karakida & Osawa 2020). Norm layers have one ``2 × 2`` block per channel; a
    module without factored rows is one unit.
    """

    structure: ClassVar[str] = "unit_wise"

    def make_parts(self, **options: Any) -> dict[str, CurvaturePart]:
        """Return one part per block."""
        refuse_options(self.structure, options)
        return {n: UnitWisePart(n, block, self.layout) for n, block in self.blocks.items()}
