"""The linearised Laplace approximation."""

from natgrad.laplace.posterior import Laplace

__all__ = ["Laplace"]
