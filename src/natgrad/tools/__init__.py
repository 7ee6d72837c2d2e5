"""What else the Fisher matrix is used for: one file per use."""

from natgrad.tools.consolidation import EWCPenalty, ewc_penalty
from natgrad.tools.influence import influence
from natgrad.tools.merging import merge
from natgrad.tools.pruning import Pruning, prune
from natgrad.tools.quantization import QuantizationError, quantization_error

__all__ = [
    "EWCPenalty",
    "Pruning",
    "QuantizationError",
    "ewc_penalty",
    "influence",
    "merge",
    "prune",
    "quantization_error",
]
