r"""The layer-wise block tri-diagonal Fisher matrix: every layer's block and its neighbours'.

.. math:: F_{ll'} = \frac{1}{count} J_l^\top J_{l'} \quad \text{for } |l - l'| \le 1
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor
from typing_extensions import Self

from natgrad.curvature.cost import Cost, Workload
from natgrad.curvature.full import Full
from natgrad.curvature.structure import Part, Structure, register_structure
from natgrad.jacobians import FIRST_DRAW, Draw, Jacobians
from natgrad.operators.block_tridiagonal import BlockTridiagonalOperator
from natgrad.statistics import Statistics
from natgrad.statistics.rows import RowStatistics


@dataclass(frozen=True, eq=False)
class OrderedRows(RowStatistics):
    """Rows and the order of layers.

    Attributes:
        order: Block names in the order of their first call in the first batch.
    """

    order: tuple[str, ...] = ()

    def followed_by(self, other: Self, decay: float = 1.0) -> Self:
        """Return ``decay · self + other``; the first order stays."""
        return replace(super().followed_by(other, decay), order=self.order)


@register_structure
@dataclass(frozen=True)
class BlockTridiagonal(Structure):
    """Blocks ``F_ll`` and ``F_l,l±1``; layers are ordered by their first call.

    Indefinite from three layers on; see :mod:`natgrad.operators.block_tridiagonal`.
    """

    name: ClassVar[str] = "block_tridiagonal"
    additive: ClassVar[bool] = False
    joint: ClassVar[bool] = True

    def statistics(
        self,
        part: Part,
        rows: Jacobians,
        count: Tensor,
        *,
        previous: Statistics | None = None,
        draw: Draw = FIRST_DRAW,
        continued: bool = False,
    ) -> OrderedRows:
        """Keep the rows, or sum them: a system of L·R rows is worth it while smaller than P."""
        kept = OrderedRows.of(rows, count, self._row_limit(part))
        assert isinstance(kept, OrderedRows)
        order = list(rows) + [name for name in part.blocks if name not in rows]
        return replace(kept, order=tuple(order))

    def operator(self, part: Part, statistics: Statistics | None) -> BlockTridiagonalOperator:
        """Return the matrix."""
        if statistics is None:
            return BlockTridiagonalOperator(part.layout, part.blocks, tuple(part.blocks), None)
        assert isinstance(statistics, OrderedRows)
        return BlockTridiagonalOperator(part.layout, part.blocks, statistics.order, statistics)

    def _row_limit(self, part: Part) -> int:
        return part.layout.numel // len(part.blocks)

    def cost(self, part: Part, workload: Workload) -> Cost:
        """Return the cost of the joint system."""
        one = Full().cost(part, workload)
        rows = workload.samples * workload.directions
        depth, size = len(part.blocks), part.layout.numel
        if rows > self._row_limit(part):
            refresh = float(rows) * size**2 + size**3
            memory = part.layout.dtype.itemsize * size**2
            return Cost(f"{size} x {size}", memory, refresh, float(size) ** 2)
        memory = 3 * depth * rows**2 * part.layout.dtype.itemsize
        refresh = one.refresh + depth * 14 / 3 * rows**3
        return Cost(f"{depth} coupled {rows} x {rows}", memory, refresh, one.step)
