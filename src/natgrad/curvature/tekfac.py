"""TEKFAC: second moments in the eigenbasis of TKFAC's factors (Gao et al. 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from natgrad.curvature.ekfac import EigenKronecker
from natgrad.curvature.structure import Structure, register_structure
from natgrad.curvature.tkfac import TraceKronecker


@register_structure
@dataclass(frozen=True)
class TraceEigenKronecker(EigenKronecker):
    """EKFAC with the factors of TKFAC: never further from the exact block than TKFAC is.

    Its options are those of :class:`EigenKronecker`; TKFAC's factors keep the trace of the exact
    rows, so they take all of them.
    """

    name: ClassVar[str] = "tekfac"
    object_options: ClassVar[Mapping[str, Any]] = {"max_moment_samples": None}

    rows_per_unit: float | None = None

    def factors(self) -> Structure:
        """Return the structure whose factors give the basis."""
        return TraceKronecker(self.weight_sharing, max_factor_size=self.max_factor_size)
