"""Optimizers, one file each."""

from natgrad.optim.block_diagonal import BlockDiagonalNGD
from natgrad.optim.block_tridiagonal import BlockTridiagonalNGD
from natgrad.optim.conjugate_gradient import ConjugateGradientNGD
from natgrad.optim.diagonal import DiagonalNGD
from natgrad.optim.egn import EGN
from natgrad.optim.ekfac import EKFAC
from natgrad.optim.exact import ExactNGD
from natgrad.optim.fngd import FNGD
from natgrad.optim.implicit_sgd import ImplicitSGD
from natgrad.optim.improved_empirical import ImprovedEmpiricalNGD
from natgrad.optim.kfac import KFAC
from natgrad.optim.kpsvd import KPSVD
from natgrad.optim.levenberg_marquardt import LevenbergMarquardt
from natgrad.optim.line_search import LineSearch
from natgrad.optim.natural_gradient import NaturalGradient
from natgrad.optim.padam import Padam
from natgrad.optim.preconditioner import Preconditioner
from natgrad.optim.residual_ngd import ResidualNGD
from natgrad.optim.singd import SINGD
from natgrad.optim.summary import Summary
from natgrad.optim.tekfac import TEKFAC
from natgrad.optim.thermodynamic import ThermodynamicNGD
from natgrad.optim.tkfac import TKFAC
from natgrad.optim.two_level_kfac import TwoLevelKFAC
from natgrad.optim.unit_wise import UnitWiseNGD

__all__ = [
    "BlockDiagonalNGD",
    "BlockTridiagonalNGD",
    "ConjugateGradientNGD",
    "DiagonalNGD",
    "EGN",
    "EKFAC",
    "ExactNGD",
    "FNGD",
    "ImplicitSGD",
    "ImprovedEmpiricalNGD",
    "KFAC",
    "KPSVD",
    "LevenbergMarquardt",
    "LineSearch",
    "NaturalGradient",
    "Padam",
    "Preconditioner",
    "ResidualNGD",
    "SINGD",
    "Summary",
    "TEKFAC",
    "TKFAC",
    "ThermodynamicNGD",
    "TwoLevelKFAC",
    "UnitWiseNGD",
]
