"""What a solver is, and solvers by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from natgrad.arguments import check_range

#: ``v ↦ A v`` for vectors ``(P,)``.
Product = Callable[[Tensor], Tensor]


class Solver(ABC):  # noqa: B024
    """A way to apply ``(F + λI)⁻¹`` other than by a structure's own factorisation."""


@dataclass(frozen=True)
class TruncatedEigh(Solver):
    """Eigendecomposition on the space of the larger eigenvalues; below them nothing moves.

    Attributes:
        cutoff: Eigenvalues at or below this share of the largest are left out, in [0, 1).

    Raises:
        ValueError: If the cutoff is out of range.
    """

    cutoff: float = 0.0

    def __post_init__(self) -> None:
        """Check the range."""
        check_range("cutoff", self.cutoff, below=1.0)


class IterativeSolver(Solver):
    """A solver that needs nothing but products with the matrix.

    What it carries from one solution to the next (warm starts, random state) is a *state* of
    tensors and plain values, handed in and returned, so that steps can be taken back and resumed.
    """

    @property
    @abstractmethod
    def products(self) -> float:
        """Products with the matrix that one solution takes at most."""

    def prepare(self, multiply: Product, like: Tensor, state: dict[str, Any]) -> dict[str, Any]:
        """Return the state after what is done once per matrix; nothing by default.

        Args:
            multiply: Products with ``A = F + λI``.
            like: A vector ``(P,)`` of the right type on the right device.
            state: The present state; empty at the start.
        """
        return state

    @abstractmethod
    def solve(
        self, multiply: Product, right: Tensor, state: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return about ``A⁻¹ b`` and the next state.

        Args:
            multiply: Products with ``A = F + λI``.
            right: b, ``(P,)``.
            state: The present state.
        """


def as_solver(solver: str | Solver) -> Solver | None:
    """Return a solver by its name; None for ``"direct"``, a structure's own factorisation.

    Raises:
        ValueError: If the name is unknown.
    """
    from natgrad.solvers.conjugate_gradient import ConjugateGradient
    from natgrad.solvers.thermodynamic import Thermodynamic

    if isinstance(solver, Solver):
        return solver
    known: dict[str, Callable[[], Solver | None]] = {
        "direct": lambda: None,
        "eigh": TruncatedEigh,
        "conjugate_gradient": ConjugateGradient,
        "thermodynamic": Thermodynamic,
    }
    if solver not in known:
        raise ValueError(f"solver must be one of {', '.join(known)}, got {solver!r}")
    return known[solver]()
