"""The linearised Laplace approximation."""

from natgrad.laplace.calibration import Calibration, calibration
from natgrad.laplace.posterior import Laplace
from natgrad.laplace.subnetwork import largest_entries

__all__ = ["Calibration", "Laplace", "calibration", "largest_entries"]
