"""The variational linearised Laplace approximation (VaLLA)."""

from natgrad.variational_laplace.posterior import VariationalLaplace

__all__ = ["VariationalLaplace"]
