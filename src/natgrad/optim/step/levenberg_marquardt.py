"""Damping that follows how well the quadratic model predicts the loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

from natgrad.arguments import check_integer


@dataclass(frozen=True)
class LevenbergMarquardt:
    r"""Damping by the reduction ratio of Levenberg and Marquardt.

    Every ``interval`` steps the change of the loss of the batch is compared with what the quadratic
    model M with the Fisher matrix of the same batch predicted for the step δ taken,

    .. math:: \rho = \frac{L(\theta + \delta) - L(\theta)}{M(\delta) - M(0)}, \qquad
              M(\delta) = \tfrac12 \delta^\top (F + \lambda I) \delta
              + \langle \nabla L, \delta \rangle.

    Where ρ > ¾ damping falls by the factor ``decay**interval``, where ρ < ¼ it rises by as much.
    A loss that is not finite, or a step along which the model predicts no decrease, counts as
    ρ < ¼. The loss must be a mean over samples, as F is.

    Attributes:
        initial: λ to begin with, in the units of F.
        interval: Steps between adaptations. Each costs one more evaluation of the closure and one
            product with the rows of the batch.
        decay: Factor on λ per step, in (0, 1); ω₁ of the source.
        minimum: Least λ.
        maximum: Largest λ.
        reject: Whether a compared step is taken back where the loss is not finite after it, or has
            not fallen although the model predicted that it would: parameters, momentum and grafting
            moments are then those of before the step. The curvature it has seen stays, parameters
            of the first-order fallback step as usual. Steps between adaptations are not compared,
            so ``interval=1`` checks them all.

    Raises:
        ValueError: If a value is out of range.

    Source: Martens & Grosse, Optimizing neural networks with Kronecker-factored approximate
    curvature (2015), section 6.5.

    Example:
        >>> damping = natgrad.LevenbergMarquardt(initial=1.0)
        >>> optimizer = natgrad.KFAC(model, damping=damping)
        >>> loss = optimizer.step(closure)
    """

    initial: float = 0.1
    interval: int = 5
    decay: float = 19 / 20
    minimum: float = 1e-8
    maximum: float = 1e3
    reject: bool = False

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 < self.minimum <= self.initial <= self.maximum < math.inf:
            raise ValueError(
                "LevenbergMarquardt needs 0 < minimum <= initial <= maximum, got "
                f"minimum={self.minimum}, initial={self.initial}, maximum={self.maximum}"
            )
        check_integer("interval", self.interval)
        if not 0 < self.decay < 1:
            raise ValueError(f"decay must be in (0, 1), got {self.decay}")

    def adapted(self, damping: float, actual: float, predicted: float) -> float:
        """Return the next λ.

        Args:
            damping: The present λ.
            actual: ``L(θ + δ) − L(θ)``.
            predicted: ``M(δ) − M(0)``.
        """
        damping = by_reduction_ratio(damping, actual, predicted, self.decay**self.interval)
        return min(self.maximum, max(self.minimum, damping))

    def rejects(self, actual: float, predicted: float) -> bool:
        """Return whether a step is to be taken back.

        Args:
            actual: ``L(θ + δ) − L(θ)``.
            predicted: ``M(δ) − M(0)``.
        """
        return self.reject and (not math.isfinite(actual) or (actual >= 0 and predicted < 0))


def by_reduction_ratio(damping: float, actual: float, predicted: float, decay: float) -> float:
    """Return the λ that follows from how well the quadratic model predicted a step.

    Args:
        damping: The present λ.
        actual: ``L(θ + δ) − L(θ)``.
        predicted: ``M(δ) − M(0)``; where it is not negative nothing was predicted.
        decay: Factor on λ where actual is more than ¾ of predicted, and divisor where it is less
            than ¼ or not finite.
    """
    ratio = actual / predicted if predicted < 0 and math.isfinite(actual) else -math.inf
    if ratio > 0.75:
        return damping * decay
    return damping if ratio >= 0.25 else damping / decay
