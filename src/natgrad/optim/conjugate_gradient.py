"""Matrix-free natural gradient descent."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from natgrad.fisher import FisherType
from natgrad.likelihoods import Likelihood
from natgrad.optim.levenberg_marquardt import LevenbergMarquardt
from natgrad.optim.natural_gradient import NaturalGradient

__all__ = ["ConjugateGradientNGD"]


class ConjugateGradientNGD(NaturalGradient):
    """Exact natural gradient descent by conjugate gradients (Hessian-free style).

    Each iteration takes two products with the factored Jacobian rows; neither the Gram matrix of
    the rows nor any matrix of parameters is formed, so that memory stays that of one backward pass
    per output. For batches whose ``N·C`` rows are too many for :class:`natgrad.ExactNGD`.

    Args:
        model: The model to train.
        likelihood: A name, a :class:`natgrad.Likelihood`, or a torch loss module.
        lr: Learning rate, or ``"isotropic"`` for 1/α, measured on the first batch.
        damping: λ, in the units of F, or a :class:`natgrad.LevenbergMarquardt`.
        tolerance: Residual, relative to the gradient, at which the iteration ends.
        max_iterations: Most iterations per step.
        warm_start: Begin with the last natural gradient instead of zero.
        momentum: Momentum of the natural gradient.
        weight_decay: Decoupled weight decay.
        fisher: ``"exact"``, ``"mc"``, ``"empirical"`` or ``"improved"``.
        kl_clip: Bound on the predicted change of the output distribution per step.
        **options: Further arguments of :class:`~natgrad.optim.NaturalGradient`.

    Source: Martens, Deep learning via Hessian-free optimization (2010), with the Fisher matrix.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood | nn.Module = "categorical",
        *,
        lr: float | Literal["isotropic"] = 1.0,
        damping: float | LevenbergMarquardt = 1e-2,
        tolerance: float = 1e-3,
        max_iterations: int = 50,
        warm_start: bool = True,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        fisher: str | FisherType = "exact",
        kl_clip: float | None = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(
            model,
            "conjugate_gradient",
            likelihood,
            lr=lr,
            damping=damping,
            tolerance=tolerance,
            max_iterations=max_iterations,
            warm_start=warm_start,
            momentum=momentum,
            weight_decay=weight_decay,
            fisher=fisher,
            kl_clip=kl_clip,
            **options,
        )
