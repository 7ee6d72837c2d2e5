r"""FOOF: every layer's block from its inputs alone, the identity for its outputs.

.. math:: F_l \approx I \otimes A, \qquad A = \frac{1}{NT} \sum_{nt} a_{nt} a_{nt}^\top

acting on the row-major matrix ``[W | b]`` (Benzing 2022), so that a layer's gradient G becomes
``G (A + λI)⁻¹``: gradient descent on the outputs of the layer. It is K-FAC without the second
moments of output gradients, not an approximation of the Fisher matrix but in its inputs, and its
damping is in units of squared inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from natgrad import linalg
from natgrad.curvature.cost import Cost, Workload
from natgrad.curvature.kfac import check_factors, zero_factors
from natgrad.curvature.structure import Part, Structure, register_structure
from natgrad.jacobians import (
    FIRST_DRAW,
    Draw,
    Jacobians,
    KroneckerSums,
    LayerJacobian,
    LinearJacobian,
    WeightSharing,
)
from natgrad.jacobians.layer import added
from natgrad.jacobians.positions import enough_rows
from natgrad.jacobians.tied import SumJacobian, is_other_way_round
from natgrad.layouts import BlockLayout
from natgrad.operators import KroneckerOperator, Operator
from natgrad.statistics import KroneckerStatistics, Statistics


@register_structure
@dataclass(frozen=True)
class ForwardOnly(Structure):
    """One factor per layer, the second moment of its inputs; memory ``d_a²``.

    Every Fisher type gives the same matrix, as far as layers have inputs: with
    ``fisher="empirical"`` training takes them from its own backward pass, and no other is made.
    Rows of layers without a factored form give the A of the nearest ``I ⊗ A``, the mean of the
    blocks of single outputs, whose output gradients then count. A parameter used both ways round,
    as of an embedding tied to the output layer, has one product with the trace of both.

    Attributes:
        weight_sharing: ``"expand"`` takes every position of a shared weight as a sample of its own;
            ``"reduce"`` averages inputs over positions first.
        max_factor_size: Larger factors are kept as their diagonal; None for no limit.
        rows_per_unit: As in :class:`natgrad.curvature.KroneckerFactors`, None (default) for all.

    Raises:
        ValueError: If an option is out of range.

    Source: Benzing, Gradient descent on neurons and its link to approximate second-order
    optimization (2022).
    """

    name: ClassVar[str] = "foof"

    weight_sharing: WeightSharing = "expand"
    max_factor_size: int | None = 8192
    rows_per_unit: float | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        check_factors(self.weight_sharing, self.rows_per_unit, splits=False)

    def statistics(
        self,
        part: Part,
        rows: Jacobians,
        count: Tensor,
        *,
        previous: Statistics | None = None,
        draw: Draw = FIRST_DRAW,
        continued: bool = False,
    ) -> KroneckerStatistics:
        """Sum ``a aᵀ``."""
        own = rows[part.name]
        (taken,) = own.product_rows(self.weight_sharing, self.rows_per_unit, draw)
        return KroneckerStatistics.of(count, self._sums(taken, count, continued))

    def _sums(self, rows: LayerJacobian, count: Tensor, continued: bool) -> KroneckerSums:
        """Return the sums of inputs, and count times the identity for the outputs'."""
        if isinstance(rows, SumJacobian):
            return self._sums_of_uses(rows, count, continued)
        number = count.to(rows.device, rows.dtype)
        outputs = number.expand(rows.layout.groups, rows.layout.d_out)
        if not isinstance(rows, LinearJacobian):
            found = rows.kronecker_factors(self.weight_sharing, self.max_factor_size, continued)
            return KroneckerSums(found.inputs, number * rows.layout.d_out, outputs)
        if continued:
            return KroneckerSums(None, torch.zeros_like(number), outputs)
        inputs, positions = rows.input_factor(self.weight_sharing, self.max_factor_size)
        return KroneckerSums(inputs, positions, outputs)

    def _sums_of_uses(self, rows: SumJacobian, count: Tensor, continued: bool) -> KroneckerSums:
        """Return the sums of uses the one way round, and of those the other way round."""
        both: list[KroneckerSums | None] = [None, None]
        for part in rows.parts:
            place = int(is_other_way_round(part.layout, rows.layout))
            found, known = self._sums(part, count, continued), both[place]
            if known is not None:
                inputs, positions = added(known.inputs, found.inputs), known.positions
                found = KroneckerSums(inputs, positions + found.positions, found.outputs)
            both[place] = found
        straight, turned = both
        if turned is not None:
            turned = KroneckerSums(turned.outputs, turned.positions, turned.inputs)
        if straight is None:
            none = torch.zeros((), dtype=rows.dtype, device=rows.device)
            straight = KroneckerSums(None, none, None)
        return KroneckerSums(straight.inputs, straight.positions, straight.outputs, turned)

    def operator(self, part: Part, statistics: Statistics | None) -> Operator:
        """Return ``I ⊗ A``."""
        if statistics is None:
            return InputFactorOperator.of(part.block, zero_factors(part)[0])
        assert isinstance(statistics, KroneckerStatistics)
        a, b = statistics.mean_factors()
        if statistics.further is not None:
            return KroneckerOperator(part.block, a, b)
        # Below 1 where some samples passed the layer by.
        share = b[:, :1] if a.dim() == 2 else b[:, :1, None]
        return InputFactorOperator.of(part.block, a * share)

    def cost(self, part: Part, workload: Workload) -> Cost:
        """Return the cost of one factor per group."""
        block = part.block
        size = block.d_augmented
        diagonal = block.one_hot or block.large_factors(self.max_factor_size)[0]
        rows = workload.samples * workload.positions.get(part.name, 1)
        enough = enough_rows(block, self.rows_per_unit) or rows
        entries = block.groups * (size if diagonal else size**2)
        refresh = float(min(rows, max(enough, workload.samples))) * entries
        refresh += 0 if diagonal else block.groups * float(size) ** 3
        shape = f"diag({size})" if diagonal else f"{size} x {size}"
        prefix = "" if block.groups == 1 else f"{block.groups} of "
        memory = 2 * part.dtype.itemsize * entries
        return Cost(prefix + shape, memory, refresh, float(entries) * block.d_out)


