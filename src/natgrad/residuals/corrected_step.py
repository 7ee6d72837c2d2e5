"""From a linear step on residuals to one that lowers their loss: shortened, or corrected."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from natgrad.optim.step.line_search import LineSearch

#: Share of Δ at which residuals are evaluated for their second derivative along it.
PROBE = 0.1

#: ``‖Δ'‖/‖Δ‖`` beyond which Δ' is no correction (Transtrum & Sethna 2012).
LARGEST_BEND = 0.75

#: Corrections of a step at most, and those up to which it was easy, so that λ falls.
MOST_CORRECTIONS, FEW_CORRECTIONS = 10, 4

#: A correction is followed by another if it lowers a loss that is too large to this share at least,
#: until the step achieves this share of what the linear model promises.
PROGRESS, ENOUGH = 0.5, 0.9

#: Factors on λ after easy steps, curved and straight ones; by their inverses λ rises.
CURVED_DECAY, STRAIGHT_DECAY = 0.1**0.5, 0.1

#: Lengths tried with one λ, where the points are those of the last step, and where they are others:
#: shorter steps with little damping fit these and no others.
SEARCHES = {False: LineSearch(max_trials=6), True: LineSearch(max_trials=1)}

#: Share of the decrease that the slope promises which a step has to achieve.
ARMIJO = SEARCHES[True].armijo


@dataclass(frozen=True)
class LinearStep:
    """A step as the linear model of the residuals has it.

    Attributes:
        start: θ.
        step: Δ.
        slope: ``⟨Δ, ∇L⟩``.
        square: ``ΔᵀFΔ``.
        lr: The first length to try.
    """

    start: Tensor
    step: Tensor
    slope: float
    square: float
    lr: float


@dataclass(frozen=True)
class FoundStep:
    """A step that lowers the loss.

    Attributes:
        moved: d, what is added to θ.
        loss: The loss there.
        length: t.
        factor: What λ is multiplied by afterwards.
        corrections: How often it was corrected.
    """

    moved: Tensor
    loss: float
    length: float
    factor: float
    corrections: int


def shortened(
    linear: LinearStep,
    move: Callable[[Tensor], None],
    loss: Callable[[], float],
    before: float,
    points_change: bool,
) -> FoundStep | None:
    """Search for a length of a straight step; None where none lowers the loss.

    Args:
        linear: The step.
        move: Goes to ``θ + d`` for a given d.
        loss: The loss where that led.
        before: The loss at θ.
        points_change: Whether points are others than those of the last step.
    """
    step, lr = linear.step, linear.lr
    length, after = SEARCHES[points_change].search(
        lambda length: move(-length * step), loss, before, linear.slope, lr
    )
    if not length or not after < before:  # Equal after steps lost in rounding.
        return None
    factor = 1.0
    if length >= 0.5 * lr:
        factor = STRAIGHT_DECAY
    elif length < 0.25 * lr:
        factor = 1 / STRAIGHT_DECAY
    return FoundStep(-length * step, after, length, factor, 0)


def corrected(
    linear: LinearStep,
    residuals_at: Callable[[Tensor], list[Tensor]],
    loss_of: Callable[[list[Tensor]], float],
    deviation: Callable[[Tensor, list[Tensor]], Tensor],
    before: float,
) -> FoundStep | None:
    """Correct a step until it does what its linear model says; None where it does not.

    Args:
        linear: The step.
        residuals_at: d ↦ ``ρ(θ + d)``, in chunks.
        loss_of: These ↦ ``½‖ρ‖²``, with what other processes have of ρ.
        deviation: d and these ↦ ``(F + λI)⁻¹Jᵀ(ρ(θ + d) − ρ − Jd)``.
        before: The loss at θ.
    """
    lr, ahead = linear.lr, -PROBE * linear.step
    straight = -lr * linear.step
    half_bend = deviation(ahead, residuals_at(ahead)) / PROBE**2
    size = 2 * float(half_bend.norm())
    bends = math.isfinite(size) and size <= LARGEST_BEND * float(linear.step.norm())
    moved = straight - lr**2 * half_bend if bends else straight
    promised = lr * linear.slope - 0.5 * lr**2 * linear.square
    found, last = None, math.inf
    for count in range(MOST_CORRECTIONS + 1):
        residuals = residuals_at(moved)
        after = loss_of(residuals)
        if not after < last:
            break
        if after < before - ARMIJO * lr * linear.slope:
            factor = CURVED_DECAY if count <= FEW_CORRECTIONS else 1.0
            found = FoundStep(moved, after, lr, factor, count)
        elif after > PROGRESS * last:
            break
        if not bends or before - after >= ENOUGH * promised or count == MOST_CORRECTIONS:
            break
        last = after
        moved = straight - deviation(moved, residuals)
    return found
