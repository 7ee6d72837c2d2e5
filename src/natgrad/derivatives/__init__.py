"""Derivatives of a model and its loss as matrices, by products alone."""

from natgrad.derivatives.curvature_products import (
    GaussNewtonMatrix,
    HessianMatrix,
    gauss_newton_matrix,
    hessian_matrix,
)
from natgrad.derivatives.jacobian import JacobianMatrix, jacobian_matrix

__all__ = [
    "GaussNewtonMatrix",
    "HessianMatrix",
    "JacobianMatrix",
    "gauss_newton_matrix",
    "hessian_matrix",
    "jacobian_matrix",
]
