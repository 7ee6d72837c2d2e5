"""Damping in units of the curvature itself."""

from __future__ import annotations

from dataclasses import dataclass

from natgrad.arguments import check_range

__all__ = ["RelativeDamping"]


@dataclass(frozen=True)
class RelativeDamping:
    r"""Damping as a share of the mean eigenvalue of the Fisher matrix.

    .. math:: \lambda = \varepsilon \frac{\operatorname{tr} \hat F}{P},

    one λ for all P parameters of the matrix, renewed with every factorisation from the trace at the
    one before it. Multiplying the loss, or what it averages over, by a constant changes nothing.

    Attributes:
        share: ε. A group's ``"damping"`` is its ε.

    Raises:
        ValueError: If ε is negative or not finite.
    """

    share: float = 0.2

    def __post_init__(self) -> None:
        """Check the share."""
        check_range("share", self.share)
