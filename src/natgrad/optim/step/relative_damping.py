"""Damping in units of the curvature itself."""

from __future__ import annotations

from dataclasses import dataclass

from natgrad.arguments import check_range, is_number


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
