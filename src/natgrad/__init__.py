"""Natural gradient descent for PyTorch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from natgrad import curvature, operators, solvers
from natgrad.capture import Capture, register_layer
from natgrad.curvature import Structure, register_structure
from natgrad.fisher import (
    EmpiricalFisher,
    ExactFisher,
    ImprovedFisher,
    MonteCarloFisher,
    fisher_matrix,
)
from natgrad.jacobians import Jacobians, LayerJacobian
from natgrad.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, Poisson
from natgrad.operators import FisherMatrix
from natgrad.optim import (
    EGN,
    EKFAC,
    KFAC,
    KPSVD,
    SINGD,
    TEKFAC,
    TKFAC,
    BlockDiagonalNGD,
    BlockTridiagonalNGD,
    ConjugateGradientNGD,
    DiagonalNGD,
    ExactNGD,
    Fallback,
    ImprovedEmpiricalNGD,
    LevenbergMarquardt,
    LineSearch,
    MeasuredLength,
    NaturalGradient,
    Preconditioner,
    Refresh,
    RelativeDamping,
    StepRule,
    ThermodynamicNGD,
    TwoLevelKFAC,
    UnitWiseNGD,
    WeightAverage,
)
from natgrad.version import __version__

if TYPE_CHECKING:
    from natgrad import ntk, tools, wave_functions
    from natgrad.decentralized import DecentralizedKFAC
    from natgrad.derivatives import gauss_newton_matrix, hessian_matrix, jacobian_matrix
    from natgrad.first_order import ImplicitSGD, Padam
    from natgrad.fngd import FNGD
    from natgrad.laplace import Laplace
    from natgrad.quality import UpdateQuality, update_quality
    from natgrad.residuals import Residual, ResidualNetwork, TaylorNetwork
    from natgrad.residuals.residual_ngd import ResidualNGD
    from natgrad.variational_laplace import VariationalLaplace
    from natgrad.wave_functions import StochasticReconfiguration

#: Where names are that are loaded when they are first asked for.
_LAZY = {
    "DecentralizedKFAC": "natgrad.decentralized",
    "FNGD": "natgrad.fngd",
    "ImplicitSGD": "natgrad.first_order",
    "Laplace": "natgrad.laplace",
    "Padam": "natgrad.first_order",
    "Residual": "natgrad.residuals",
    "ResidualNGD": "natgrad.residuals.residual_ngd",
    "ResidualNetwork": "natgrad.residuals",
    "StochasticReconfiguration": "natgrad.wave_functions",
    "TaylorNetwork": "natgrad.residuals",
    "UpdateQuality": "natgrad.quality",
    "VariationalLaplace": "natgrad.variational_laplace",
    "derivatives": "natgrad.derivatives",
    "gauss_newton_matrix": "natgrad.derivatives",
    "hessian_matrix": "natgrad.derivatives",
    "jacobian_matrix": "natgrad.derivatives",
    "laplace": "natgrad.laplace",
    "ntk": "natgrad.ntk",
    "quality": "natgrad.quality",
    "residuals": "natgrad.residuals",
    "tools": "natgrad.tools",
    "update_quality": "natgrad.quality",
    "wave_functions": "natgrad.wave_functions",
}

__all__ = [
    "EGN",
    "EKFAC",
    "DecentralizedKFAC",
    "FNGD",
    "KFAC",
    "KPSVD",
    "SINGD",
    "TEKFAC",
    "TKFAC",
    "Bernoulli",
    "BlockDiagonalNGD",
    "BlockTridiagonalNGD",
    "Capture",
    "Categorical",
    "ConjugateGradientNGD",
    "DiagonalNGD",
    "EmpiricalFisher",
    "ExactFisher",
    "ExactNGD",
    "Fallback",
    "FisherMatrix",
    "Gaussian",
    "ImplicitSGD",
    "ImprovedEmpiricalNGD",
    "ImprovedFisher",
    "Jacobians",
    "Laplace",
    "LayerJacobian",
    "LevenbergMarquardt",
    "Likelihood",
    "LineSearch",
    "MeasuredLength",
    "MonteCarloFisher",
    "NaturalGradient",
    "Padam",
    "Poisson",
    "Preconditioner",
    "Refresh",
    "RelativeDamping",
    "Residual",
    "ResidualNGD",
    "ResidualNetwork",
    "StepRule",
    "StochasticReconfiguration",
    "Structure",
    "TaylorNetwork",
    "ThermodynamicNGD",
    "TwoLevelKFAC",
    "UnitWiseNGD",
    "UpdateQuality",
    "VariationalLaplace",
    "WeightAverage",
    "__version__",
    "curvature",
    "fisher_matrix",
    "gauss_newton_matrix",
    "hessian_matrix",
    "jacobian_matrix",
    "ntk",
    "operators",
    "register_layer",
    "register_structure",
    "solvers",
    "tools",
    "update_quality",
    "wave_functions",
]


def __getattr__(name: str) -> Any:
    """Load what most programs do not use when it is first asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module 'natgrad' has no attribute {name!r}")
    module = importlib.import_module(_LAZY[name])
    value = module if _LAZY[name] == f"natgrad.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
