"""Damping in units of the curvature itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from natgrad.arguments import check_range, is_number

__all__ = ["NoiseToSignal", "RelativeDamping"]

#: A squared residual as large stands for one that is not known.
UNKNOWN = 1e200


@dataclass(frozen=True)
class RelativeDamping:
    r"""Damping as a share of the mean eigenvalue of the Fisher matrix.

    .. math:: \lambda = \varepsilon \nu \frac{\operatorname{tr} \hat F}{P},

    one λ for all P parameters of the matrix, renewed with every factorisation from the trace at the
    one before it. Multiplying the loss, or what it averages over, by a constant changes nothing.

    The Fisher matrix of a squared error knows nothing of the residuals, where that of a
    cross-entropy vanishes as the data are fitted. The variance of targets is given by the user's
    loss, not by the data, and so is what a damping weighs against: ridge regression takes the ratio
    of the noise to the signal (Hoerl & Kennard 1970). With the mean squared residual R, a geometric
    moving average over measurements, it is

    .. math:: \nu = \min\left(1, \frac{R}{R_{\max} - R}\right), \quad \nu \ge \text{floor}

    for a Gaussian likelihood where lengths are measured (:class:`natgrad.MeasuredLength`), and 1
    elsewhere. Targets that are noise for the most part are damped as before, those fitted to one
    part in a hundred by a hundredth.

    Attributes:
        share: ε. A group's ``"damping"`` is its ε.
        floor: Least ν, in (0, 1]; 1 for a constant ε.

    Raises:
        ValueError: If ε is negative or not finite, or the floor out of range.
    """

    share: float = 0.2
    floor: float = 0.01

    def __post_init__(self) -> None:
        """Check the options."""
        check_range("share", self.share)
        if not is_number(self.floor) or not 0 < self.floor <= 1:
            raise ValueError(f"floor must be in (0, 1], got {self.floor!r}")

    def unit(self, mean_eigenvalue: float, noise: NoiseToSignal) -> float:
        """Return ``ν tr F/P``."""
        return max(self.floor, noise.ratio) * mean_eigenvalue


@dataclass(frozen=True)
class NoiseToSignal:
    """What is known of squared residuals.

    Attributes:
        log_residual: The average of log R; None before the first measurement.
        log_largest: The largest of these averages.
    """

    log_residual: float | None = None
    log_largest: float = -math.inf

    @property
    def ratio(self) -> float:
        """Of what is left to what has been explained, at most 1."""
        if self.log_residual is None:
            return 1.0
        left = math.exp(self.log_residual - self.log_largest)
        return left / (1.0 - left) if left < 0.5 else 1.0

    def measured(self, residual: float, memory: float) -> NoiseToSignal:
        """Return the state after a measurement.

        Args:
            residual: The mean squared residual of a batch.
            memory: Weight of the past.
        """
        if not 0 < residual < UNKNOWN:
            return self
        found = math.log(residual)
        if self.log_residual is not None:
            found = memory * self.log_residual + (1 - memory) * found
        return NoiseToSignal(found, max(self.log_largest, found))

    def state_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return dict(vars(self))

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> NoiseToSignal:
        """Return the state that :meth:`state_dict` described."""
        return cls(**values)
