"""The linearised Laplace approximation."""

from natgrad.laplace.posterior import Laplace
from natgrad.laplace.subnetwork import largest_entries

__all__ = ["Laplace", "largest_entries"]
