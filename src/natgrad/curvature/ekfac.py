r"""EKFAC: K-FAC's eigenbases with second moments measured in them.

.. math:: F_l \approx (U_B \otimes U_A)\, \mathrm{diag}(s)\, (U_B \otimes U_A)^\top, \qquad
          s = \frac{1}{count} \sum_{nk} (U_B^\top M_{nk} U_A)^2

with the eigenvectors of K-FAC's factors ``A`` and ``B`` and the rows ``M_nk`` as matrices (George
et al. 2018). ``s`` is the diagonal of the exact block in that basis, so the trace is exact and no
other diagonal is closer to the block in Frobenius norm; K-FAC's is one of those others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from natgrad.curvature.cost import Cost, Elements, Workload, factored_elements
from natgrad.curvature.kfac import KroneckerFactors
from natgrad.curvature.structure import Part, Structure, as_structure, register_structure
from natgrad.jacobians import (
    FIRST_DRAW,
    Draw,
    Jacobians,
    LayerJacobian,
    LinearJacobian,
    WeightSharing,
)
from natgrad.jacobians.moments import second_moments
from natgrad.jacobians.packing import pack_layer, unpack_layer
from natgrad.jacobians.positions import random_samples
from natgrad.layouts import ParameterLayout
from natgrad.operators import EigenKroneckerOperator
from natgrad.operators.eigen_kronecker import Basis, eigenbasis, moved
from natgrad.statistics import KroneckerStatistics, Statistics

#: Rows of several updates wait for a basis together while they have no more elements than this.
KEPT_ELEMENTS = 2**22


@dataclass(frozen=True, eq=False)
class EigenStatistics(Statistics):
    """Kronecker factors, a basis, and the squared rows in it.

    Rows wait until the statistics are used, and are then measured in the basis of that moment; rows
    of earlier updates that were not used since are kept with them up to 2²² elements and measured
    before that otherwise. So the moments are exactly those of all data, if they came in one update,
    or in several that are small enough and are not used in between; and the rows of a step that
    factorises are measured in the new basis. Of rows that are gone a new basis keeps the diagonal,
    in it, of the matrix they had given in the old one. That is the nearest diagonal to that matrix
    and keeps its trace, so the trace is always exact, but it is not what the rows would give.

    Attributes:
        factors: What the basis is the eigenbasis of.
        basis: ``(U_A, U_B)``, ``(G, d, d)`` each or None for the identity; None before the first.
        moments: ``Σ (U_Bᵀ M U_A)²``, ``(G, d_out, d_in + bias)``.
        waiting: Rows that wait, with weights.
    """

    factors: KroneckerStatistics
    basis: Basis | None = None
    moments: Tensor | None = None
    waiting: tuple[tuple[LayerJacobian, float], ...] = ()

    def followed_by(self, other: Self, decay: float = 1.0) -> Self:
        """Return ``decay · self + other``; other's rows wait, the basis stays."""
        if decay == 0:
            return other if other.moments is not None else replace(other, basis=self.basis)
        own = self
        held = sum(_elements(rows) for rows, _ in own.waiting)
        if held and held + sum(_elements(rows) for rows, _ in other.waiting) > KEPT_ELEMENTS:
            own = own.settled()
        own = replace(
            own,
            count=own.count * decay + other.count,
            factors=own.factors.followed_by(other.factors, decay),
            moments=None if own.moments is None else own.moments * decay,
            waiting=tuple((r, weight * decay) for r, weight in own.waiting) + other.waiting,
        )
        return own._with_moments(other.moments, other.basis)

    def _with_moments(self, moments: Tensor | None, basis: Basis | None) -> Self:
        """Return the sum with moments in a basis; one's own stays, if there is one."""
        if moments is None or basis is None:
            return self
        if self.basis is None:
            return replace(self, basis=basis, moments=moments)
        found = moved(moments, basis, self.basis)
        return replace(self, moments=found if self.moments is None else self.moments + found)

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Return the statistics with a function applied to all tensors but those of rows."""
        plain = super(EigenStatistics, replace(self, waiting=())).mapped(function)
        return replace(plain, waiting=self.waiting)

    def is_finite(self) -> Tensor:
        """Return whether the factors are finite, which rows that are not would spoil."""
        return self.factors.is_finite()

    def in_basis(self, basis: Basis) -> Self:
        """Return the same in a basis, rows that wait included."""
        total = self.moments
        if total is not None and self.basis is not None and basis is not self.basis:
            total = moved(total, self.basis, basis)
        for rows, weight in self.waiting:
            squares = second_moments(rows, *basis)
            squares = squares if weight == 1.0 else squares * weight
            total = squares if total is None else total + squares
        return replace(self, basis=basis, moments=total, waiting=())

    def settled(self) -> Self:
        """Return the same without rows that wait, in the present basis or that of the factors."""
        if not self.waiting:
            return self
        return self.in_basis(_bases([self])[0] if self.basis is None else self.basis)

    def sums(self) -> dict[str, Any]:
        """Return count and factors."""
        plain = replace(self, waiting=(), basis=None, moments=None)
        return {**plain.state_dict(), "factors": self.factors.sums()}

    def rows(self) -> Any:
        """Return the rows that wait, and the moments of others with their basis."""
        waiting = [(pack_layer(rows), weight) for rows, weight in self.waiting]
        basis = None if self.moments is None else self.basis
        return {"waiting": waiting, "moments": self.moments, "basis": basis}

    def with_rows(self, found: Sequence[Any], layout: ParameterLayout) -> Self:
        """Return the sums with the rows and moments of all processes."""
        device, result = self.count.device, self
        for one in (each for each in found if each is not None):
            waiting = tuple((unpack_layer(rows, device), w) for rows, w in one["waiting"])
            result = replace(result, waiting=result.waiting + waiting)
            result = result._with_moments(one["moments"], one["basis"] and tuple(one["basis"]))
        return result

    def renewal(self) -> Any:
        """Return basis and moments."""
        return {"basis": self.basis, "moments": self.moments}

    def with_renewal(self, found: Any) -> Self:
        """Return the moments in a new basis."""
        return replace(self, basis=tuple(found["basis"]), moments=found["moments"], waiting=())

    def for_checkpoint(self) -> EigenStatistics:
        """Return the same without rows that wait."""
        return self.settled()


def _bases(statistics: Sequence[EigenStatistics]) -> list[Basis]:
    """Return the eigenbases of all factors, decomposed together."""
    found = eigenbasis([x for one in statistics for x in one.factors.mean_factors()])
    return [(found[i][0], found[i + 1][0]) for i in range(0, len(found), 2)]


def _elements(rows: LayerJacobian) -> int:
    return sum(tensor.numel() for tensor in rows.state().values())


@register_structure
@dataclass(frozen=True)
class EigenKronecker(Structure):
    """K-FAC's eigenbasis with exact second moments; ``d_a d_g`` more memory than K-FAC.

    Damping is added to the moments, so ``(F + λI)⁻¹`` is exact. The basis is renewed by every
    factorisation, the moments with every update (:class:`EigenStatistics` says how they meet).

    Attributes:
        weight_sharing: ``"expand"``, ``"reduce"`` or ``"split"``, as in K-FAC; this and the next
            two concern the basis only: the moments are those of the exact rows.
        max_factor_size: Larger factors are kept as their diagonal, and those of outputs from an
            eighth of it on where they are more than eight times the inputs; None for no limit.
        rows_per_unit: If a batch has more rows than this times the size of the larger factor, an
            update of *expand* factors takes a random subset of positions; None for all.
        max_moment_samples: If a batch has more samples and the weight is shared, an update of the
            moments takes a random subset of samples, drawn anew every time, which is unbiased.
            None for all.

    Raises:
        ValueError: If an option is out of range.
    """

    name: ClassVar[str] = "ekfac"
    shareable: ClassVar[bool] = True
    object_options: ClassVar[Mapping[str, Any]] = {
        "rows_per_unit": None,
        "max_moment_samples": None,
    }
    follows_updates: ClassVar[bool] = True

    weight_sharing: WeightSharing = "expand"
    max_factor_size: int | None = 8192
    rows_per_unit: float | None = 4.0
    max_moment_samples: int | None = 16

    def __post_init__(self) -> None:
        """Check the options."""
        self.factors()  # Which checks what it is made with.
        if self.max_moment_samples is not None and self.max_moment_samples < 1:
            raise ValueError(
                f"max_moment_samples must be at least 1 or None, got {self.max_moment_samples}"
            )

    def factors(self) -> Structure:
        """Return the structure whose factors give the basis."""
        return KroneckerFactors(
            self.weight_sharing,
            max_factor_size=self.max_factor_size,
            rows_per_unit=self.rows_per_unit,
        )

    def statistics(
        self,
        part: Part,
        rows: Jacobians,
        count: Tensor,
        *,
        previous: Statistics | None = None,
        draw: Draw = FIRST_DRAW,
        continued: bool = False,
    ) -> EigenStatistics:
        """Sum what the factors are made of, and let the rows wait for a basis."""
        factors = self.factors().statistics(part, rows, count, draw=draw, continued=continued)
        assert isinstance(factors, KroneckerStatistics)
        basis = previous.basis if isinstance(previous, EigenStatistics) else None
        waiting = (self._sampled(rows[part.name], draw),)
        return EigenStatistics(count, factors, basis, waiting=waiting)

    def _sampled(self, rows: LayerJacobian, draw: Draw) -> tuple[LayerJacobian, float]:
        """Return the rows, or those of some samples, and what their squares count."""
        limit = self.max_moment_samples
        if limit is None or not isinstance(rows, LinearJacobian) or rows.positions == 1:
            return rows, 1.0
        chosen, weight = random_samples(rows.samples, limit, draw)
        if chosen is None:
            return rows, weight
        return rows.of_samples(torch.tensor(chosen, dtype=torch.long, device=rows.device)), weight

    def settled(self, part: Part, statistics: EigenStatistics) -> EigenStatistics:
        """Measure rows that wait."""
        return statistics.settled()

    def renewed(
        self, parts: Sequence[Part], statistics: Sequence[Any], dampings: Sequence[float]
    ) -> list[Any]:
        """Make the bases of the present factors and move the moments there."""
        bases = _bases(statistics)
        return [one.in_basis(basis) for one, basis in zip(statistics, bases, strict=True)]

    def operator(self, part: Part, statistics: Statistics | None) -> EigenKroneckerOperator:
        """Return the moments in their basis."""
        block = part.block
        if statistics is None:
            zeros = part.parameters.zeros(block.groups, block.d_out, block.d_augmented)
            return EigenKroneckerOperator(block, None, None, zeros)
        assert isinstance(statistics, EigenStatistics)
        settled = statistics.settled()
        assert settled.basis is not None and settled.moments is not None
        count = settled.count.clamp(min=1e-300).to(settled.moments.dtype)
        return EigenKroneckerOperator(block, *settled.basis, settled.moments / count)

    def cost(self, part: Part, workload: Workload) -> Cost:
        """Return the factors' cost, with the moments, and with a rotation there and back."""
        # Gradients alone are rotated, and by dense factors alone: as K-FAC multiplies them.
        base = self.factors().cost(part, replace(workload, processes=2))
        rotation = base.step
        memory = part.dtype.itemsize * self.elements(part, workload).kept
        # Moving moments to another basis takes as much as moving a gradient.
        refresh = base.refresh + self.joint_work(part, workload) + rotation
        return Cost(base.factors, memory, refresh, 2 * rotation)

    def joint_work(self, part: Part, workload: Workload) -> float:
        """Return the cost of the moments."""
        positions = workload.positions.get(part.name, 1)
        rows = float(self._moment_samples(workload.samples, positions)) * workload.directions
        return rows * positions * part.block.numel

    def elements(self, part: Part, workload: Workload) -> Elements:
        """Return the elements of factors, basis and moments; the inverse has the same basis.

        Rows are stated in factored form, of samples that are shared out evenly.
        """
        exact = as_structure(self.factors(), factored_damping=False)
        base, positions = exact.elements(part, workload), workload.positions.get(part.name, 1)
        share = -(-self._moment_samples(workload.samples, positions) // workload.processes)
        return Elements(
            statistics=base.statistics + base.inverse,
            inverse=part.block.numel,
            sums=base.sums,
            rows=factored_elements(part.block, share, workload.directions, positions),
            handed_out=base.inverse,
        )

    def _moment_samples(self, samples: int, positions: int) -> int:
        """Return how many samples of a batch an update of the moments takes."""
        limit = self.max_moment_samples
        return samples if limit is None or positions == 1 else min(samples, limit)
