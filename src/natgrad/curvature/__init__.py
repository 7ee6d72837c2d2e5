"""Structures of the Fisher matrix, one file each."""

from natgrad.curvature import (  # noqa: F401
    block_diagonal,
    block_tridiagonal,
    conjugate_gradient,
    diagonal,
    ekfac,
    full,
    kfac,
    kpsvd,
    shared_coefficients,
    singd,
    tekfac,
    thermodynamic,
    tkfac,
    two_level,
    unit_wise,
)
from natgrad.curvature.base import FisherMatrix, GradientSource
from natgrad.curvature.partitioned import CurvaturePart, PartitionedFisher
from natgrad.curvature.registry import STRUCTURES, make_structure, register_structure

__all__ = [
    "STRUCTURES",
    "CurvaturePart",
    "FisherMatrix",
    "GradientSource",
    "PartitionedFisher",
    "make_structure",
    "register_structure",
]
