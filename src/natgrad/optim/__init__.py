"""Natural-gradient optimizers: one step, many compositions."""

from natgrad.optim.averaging import WeightAverage
from natgrad.optim.method import Method
from natgrad.optim.methods import (
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
    ImprovedEmpiricalNGD,
    ThermodynamicNGD,
    TwoLevelKFAC,
    UnitWiseNGD,
)
from natgrad.optim.natural_gradient import NaturalGradient
from natgrad.optim.options import Fallback, Refresh, StepRule
from natgrad.optim.preconditioner import Preconditioner
from natgrad.optim.step.damping import LevenbergMarquardt, RelativeDamping
from natgrad.optim.step.line_search import LineSearch
from natgrad.optim.step.measured_length import MeasuredLength
from natgrad.optim.summary import Summary

__all__ = [
    "EGN",
    "EKFAC",
    "KFAC",
    "KPSVD",
    "SINGD",
    "TEKFAC",
    "TKFAC",
    "BlockDiagonalNGD",
    "BlockTridiagonalNGD",
    "ConjugateGradientNGD",
    "DiagonalNGD",
    "ExactNGD",
    "Fallback",
    "ImprovedEmpiricalNGD",
    "LevenbergMarquardt",
    "LineSearch",
    "MeasuredLength",
    "Method",
    "NaturalGradient",
    "Preconditioner",
    "Refresh",
    "RelativeDamping",
    "StepRule",
    "Summary",
    "ThermodynamicNGD",
    "TwoLevelKFAC",
    "UnitWiseNGD",
    "WeightAverage",
]
