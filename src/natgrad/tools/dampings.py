"""Damping of the parts of a matrix, given outright or in units of the curvature."""

from __future__ import annotations

from natgrad.arguments import check_damping
from natgrad.operators import FisherMatrix
from natgrad.optim import RelativeDamping

__all__ = ["part_dampings"]


def part_dampings(matrix: FisherMatrix, damping: float | RelativeDamping) -> dict[str, float]:
    """Return part name → λ: the same for all, or a share of the part's own mean eigenvalue."""
    if isinstance(damping, RelativeDamping):
        parts = matrix.parts.items()
        return {n: damping.share * max(0.0, float(f.trace())) / f.shape[0] for n, f in parts}
    check_damping(damping)
    return dict.fromkeys(matrix.parts, float(damping))
