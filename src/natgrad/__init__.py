"""Natural gradient descent for PyTorch."""

from natgrad import ntk
from natgrad.capture import Capture, register_layer
from natgrad.curvature import FisherMatrix, register_structure
from natgrad.fisher import fisher_matrix
from natgrad.jacobians import Jacobians, LayerJacobian
from natgrad.laplace import Laplace
from natgrad.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, Poisson
from natgrad.optim import (
    EGN,
    EKFAC,
    FNGD,
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
    ImplicitSGD,
    ImprovedEmpiricalNGD,
    LevenbergMarquardt,
    LineSearch,
    NaturalGradient,
    Padam,
    Preconditioner,
    ResidualNGD,
    ThermodynamicNGD,
    TwoLevelKFAC,
    UnitWiseNGD,
)
from natgrad.quality import UpdateQuality, update_quality
from natgrad.residuals import Residual, ResidualNetwork, TaylorNetwork
from natgrad.version import __version__

__all__ = [
    "EGN",
    "EKFAC",
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
    "ExactNGD",
    "FisherMatrix",
    "Gaussian",
    "ImplicitSGD",
    "ImprovedEmpiricalNGD",
    "Jacobians",
    "Laplace",
    "LayerJacobian",
    "LevenbergMarquardt",
    "Likelihood",
    "LineSearch",
    "NaturalGradient",
    "Padam",
    "Poisson",
    "Preconditioner",
    "Residual",
    "ResidualNGD",
    "ResidualNetwork",
    "TaylorNetwork",
    "ThermodynamicNGD",
    "TwoLevelKFAC",
    "UnitWiseNGD",
    "UpdateQuality",
    "__version__",
    "fisher_matrix",
    "ntk",
    "register_layer",
    "register_structure",
    "update_quality",
]
