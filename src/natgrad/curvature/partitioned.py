"""Fisher matrices made of independent parts, one per layer or one for all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from natgrad import linalg
from natgrad.curvature.base import FisherMatrix, GradientSource, check_damping, damping_of
from natgrad.curvature.cost import Cost, Workload
from natgrad.jacobians import Jacobians
from natgrad.layouts import ParameterLayout
from natgrad.linalg import FactorizationError

if TYPE_CHECKING:
    from natgrad.capture import Block

__all__ = ["CurvaturePart", "PartitionedFisher"]


class CurvaturePart(ABC):
    """One diagonal block of a partitioned Fisher matrix, in its own flat coordinates.

    Attributes:
        names: Qualified names of the part's parameters.
        sizes: Their numbers of entries.
        numel: Their sum ``P_l``.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    numel: int

    @abstractmethod
    def update(self, jacobians: Jacobians, count: Tensor | float) -> None:
        """Add rows (see :meth:`FisherMatrix.update`); the part picks its own blocks."""

    @abstractmethod
    def discount(self, factor: float) -> None:
        """Multiply sums and counts by ``factor``."""

    @abstractmethod
    def matvec(self, columns: Tensor) -> Tensor:
        """Return ``F_l V`` for ``(P_l, k)``."""

    @abstractmethod
    def solver(self, damping: float) -> Callable[[Tensor], Tensor]:
        """Factorise once; return ``V ↦ (F_l + damping I)⁻¹ V`` for ``(P_l, k)``.

        Zero damping is the pseudo-inverse.
        """

    @abstractmethod
    def trace(self) -> Tensor:
        """Return the trace."""

    @abstractmethod
    def diagonal(self) -> Tensor:
        """Return the diagonal ``(P_l,)``."""

    @abstractmethod
    def eigenvalues(self) -> Tensor:
        """Return all ``P_l`` eigenvalues in any order."""

    @abstractmethod
    def to_dense(self) -> Tensor:
        """Return ``(P_l, P_l)``."""

    @abstractmethod
    def refresh(self, damping: float) -> None:
        """Factorise for :meth:`precondition`.

        Raises:
            FactorizationError: If that is impossible; the last factorisation must then be intact.
        """

    @abstractmethod
    def precondition(self, source: GradientSource) -> dict[str, Tensor]:
        """Return the natural gradient of the part's parameters by the last factorisation."""

    def rows_are_cheaper(self, rows: int) -> bool:
        """Return whether so many rows are cheaper to precondition than the gradient.

        Such a part takes the rows of a :class:`GradientSource` where they are there.
        """
        return False

    @abstractmethod
    def cost(self, workload: Workload) -> Cost:
        """Return what the part costs."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return sums and factorisation."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore them."""

    def solve(self, columns: Tensor, damping: float) -> Tensor:
        """Return ``(F_l + damping I)⁻¹ V`` for ``(P_l, k)``, pseudo-inverse for 0."""
        return self.solver(damping)(columns)

    def inverse_root(self, damping: float) -> Callable[[Tensor], Tensor] | None:
        """Factorise once; return ``V ↦ (F_l + damping I)^(−1/2) V`` for ``(P_l, k)``, λ > 0.

        It is the symmetric root of what :meth:`solver` applies; None, the default, where there is
        none at hand.
        """
        return None

    @abstractmethod
    def function_space_map(
        self, rows: Jacobians, other: Jacobians, damping: float
    ) -> dict[str, Tensor]:
        """Return the part's blocks of :meth:`FisherMatrix.function_space_map`."""

    def logdet(self, damping: float) -> Tensor:
        """Return ``log det(F_l + damping I)``."""
        values = self.eigenvalues().clamp(min=0.0)
        return (values + damping).log().sum()


