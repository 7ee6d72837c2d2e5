"""Fast natural gradient descent: coefficients of a first phase, kept for good."""

from natgrad.fngd.fngd import FNGD

__all__ = ["FNGD"]
