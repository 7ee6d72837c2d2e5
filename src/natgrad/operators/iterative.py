"""Inverses by products with the matrix alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from natgrad.operators.operator import GradientSource, Operator, VectorLayout
from natgrad.solvers import IterativeSolver


@dataclass(frozen=True, eq=False)
class IterativeInverse(Operator):
    """About ``(F + λI)⁻¹``, by an iterative solver.

    Gradients it preconditions one after another are solved for from where the last one ended, if
    the solver does so; all other products start afresh.

    Attributes:
        layout: How vectors are cut into parameters.
        operator: F; None in what a checkpoint restored, which is there to be continued.
        damping: λ.
        solver: The solver.
        state: What the solver carries from one gradient to the next.
    """

    layout: VectorLayout
    operator: Operator | None = None
    damping: float = 0.0
    solver: IterativeSolver | None = None
    state: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, operator: Operator, damping: float, solver: IterativeSolver) -> IterativeInverse:
        """Return the inverse of ``F + λI``."""
        return cls(operator.layout, operator, damping, solver)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the entries."""
        assert self.operator is not None
        return self.operator.dtype

    def _damped(self, vector: Tensor) -> Tensor:
        assert self.operator is not None
        product = self.operator.multiply(vector.unsqueeze(1))[:, 0]
        return torch.add(product, vector, alpha=self.damping)

    def _prepared(self, like: Tensor, state: dict[str, Any]) -> dict[str, Any]:
        assert self.solver is not None
        return self.solver.prepare(self._damped, like, state)

    def multiply(self, columns: Tensor) -> Tensor:
        """Solve for every column on its own."""
        assert self.solver is not None
        state = self._prepared(columns[:, 0], {})
        solved = [self.solver.solve(self._damped, v, state)[0] for v in columns.unbind(1)]
        return torch.stack(solved, 1)

    def natural_gradient(self, source: GradientSource) -> dict[str, Tensor]:
        """Solve for the gradient, going on from the last one."""
        if self.operator is None or self.solver is None:
            return {name: source.gradients[name] for name in self.layout.names}
        flat = self.flat_gradient(source).to(self.dtype)
        solution, state = self.solver.solve(self._damped, flat, self.state)
        self.state.clear()
        self.state.update(state)
        return self.layout.to_dict(solution)

    def continuing(self, previous: Operator | None) -> Operator:
        """Take up the state of an earlier inverse."""
        state = dict(previous.state) if isinstance(previous, IterativeInverse) else {}
        assert self.operator is not None
        like = torch.zeros(self.layout.numel, dtype=self.dtype, device=self.operator.device)
        return replace(self, state=self._prepared(like, state))

    def frozen(self) -> Operator:
        """Return the inverse with its present state."""
        return replace(self, state=dict(self.state))

    def row_products(self, direction: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """Return ``JΔ`` of the rows that F was made of."""
        return None if self.operator is None else self.operator.row_products(direction)

    def state_dict(self) -> dict[str, Any]:
        """Return the solver's state alone, as rows belong to one batch."""
        return {"kind": type(self).__name__, "damping": self.damping, "state": dict(self.state)}
