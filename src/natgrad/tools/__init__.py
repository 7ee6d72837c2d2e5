"""What else the Fisher matrix is used for: one file per use."""

from natgrad.tools.consolidation import EWCPenalty, ewc_penalty
from natgrad.tools.influence import influence
from natgrad.tools.merging import merge

__all__ = ["EWCPenalty", "ewc_penalty", "influence", "merge"]
