"""The theory of wide networks: parameterisation and the constants of isotropic updates."""

from natgrad.ntk.isotropy import isotropic_constant
from natgrad.ntk.parameterization import NTKLinear

__all__ = ["NTKLinear", "isotropic_constant"]
