"""Structured approximations of the Fisher matrix, one file each."""

from natgrad.curvature.block_diagonal import BlockDiagonal
from natgrad.curvature.block_tridiagonal import BlockTridiagonal
from natgrad.curvature.curvature import Curvature
from natgrad.curvature.diagonal import Diagonal
from natgrad.curvature.ekfac import EigenKronecker
from natgrad.curvature.foof import ForwardOnly
from natgrad.curvature.full import Full
from natgrad.curvature.kfac import KroneckerFactors
from natgrad.curvature.kpsvd import KroneckerProducts, NearestKronecker
from natgrad.curvature.singd import InverseFactors
from natgrad.curvature.structure import STRUCTURES, Structure, as_structure, register_structure
from natgrad.curvature.tekfac import TraceEigenKronecker
from natgrad.curvature.tkfac import TraceKronecker
from natgrad.curvature.two_level import TwoLevelKronecker
from natgrad.curvature.unit_wise import UnitWise

__all__ = [
    "STRUCTURES",
    "BlockDiagonal",
    "BlockTridiagonal",
    "Curvature",
    "Diagonal",
    "EigenKronecker",
    "ForwardOnly",
    "Full",
    "InverseFactors",
    "KroneckerFactors",
    "KroneckerProducts",
    "NearestKronecker",
    "Structure",
    "TraceEigenKronecker",
    "TraceKronecker",
    "TwoLevelKronecker",
    "UnitWise",
    "as_structure",
    "register_structure",
]
