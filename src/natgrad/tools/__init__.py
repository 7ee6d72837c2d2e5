"""What else the Fisher matrix is used for: one file per use."""

from natgrad.tools.consolidation import EWCPenalty, ewc_penalty
from natgrad.tools.estimators import estimate_diagonal, estimate_trace
from natgrad.tools.influence import influence
from natgrad.tools.merging import merge
from natgrad.tools.pruning import Pruning, prune
from natgrad.tools.quantization import QuantizationError, quantization_error
from natgrad.tools.spectrum import (
    SpectralDensity,
    effective_dimension,
    spectral_density,
    top_eigenpairs,
)

__all__ = [
    "EWCPenalty",
    "Pruning",
    "QuantizationError",
    "SpectralDensity",
    "effective_dimension",
    "estimate_diagonal",
    "estimate_trace",
    "ewc_penalty",
    "influence",
    "merge",
    "prune",
    "quantization_error",
    "spectral_density",
    "top_eigenpairs",
]
