"""TEKFAC: second moments in the eigenbasis of TKFAC's factors (Gao et al. 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from natgrad.curvature.ekfac import EKFACFisher
from natgrad.curvature.kfac import KroneckerPart
from natgrad.curvature.registry import register_structure
from natgrad.curvature.tkfac import TraceRestrictedPart
from natgrad.layouts import BlockLayout

__all__ = ["TEKFACFisher"]


@register_structure
class TEKFACFisher(EKFACFisher):
    """EKFAC with the factors of TKFAC: never further from the exact block than TKFAC is.

    Options: ``weight_sharing``, ``max_factor_size`` and ``max_moment_samples``, as for
    :class:`EKFACFisher`; TKFAC's factors keep the trace of the exact rows, so they take all.
    """

    structure: ClassVar[str] = "tekfac"

    def make_factors(
        self, name: str, block: BlockLayout, options: Mapping[str, Any]
    ) -> KroneckerPart:
        """Return an empty part of TKFAC."""
        return TraceRestrictedPart(name, block, self.layout, **options)