@dataclass(frozen=True, eq=False)
class InputFactorOperator(KroneckerOperator):
    """``I ⊗ A``: damping it is damping A, ``(I ⊗ A + λI)⁻¹ = I ⊗ (A + λI)⁻¹``, by Cholesky."""

    @classmethod
    def of(cls, layout: BlockLayout, inputs: Tensor) -> Self:
        """Return ``I ⊗ A``.

        Args:
            layout: Layout of the layer's block.
            inputs: A, ``(G, d, d)``, right in its lower triangles, or its diagonal ``(G, d)``.
        """
        return cls(layout, inputs, inputs.new_ones(layout.groups, layout.d_out))

    @classmethod
    def inverses(cls, operators: Sequence[Self], dampings: Sequence[float]) -> list[Operator]:
        """Return the inverses of several; factors of one shape are factorised together."""
        if min(dampings) == 0:
            return super().inverses(operators, dampings)
        shifted = [
            one.inputs + damping
            if one.inputs.dim() == 2
            else linalg.add_to_diagonal(one.inputs, damping)
            for one, damping in zip(operators, dampings, strict=True)
        ]
        dense = iter(linalg.map_stacked(linalg.inverse, [x for x in shifted if x.dim() == 3]))
        inverted = [next(dense) if x.dim() == 3 else x.reciprocal() for x in shifted]
        pairs = zip(operators, inverted, strict=True)
        return [replace(one, inputs=inverse, lower=False) for one, inverse in pairs]
