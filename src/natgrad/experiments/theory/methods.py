"""The methods whose theory is tested, and their optimizers with nothing but the theory in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import natgrad


@dataclass(frozen=True)
class TheoryMethod:
    """One method, by its title and its optimizer; None for gradient descent.

    Damping is in units of the mean eigenvalue of the Fisher matrix on the samples' directions. It
    is 0 where the optimizer inverts on the range of F at no cost; else as little as leaves a
    Cholesky factorisation in float64 accurate, and for unit-wise curvature what keeps units with
    nearly vanishing gradients from moving far.
    """

    title: str
    optimizer: Callable[..., torch.optim.Optimizer] | None
    relative_damping: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)


_EVERY_STEP = {"refresh": natgrad.Refresh(factors=1, inverses=1, decay=0.0), "momentum": 0.0}

METHODS: dict[str, TheoryMethod] = {
    "gd": TheoryMethod("Gradient descent", None),
    "full": TheoryMethod("Exact NGD", natgrad.ExactNGD),
    "block_diagonal": TheoryMethod("Block-diagonal", natgrad.BlockDiagonalNGD),
    "block_tridiagonal": TheoryMethod("Block-tridiagonal", natgrad.BlockTridiagonalNGD),
    "kfac": TheoryMethod(
        "K-FAC",
        natgrad.KFAC,
        1e-14,
        {**_EVERY_STEP, "fisher": "exact", "step_rule": natgrad.StepRule(length="lr")},
    ),
    "unit_wise": TheoryMethod("Unit-wise", natgrad.UnitWiseNGD, 1e-6, _EVERY_STEP),
    "diagonal": TheoryMethod("Diagonal", natgrad.DiagonalNGD, options=_EVERY_STEP),
}
"""Every method by name: gradient descent, or a structure of the Fisher matrix."""


def damping_of(name: str, model: nn.Module, x: Tensor) -> float:
    """Return the damping a method is used with on a model and its training inputs."""
    relative = METHODS[name].relative_damping
    if relative == 0:
        return 0.0
    matrix = natgrad.fisher_matrix(model, (x, None), "gaussian", "block_diagonal")
    directions = len(x) * len(matrix.parts)
    if name == "unit_wise":
        units = [p.shape[0] for p in model.parameters() if p.dim() > 1]
        directions = len(x) * (sum(units) - units[-1])
    return relative * float(matrix.trace()) / directions


def build_optimizer(
    name: str, model: nn.Module, lr: float, damping: float, likelihood: str = "gaussian"
) -> torch.optim.Optimizer:
    """Return a method's optimizer: no momentum, no bound, curvature of the present batch."""
    method = METHODS[name]
    if method.optimizer is None:
        return torch.optim.SGD(model.parameters(), lr=lr)
    return method.optimizer(
        model, likelihood, lr=lr, damping=damping, kl_clip=None, **method.options
    )
