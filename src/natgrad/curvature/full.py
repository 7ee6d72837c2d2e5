r"""The exact Fisher matrix.

.. math:: F = \frac{1}{count} J^\top J
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from natgrad.curvature.cost import Cost, Workload
from natgrad.curvature.structure import Part, Structure, register_structure
from natgrad.jacobians import FIRST_DRAW, Draw, Jacobians
from natgrad.operators import DenseOperator, Operator
from natgrad.operators.rows import RowsOperator
from natgrad.solvers import IterativeSolver, Solver, as_solver
from natgrad.statistics import Statistics
from natgrad.statistics.rows import RowStatistics


@dataclass(frozen=True)
class ExactRows(Structure):
    """What the structures share that keep exact rows, in sample space or in parameter space.

    Whichever of the number of rows ``R`` and of parameters ``P`` is smaller decides what is
    factorised: the Gram matrix ``JJᵀ`` or ``F``. Rows belong to one batch, so there is no average
    over steps.

    Optimizers in several processes leave rows with the process that has made them: each holds its
    own, the joint Gram matrix and two shares of one layer of others at most, see
    :class:`natgrad.jacobians.shares.Shares`.

    Attributes:
        solver: How gradients are preconditioned: ``"direct"``, ``"eigh"``,
            ``"conjugate_gradient"``, ``"thermodynamic"`` or a :class:`natgrad.solvers.Solver` with
            options of its own. Iterative ones form no matrix at all.

    Raises:
        ValueError: If the solver is unknown.
    """

    additive: ClassVar[bool] = False
    rows_stay: ClassVar[bool] = True

    solver: str | Solver = "direct"

    def __post_init__(self) -> None:
        """Look the solver up."""
        as_solver(self.solver)

    @property
    def is_iterative(self) -> bool:
        """Whether gradients are preconditioned by products alone."""
        return isinstance(as_solver(self.solver), IterativeSolver)

    def row_limit(self, part: Part) -> int | None:
        """Return from how many rows on their sum is kept instead."""
        return None if self.is_iterative else part.layout.numel

    def statistics(
        self,
        part: Part,
        rows: Jacobians,
        count: Tensor,
        *,
        previous: Statistics | None = None,
        draw: Draw = FIRST_DRAW,
        continued: bool = False,
    ) -> RowStatistics:
        """Keep the rows, or sum them if there are more of them than parameters."""
        return RowStatistics.of(rows, count, self.row_limit(part))

    def operator(self, part: Part, statistics: Statistics | None) -> Operator:
        """Return ``JᵀJ/count``."""
        if statistics is None:
            return RowsOperator(part.layout, (), part.parameters.zeros(1)[0] + 1.0)
        assert isinstance(statistics, RowStatistics)
        if statistics.moment is not None:
            mean = statistics.moment / statistics.count.to(statistics.moment.dtype)
            return DenseOperator(part.layout, mean)
        return RowsOperator(part.layout, statistics.pieces, statistics.count)

    def vector_layout(self, part: Part) -> Any:
        """Return the layout of the part's operators."""
        return part.layout

    def cost(self, part: Part, workload: Workload) -> Cost:
        """Return the cost in the space the rows would be handled in."""
        layout, limit = part.layout, self.row_limit(part)
        rows = workload.samples * workload.directions
        solver = as_solver(self.solver)
        if isinstance(solver, IterativeSolver):
            one = 2.0 * workload.samples * (workload.directions + layout.numel)
            return Cost("none", 0, 0.0, solver.products * one)
        size = min(rows, layout.numel)
        if limit is None or rows <= limit:
            # Gram products of every layer cost about R² (d_in + d_out); rows·P bounds a product.
            sides = sum(sum(layout.shapes[name][:2]) for name in layout.names)
            forming = float(rows) ** 2 * sides
            step = 2.0 * rows * layout.numel + 2.0 * rows**2
        else:
            forming = float(rows) * layout.numel**2
            step = float(layout.numel) ** 2
        entry = layout.dtype.itemsize
        return Cost(f"{size} x {size}", entry * size**2, forming + size**3 / 3, step)


@register_structure
@dataclass(frozen=True)
class Full(ExactRows):
    """Every entry kept; solved in sample or parameter space, whichever is smaller.

    Cost per factorisation ``O(R² P_mean + R³)`` for ``R = N·K`` rows, or ``O(R P² + P³)`` when
    there are fewer parameters than rows. Memory ``R²`` (or ``P²``) beside the factored rows.
    """

    name: ClassVar[str] = "full"
    joint: ClassVar[bool] = True
