"""Damping that follows the curvature, or how well the quadratic model predicts the loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

from natgrad.arguments import check_integer, check_range, is_number


@dataclass(frozen=True)
class RelativeDamping:
    r"""Damping as a share of the mean eigenvalue of the Fisher matrix.

    .. math:: \lambda = \varepsilon \nu \frac{\operatorname{tr} \hat F}{P},

    one λ for all P parameters of the matrix, renewed with every factorisation from the trace at the
    one before it. Multiplying the loss, or what it averages over, by a constant changes nothing.

    The Fisher matrix of a squared error knows nothing of the residuals, where that of a
    cross-entropy vanishes as the data are fitted. What a damping weighs against is given by the
    user's loss then, not by the data; ridge regression takes the ratio of the noise to the signal
    (Hoerl & Kennard 1970), and so does

    .. math:: \nu = \max\left(\text{floor},
              \min\left(1, \frac{R}{R_{\max} - R}\right)\right)

    with the mean squared residual R, a geometric moving average over measurements, for a Gaussian
    likelihood where lengths are measured (:class:`natgrad.MeasuredLength`). Elsewhere ν is 1.
    Targets that are noise for the most part are damped by all of ε.

    Predictions that are wrong with confidence, as of tied tables drawn from N(0, 1), have a Fisher
    matrix of nearly nothing, and natural gradients of it would be larger than numbers go. Where
    lengths are measured, decrements of the loss count as no more than R, twice what it can fall by:
    that of the gradient itself is ``‖∇L‖⁴/∇Lᵀ F ∇L``, at least ``‖∇L‖²/tr F``. So tr F counts as
    no less than a hundredth of ``‖∇L‖²/R``.

    A layer that reads the data itself, or what frozen layers make of them, meets d inputs that it
    did not choose. Whitened by ``A⁻¹``, those that hardly vary count as much as what the data have
    in common, which costs generalisation (Wadia et al. 2021), and a step on N samples says no more
    of d white inputs than noise does. So a Kronecker factor of such inputs is inverted as

    .. math:: A + \kappa \frac{\operatorname{tr} A}{N} I,

    as ridge regression damps with d/N at a given ratio of signal to noise (Dobriban & Wager 2018).
    Inputs that are few beside the batch, as the patches of images, are hardly damped.

    Attributes:
        share: ε. A group's ``"damping"`` is its ε.
        floor: Least ν, in (0, 1]; 1 for a constant ε.
        data: κ; 0 for all inputs alike. Other structures than Kronecker products do not use it,
            nor does :class:`natgrad.SINGD`.

    Raises:
        ValueError: If ε or κ is negative or not finite, or the floor out of range.
    """

    share: float = 0.2
    floor: float = 0.01
    data: float = 1.0

    def __post_init__(self) -> None:
        """Check the options."""
        check_range("share", self.share)
        check_range("data", self.data)
        if not is_number(self.floor) or not 0 < self.floor <= 1:
            raise ValueError(f"floor must be in (0, 1], got {self.floor!r}")

    def unit(self, mean_eigenvalue: float, noise: float) -> float:
        """Return ``ν tr F/P`` at a ratio of noise to signal in [0, 1]."""
        return max(self.floor, noise) * mean_eigenvalue


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
            predicted: ``M(δ) − M(0)``; where it is not negative nothing was predicted.
        """
        ratio = actual / predicted if predicted < 0 and math.isfinite(actual) else -math.inf
        decay = self.decay**self.interval
        if ratio > 0.75:
            damping = damping * decay
        elif ratio < 0.25:
            damping = damping / decay
        return min(self.maximum, max(self.minimum, damping))

    def rejects(self, actual: float, predicted: float) -> bool:
        """Return whether a step is to be taken back.

        Args:
            actual: ``L(θ + δ) − L(θ)``.
            predicted: ``M(δ) − M(0)``.
        """
        return self.reject and (not math.isfinite(actual) or (actual >= 0 and predicted < 0))
