"""Symmetric matrices in structured form: products, traces, inverses, sums. They know no layers."""

from natgrad.operators.block_diagonal import FisherMatrix
from natgrad.operators.combined import ScaledOperator, SumOperator
from natgrad.operators.dense import DenseOperator
from natgrad.operators.diagonal import DiagonalOperator
from natgrad.operators.eigen_kronecker import EigenKroneckerOperator
from natgrad.operators.kronecker import KroneckerOperator
from natgrad.operators.linear_map import LinearMap
from natgrad.operators.operator import GradientSource, Operator
from natgrad.operators.submatrix import Submatrix, SubmatrixOperator

__all__ = [
    "DenseOperator",
    "DiagonalOperator",
    "EigenKroneckerOperator",
    "FisherMatrix",
    "GradientSource",
    "KroneckerOperator",
    "LinearMap",
    "Operator",
    "ScaledOperator",
    "Submatrix",
    "SubmatrixOperator",
    "SumOperator",
]
