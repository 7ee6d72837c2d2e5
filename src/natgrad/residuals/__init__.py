"""Losses that are residuals of equations: their rows, and networks that know their derivatives."""

from natgrad.residuals.activations import Sine, register_activation
from natgrad.residuals.adaptive_points import AdaptivePoints
from natgrad.residuals.network import ResidualNetwork
from natgrad.residuals.residual import Residual
from natgrad.residuals.taylor import Taylor, TaylorNetwork

__all__ = [
    "AdaptivePoints",
    "Residual",
    "ResidualNetwork",
    "Sine",
    "Taylor",
    "TaylorNetwork",
    "register_activation",
]
