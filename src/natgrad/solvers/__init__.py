"""How ``(F + λI) x = v`` is solved, as a choice of its own."""

from natgrad.solvers.conjugate_gradient import ConjugateGradient
from natgrad.solvers.solver import IterativeSolver, Solver, TruncatedEigh, as_solver
from natgrad.solvers.thermodynamic import Thermodynamic

__all__ = [
    "ConjugateGradient",
    "IterativeSolver",
    "Solver",
    "Thermodynamic",
    "TruncatedEigh",
    "as_solver",
]
