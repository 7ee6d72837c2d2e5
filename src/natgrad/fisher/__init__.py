"""Fisher matrices: which vectors are pulled back, and from data to a matrix."""

from natgrad.fisher.batches import Batch
from natgrad.fisher.estimation import (
    RowReceiver,
    draw_in_step,
    fisher_matrix,
    partial_samples,
    update_from_output,
)
from natgrad.fisher.types import (
    FISHER_TYPES,
    EmpiricalFisher,
    ExactFisher,
    FisherType,
    ImprovedFisher,
    MonteCarloFisher,
    as_fisher_type,
)

__all__ = [
    "FISHER_TYPES",
    "Batch",
    "EmpiricalFisher",
    "ExactFisher",
    "FisherType",
    "ImprovedFisher",
    "MonteCarloFisher",
    "RowReceiver",
    "as_fisher_type",
    "draw_in_step",
    "fisher_matrix",
    "partial_samples",
    "update_from_output",
]