class PartitionedFisher(FisherMatrix):
    """A Fisher matrix made of independent diagonal parts.

    A subclass says in :meth:`make_parts` what the parts are.
    """

    def __init__(
        self, blocks: Mapping[str, Block], layout: ParameterLayout, **options: Any
    ) -> None:
        super().__init__(blocks, layout)
        self.parts: dict[str, CurvaturePart] = self.make_parts(**options)

    @abstractmethod
    def make_parts(self, **options: Any) -> dict[str, CurvaturePart]:
        """Return part name → part, covering every block once."""

    def update(self, jacobians: Jacobians, count: Tensor | float) -> None:
        """Add rows to every part."""
        for part in self.parts.values():
            part.update(jacobians, count)
        jacobians.moments.clear()

    def discount(self, factor: float) -> None:
        """Discount every part."""
        for part in self.parts.values():
            part.discount(factor)

    def _map_columns(self, columns: Tensor, name: str, *args: Any) -> Tensor:
        result = torch.zeros_like(columns)
        for part in self.parts.values():
            values = getattr(part, name)(self.layout.gather(part, columns), *args)
            self.layout.scatter(part, values, result)
        return result

    def _matvec(self, columns: Tensor) -> Tensor:
        return self._map_columns(columns, "matvec")

    def _solve(self, columns: Tensor, damping: float) -> Tensor:
        return self._map_columns(columns, "solve", damping)

    def _inverse_root(self, columns: Tensor, damping: float) -> Tensor:
        if type(self)._solve is not PartitionedFisher._solve:
            return super()._inverse_root(columns, damping)  # Its inverse couples the parts.
        result = torch.zeros_like(columns)
        for part in self.parts.values():
            root = part.inverse_root(damping)
            if root is None:
                return super()._inverse_root(columns, damping)
            self.layout.scatter(part, root(self.layout.gather(part, columns)), result)
        return result

    def _function_space_map(
        self, rows: Jacobians, other: Jacobians, damping: float
    ) -> dict[str, Tensor]:
        result: dict[str, Tensor] = {}
        for part in self.parts.values():
            result.update(part.function_space_map(rows, other, damping))
        return result

    def trace(self) -> Tensor:
        """Return the sum of the parts' traces."""
        return torch.stack([part.trace() for part in self.parts.values()]).sum()

    def logdet(self, damping: float = 0.0) -> Tensor:
        """Return the sum of the parts' log-determinants.

        Raises:
            ValueError: If the damping is negative or not finite.
        """
        check_damping(damping)
        return torch.stack([part.logdet(damping) for part in self.parts.values()]).sum()

    def diagonal(self) -> Tensor:
        """Return the diagonal in parameter order."""
        pieces: dict[str, Tensor] = {}
        for part in self.parts.values():
            diagonal = part.diagonal()
            pieces.update(zip(part.names, diagonal.split(list(part.sizes)), strict=True))
        return torch.cat([pieces[name] for name in self.layout.names])

    def eigenvalues(self) -> Tensor:
        """Return the eigenvalues of all parts, largest first."""
        values = torch.cat([part.eigenvalues() for part in self.parts.values()])
        return values.sort(descending=True).values

    def to_dense(self) -> Tensor:
        """Return the parts placed into ``(P, P)``."""
        result: Tensor | None = None
        for part in self.parts.values():
            dense, segments = part.to_dense(), self.layout.slices(part)
            if result is None:
                result = dense.new_zeros(self.shape)
            rows = dense.split(list(part.sizes))
            for i, row in zip(segments, rows, strict=True):
                for j, piece in zip(segments, row.split(list(part.sizes), dim=1), strict=True):
                    result[i, j] = piece
        assert result is not None
        return result

    def refresh(
        self, damping: float | Mapping[str, float], names: Collection[str] | None = None
    ) -> None:
        """Factorise every part; a part that cannot be keeps its last factorisation.

        It warns once for each part, by name.

        Args:
            damping: One value, or one per block name.
            names: Parts to factorise; all by default.
        """
        for name in self.parts if names is None else names:
            try:
                self.parts[name].refresh(damping_of(name, damping))
            except FactorizationError as error:
                linalg.warn_kept(self, name, error)

    def staggered(self, slots: int) -> list[list[str]]:
        """Return the parts in ``slots`` lists that cost about the same to factorise.

        The dearest parts come first, each into the list that is cheapest so far.
        """
        costs = {n: part.cost(Workload(0, 1, {})).refresh for n, part in self.parts.items()}
        lists: list[list[str]] = [[] for _ in range(slots)]
        totals = [0.0] * slots
        for name in sorted(costs, key=lambda n: -costs[n]):
            cheapest = totals.index(min(totals))
            lists[cheapest].append(name)
            totals[cheapest] += max(costs[name], 1.0)
        return lists

    def precondition(self, source: GradientSource) -> dict[str, Tensor]:
        """Precondition every part that is not yet."""
        result: dict[str, Tensor] = {}
        for block, part in self.parts.items():
            if block in source.natural:
                result.update({name: source.gradients[name] for name in part.names})
            else:
                result.update(part.precondition(source))
        return result

    def costs(self, workload: Workload) -> dict[str, Cost]:
        """Return every part's cost."""
        return {name: part.cost(workload) for name, part in self.parts.items()}

    def snapshot(self) -> dict[str, Any]:
        """Return every part's state by reference."""
        return {name: dict(part.__dict__) for name, part in self.parts.items()}

    def rollback(self, saved: dict[str, Any]) -> None:
        """Return every part to a snapshot."""
        for name, part in self.parts.items():
            part.__dict__.clear()
            part.__dict__.update(saved[name])

    def state_dict(self) -> dict[str, Any]:
        """Return part name → state."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore every part.

        Raises:
            ValueError: If the state has other parts than this structure.
        """
        if set(state) != set(self.parts):
            differing = sorted(set(state) ^ set(self.parts))
            raise ValueError(
                f"the checkpoint's curvature has other layers than the model: {differing}"
            )
        for name, part in self.parts.items():
            part.load_state_dict(state[name], device)
