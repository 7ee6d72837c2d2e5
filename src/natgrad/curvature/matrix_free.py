"""The exact Fisher matrix by its products with vectors alone."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from natgrad.curvature.base import GradientSource
from natgrad.curvature.cost import Cost, Workload
from natgrad.curvature.exact_rows import ExactRows
from natgrad.jacobians import Jacobians

__all__ = ["MatrixFreeRows"]


class MatrixFreeRows(ExactRows):
    """Rows of the exact Fisher matrix that are never multiplied into a matrix to precondition.

    A product ``F v = Jᵀ(Jv)/count`` costs two products with the rows. As an object (``solve``,
    ``logdet``, …) it is the exact Fisher matrix like any other; a subclass says how a gradient is
    preconditioned.
    """

    _damping = 0.0

    def update(self, jacobians: Jacobians, count: Tensor | float) -> None:
        """Keep the rows, however many."""
        mine = {name: jacobians[name] for name in self.block_names if name in jacobians}
        if not all(block.is_finite() for block in mine.values()):
            return
        self.count += float(count)
        self._gram = None
        if mine:
            rows = Jacobians(self.layout, mine, jacobians.samples, jacobians.directions)
            self.rows = [*self.rows, (1.0, rows)]

    def refresh(self, damping: float) -> None:
        """Take the present rows and damping for :meth:`precondition`."""
        if self.rows:
            self._applied_rows = (self.rows, self.count)
            self._damping = damping

    def precondition(self, source: GradientSource) -> dict[str, Tensor]:
        """Return an approximation of ``(F + λI)⁻¹∇L``."""
        gradients = {name: source.gradients[name] for name in self.names}
        if self._applied_rows is None:
            return gradients
        flat = self.layout.to_flat(gradients).to(self.layout.dtype)
        return self.layout.to_dict(self.approximate_solution(flat))

    @abstractmethod
    def approximate_solution(self, gradient: Tensor) -> Tensor:
        """Return about ``(F + λI)⁻¹ g`` for the rows and damping of the last refresh, ``(P,)``."""

    def damped_product(self, vector: Tensor) -> Tensor:
        """Return ``(F + λI) v`` for the rows and damping of the last refresh, ``(P,)``."""
        assert self._applied_rows is not None
        rows, count = self._applied_rows
        columns = vector.unsqueeze(1)
        product = self._transposed_times(rows, self._times(rows, columns))[:, 0] / count
        return torch.add(product, vector, alpha=self._damping)

    def row_products(self, direction: dict[str, Tensor]) -> Tensor | None:
        """Return ``JΔ``, ``(R,)``, for the rows of the last refresh."""
        if self._applied_rows is None:
            return None
        flat = self.layout.to_flat({name: direction[name] for name in self.names})
        columns = flat.to(self.layout.dtype).unsqueeze(1)
        return self._times(self._applied_rows[0], columns)[:, 0]

    def products_cost(self, workload: Workload, products: float) -> Cost:
        """Return the cost of so many products with the Fisher matrix per step."""
        one = 2.0 * workload.samples * (workload.directions + self.numel)
        return Cost("none", 0, 0.0, products * one)

    def state_dict(self) -> dict[str, Any]:
        """Return the count; rows belong to one batch and are not kept."""
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore the count."""
        self.count = state["count"]
