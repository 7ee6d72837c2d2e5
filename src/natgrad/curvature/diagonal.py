r"""The diagonal of the Fisher matrix.

.. math:: f = \frac{1}{count} \sum_{nk} (J_{nk})^2 \quad \text{entry by entry}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from natgrad.curvature.cost import Cost, Workload
from natgrad.curvature.structure import Part, Structure, register_structure
from natgrad.jacobians import FIRST_DRAW, Draw, Jacobians
from natgrad.operators import DiagonalOperator
from natgrad.statistics import Statistics


@dataclass(frozen=True, eq=False)
class DiagonalStatistics(Statistics):
    """Squared rows.

    Attributes:
        squares: ``Σ J²``, ``(P_l,)``.
    """

    squares: Tensor


@register_structure
@dataclass(frozen=True)
class Diagonal(Structure):
    """Entry-wise curvature, ``O(P)`` memory.

    Unlike the layer-wise structures its update is *not* isotropic in function space, whatever the
    width (Karakida & Osawa 2020), so it does not inherit the fast convergence of exact NGD.
    """

    name: ClassVar[str] = "diagonal"

    def statistics(
        self,
        part: Part,
        rows: Jacobians,
        count: Tensor,
        *,
        previous: Statistics | None = None,
        draw: Draw = FIRST_DRAW,
        continued: bool = False,
    ) -> DiagonalStatistics:
        """Sum squares."""
        return DiagonalStatistics(count, rows[part.name].diagonal())

    def operator(self, part: Part, statistics: Statistics | None) -> DiagonalOperator:
        """Return ``diag(f)``."""
        if statistics is None:
            return DiagonalOperator(part.block, part.parameters.zeros(part.block.numel))
        assert isinstance(statistics, DiagonalStatistics)
        mean = statistics.squares / statistics.count.to(statistics.squares.dtype)
        return DiagonalOperator(part.block, mean)

    def cost(self, part: Part, workload: Workload) -> Cost:
        """Return the cost: one square per weight and row, one product per weight."""
        size = part.block.numel
        refresh = float(workload.samples) * workload.directions * size
        memory = 2 * part.parameters.dtype.itemsize * size
        return Cost(f"{size}", memory, refresh, float(size))
