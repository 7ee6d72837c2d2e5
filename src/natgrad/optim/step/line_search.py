"""How far to go along a direction, by trying."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from natgrad.arguments import check_choice, check_integer, check_range

LineSearchRule = Literal["armijo", "best"]


@dataclass(frozen=True)
class LineSearch:
    r"""A search over the lengths ``η, βη, β²η, …`` of a step against the loss itself.

    Args:
        rule: ``"armijo"`` takes the first length t with ``L(θ − tΔ) ≤ L(θ) − c·t·⟨Δ, ∇L⟩``;
            ``"best"`` goes on until the loss rises again and takes the length with the least loss,
            as Müller & Zeinhofer (2023) do for physics-informed networks.
        backtracking: β, the factor between lengths.
        armijo: c, the share of the linear decrease that is asked for.
        max_trials: Lengths tried at most.

    Raises:
        ValueError: If an argument is out of range.
    """

    rule: LineSearchRule = "armijo"
    backtracking: float = 0.5
    armijo: float = 1e-4
    max_trials: int = 10

    def __post_init__(self) -> None:
        """Check the arguments."""
        check_choice("rule", self.rule, "armijo", "best")
        if not 0 < self.backtracking < 1:
            raise ValueError(f"backtracking must be in (0, 1), got {self.backtracking}")
        check_range("armijo", self.armijo, below=1.0)
        check_integer("max_trials", self.max_trials)

    def search(
        self,
        move: Callable[[float], None],
        evaluate: Callable[[], float],
        before: float,
        slope: float,
        length: float,
    ) -> tuple[float, float]:
        """Move to the length found; back to the start (length 0) if none lowers the loss.

        Args:
            move: Sets the parameters to ``θ − tΔ`` for a given t.
            evaluate: Returns the loss there; it may be NaN or infinite. If it raises an error,
                the start is moved back to.
            before: ``L(θ)``.
            slope: ``⟨Δ, ∇L⟩``.
            length: η, the first length tried.

        Returns:
            The length and the loss there.
        """
        try:
            found, loss = self._search(move, evaluate, before, slope, length)
        except BaseException:
            move(0.0)
            raise
        move(found)
        return found, loss

    def _search(
        self,
        move: Callable[[float], None],
        evaluate: Callable[[], float],
        before: float,
        slope: float,
        length: float,
    ) -> tuple[float, float]:
        """Return the length found and the loss there; the parameters are left where they are."""
        best, least = 0.0, before
        for _ in range(self.max_trials):
            move(length)
            loss = evaluate()
            if self.rule == "armijo":
                if math.isfinite(loss) and loss <= before - self.armijo * length * slope:
                    return length, loss
            elif math.isfinite(loss) and loss < least:
                best, least = length, loss
            elif best:
                break  # Past the minimum.
            length *= self.backtracking
        return best, least
