"""Natural gradient descent for PyTorch.

Names are loaded when they are first asked for, so that ``import natgrad`` itself loads nothing.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from natgrad.version import __version__

if TYPE_CHECKING:
    from natgrad import curvature, ntk, operators, solvers, tools, wave_functions
    from natgrad.capture import Capture, register_layer
    from natgrad.curvature import Structure, register_structure
    from natgrad.decentralized import DecentralizedKFAC
    from natgrad.derivatives import gauss_newton_matrix, hessian_matrix, jacobian_matrix
    from natgrad.first_order import ImplicitSGD, Padam
    from natgrad.fisher import (
        EmpiricalFisher,
        ExactFisher,
        ImprovedFisher,
        MonteCarloFisher,
        fisher_matrix,
    )
    from natgrad.fngd import FNGD
    from natgrad.jacobians import Jacobians, LayerJacobian
    from natgrad.laplace import Laplace
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
    from natgrad.quality import UpdateQuality, update_quality
    from natgrad.residuals import Residual, ResidualNetwork, TaylorNetwork
    from natgrad.residuals.residual_ngd import ResidualNGD
    from natgrad.variational_laplace import VariationalLaplace
    from natgrad.wave_functions import StochasticReconfiguration

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


#: Which public names are in which module; all others are of `natgrad.optim`, or modules themselves.
_NAMES = {
    "natgrad.capture": ("Capture", "register_layer"),
    "natgrad.curvature": ("Structure", "register_structure"),
    "natgrad.decentralized": ("DecentralizedKFAC",),
    "natgrad.derivatives": ("gauss_newton_matrix", "hessian_matrix", "jacobian_matrix"),
    "natgrad.first_order": ("ImplicitSGD", "Padam"),
    "natgrad.fisher": (
        "EmpiricalFisher",
        "ExactFisher",
        "ImprovedFisher",
        "MonteCarloFisher",
        "fisher_matrix",
    ),
    "natgrad.fngd": ("FNGD",),
    "natgrad.jacobians": ("Jacobians", "LayerJacobian"),
    "natgrad.laplace": ("Laplace",),
    "natgrad.likelihoods": ("Bernoulli", "Categorical", "Gaussian", "Likelihood", "Poisson"),
    "natgrad.operators": ("FisherMatrix",),
    "natgrad.quality": ("UpdateQuality", "update_quality"),
    "natgrad.residuals": ("Residual", "ResidualNetwork", "TaylorNetwork"),
    "natgrad.residuals.residual_ngd": ("ResidualNGD",),
    "natgrad.variational_laplace": ("VariationalLaplace",),
    "natgrad.wave_functions": ("StochasticReconfiguration",),
}
_MODULES = dict.fromkeys(__all__, "natgrad.optim") | {
    name: module for module, names in _NAMES.items() for name in names
}


def __getattr__(name: str) -> Any:
    """Load a public name, or a module of the package, when it is first asked for."""
    value: Any
    if not name.startswith("_") and importlib.util.find_spec(f"natgrad.{name}"):
        value = importlib.import_module(f"natgrad.{name}")
    elif name in _MODULES:
        value = getattr(importlib.import_module(_MODULES[name]), name)
    else:
        raise AttributeError(f"module 'natgrad' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
