r"""The unit-wise Fisher matrix: one dense block for the weights and bias into each unit.

.. math:: F_o = \frac{1}{count} \sum_r s_{ro}\, a_r a_r^\top, \qquad s_{ro} = \sum_k \delta_{rko}^2
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from natgrad.curvature.cost import Cost, Workload
from natgrad.curvature.structure import Part, Structure, register_structure
from natgrad.distributed.exchange import Symmetric
from natgrad.jacobians import CHUNK_ELEMENTS, FIRST_DRAW, Draw, Jacobians
from natgrad.layouts import ParameterLayout
from natgrad.operators import DiagonalOperator, Operator
from natgrad.operators.unit_blocks import UnitBlocksOperator, UnitRowsOperator, check_unit_memory
from natgrad.statistics import Statistics


@dataclass(frozen=True, eq=False)
class UnitStatistics(Statistics):
    """Rows of all units, until there are more of them than inputs; then one moment per unit.

    Attributes:
        inputs: a, ``(R, G, d)``.
        weights: s, ``(R, G, d_out)``.
        moment: ``Σ_r s_ro a_r a_rᵀ``, ``(units, d, d)``.
    """

    inputs: Tensor | None = None
    weights: Tensor | None = None
    moment: Tensor | None = None

    def followed_by(self, other: Self, decay: float = 1.0) -> Self:
        """Return ``decay · self + other``."""
        if decay == 0:
            return other
        count = self.count * decay + other.count
        own = self.scaled_by_weight(decay)
        if own.inputs is not None and other.inputs is not None:
            assert own.weights is not None and other.weights is not None
            if own.inputs.shape[0] + other.inputs.shape[0] <= own.inputs.shape[2]:
                return replace(
                    self,
                    count=count,
                    inputs=torch.cat([own.inputs, other.inputs]),
                    weights=torch.cat([own.weights, other.weights]),
                )
        moments = [one.whole_moment() for one in (own, other)]
        return type(self)(count, moment=moments[0] + moments[1])

    def scaled_by_weight(self, factor: float) -> Self:
        """Return the sums times a factor, which rows carry in their weights."""
        weights = None if self.weights is None else self.weights * factor
        moment = None if self.moment is None else self.moment * factor
        return replace(self, weights=weights, moment=moment)

    def scaled(self, factor: float) -> Self:
        """Return sums and count times a factor."""
        return replace(self.scaled_by_weight(factor), count=self.count * factor)

    def sums(self) -> dict[str, Any]:
        """Return count and moment."""
        state = replace(self, inputs=None, weights=None).state_dict()
        if self.moment is not None:
            state["moment"] = Symmetric(self.moment)
        return state

    def rows(self) -> Any:
        """Return the rows."""
        return None if self.inputs is None else (self.inputs, self.weights)

    def with_rows(self, found: Sequence[Any], layout: ParameterLayout) -> Self:
        """Return sums with the rows of all processes."""
        result, none = self, torch.zeros_like(self.count)
        for inputs, weights in (one for one in found if one is not None):
            if result.moment is None and result.inputs is None:
                result = replace(result, inputs=inputs, weights=weights)
            else:
                result = result.followed_by(type(self)(none, inputs, weights))
        return result

    def whole_moment(self) -> Tensor:
        """Return the moment, of the rows where these are kept."""
        if self.moment is not None:
            return self.moment
        assert self.inputs is not None and self.weights is not None
        rows, groups, d = self.inputs.shape
        d_out, step = self.weights.shape[2], max(1, CHUNK_ELEMENTS // max(1, rows * d))
        total = self.inputs.new_zeros(groups, d_out, d, d)
        for group in range(groups):
            a, roots = self.inputs[:, group], self.weights[:, group].T.sqrt()
            for first in range(0, d_out, step):
                scaled = a * roots[first : first + step].unsqueeze(-1)
                total[group, first : first + step] = scaled.mT @ scaled
        return total.flatten(0, 1)


@register_structure
@dataclass(frozen=True)
class UnitWise(Structure):
    """One dense block per output unit: its incoming weights and its bias.

    In wide networks its update is isotropic in function space with α ≈ γM(L − 1), γ the fraction
    of active units (Karakida & Osawa 2020). Norm layers have one ``2 × 2`` block per channel; a
    module without factored rows is one unit. A layer too wide for one dense block per unit raises a
    ValueError.
    """

    name: ClassVar[str] = "unit_wise"

    def statistics(
        self,
        part: Part,
        rows: Jacobians,
        count: Tensor,
        *,
        previous: Statistics | None = None,
        draw: Draw = FIRST_DRAW,
        continued: bool = False,
    ) -> UnitStatistics:
        """Keep rows while they are no more than inputs, and there are no moments yet."""
        jacobian = rows[part.name]
        kept = isinstance(previous, UnitStatistics) and previous.moment is not None
        factors = None if kept else jacobian.unit_factors()
        if factors is not None and factors[0].shape[0] <= part.block.d_augmented:
            return UnitStatistics(count, *factors)
        check_unit_memory(part.block, part.block.d_augmented)
        return UnitStatistics(count, moment=jacobian.unit_blocks())

    def operator(self, part: Part, statistics: Statistics | None) -> Operator:
        """Return the blocks, in sample space or as they are."""
        block = part.block
        if statistics is None:
            return DiagonalOperator(block, part.parameters.zeros(block.numel))
        assert isinstance(statistics, UnitStatistics)
        if statistics.moment is not None:
            mean = statistics.moment / statistics.count.to(statistics.moment.dtype)
            return UnitBlocksOperator(block, mean)
        assert statistics.inputs is not None and statistics.weights is not None
        return UnitRowsOperator(block, statistics.inputs, statistics.weights, statistics.count)

    def cost(self, part: Part, workload: Workload) -> Cost:
        """Return the cost of one factorisation per unit."""
        block = part.block
        positions = workload.positions.get(part.name, 1)
        rows = workload.samples * (1 if positions == 1 else workload.directions)
        units, d = block.groups * block.d_out, block.d_augmented
        size = min(rows, d)
        forming = float(units) * rows * (size**2 if size == d else rows)
        step = 2.0 * units * (size**2 + (rows * d if size < d else 0))
        memory = 2 * part.parameters.dtype.itemsize * units * size**2
        factors = f"{units} of {size} x {size}"
        return Cost(factors, memory, forming + units * size**3 / 3, step)
