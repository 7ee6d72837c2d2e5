"""Damping in units of each layer's own curvature, for the Kronecker-factored structures.

Gao et al. keep the damping of a layer from swamping its curvature by a technique whose formula
natgrad's authors could not confirm. This is its aim in the plainest form: layer l is damped by
``λ tr F_l / P_l``, a share of its own mean eigenvalue, where :class:`natgrad.RelativeDamping` takes
a share of that of the whole matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from typing_extensions import Self

from natgrad.curvature import KroneckerFactors, TraceKronecker
from natgrad.curvature.structure import Part
from natgrad.jacobians import WeightSharing
from natgrad.operators import KroneckerOperator, Operator
from natgrad.statistics import Statistics


class _OwnUnit(KroneckerOperator):
    """A Kronecker product that takes damping in units of its mean eigenvalue."""

    @classmethod
    def of(cls, found: Operator) -> Self:
        """Return the same Kronecker product, damped so."""
        assert isinstance(found, KroneckerOperator)
        return cls(**{field.name: getattr(found, field.name) for field in fields(found)})

    @classmethod
    def inverses(cls, operators: Sequence[Self], dampings: Sequence[float]) -> list[Operator]:
        """Invert, each damped in its own unit."""
        pairs = zip(operators, dampings, strict=True)
        return super().inverses(operators, [share * _unit(one) for one, share in pairs])


def _unit(operator: KroneckerOperator) -> float:
    """Return the mean eigenvalue; 1 for a layer without any curvature, to be inverted at all."""
    return float(operator.trace()) / operator.layout.numel or 1.0


@dataclass(frozen=True)
class LayerDampedKFAC(KroneckerFactors):
    """K-FAC with damping in units of each layer, as the source knows it where positions share."""

    weight_sharing: WeightSharing = "expand"

    def operator(self, part: Part, statistics: Statistics | None) -> KroneckerOperator:
        """Return K-FAC's matrix, damped so."""
        return _OwnUnit.of(super().operator(part, statistics))


@dataclass(frozen=True)
class LayerDampedTKFAC(TraceKronecker):
    """TKFAC with damping in units of each layer."""

    def operator(self, part: Part, statistics: Statistics | None) -> KroneckerOperator:
        """Return TKFAC's matrix, damped so."""
        return _OwnUnit.of(super().operator(part, statistics))
