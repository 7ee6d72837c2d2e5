"""Exact natural gradient descent."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from natgrad.fisher import FisherType
from natgrad.likelihoods import Likelihood
from natgrad.optim.levenberg_marquardt import LevenbergMarquardt
from natgrad.optim.natural_gradient import NaturalGradient

__all__ = ["ExactNGD"]


class ExactNGD(NaturalGradient):
    """Natural gradient descent with the exact Fisher matrix of the batch.

    Solved in sample space: ``R = N·C`` rows cost ``R³/3`` multiplications per step, whatever the
    number of parameters. For small data sets and few outputs (physics, regression) nothing else
    takes fewer steps.

    Args:
        model: The model to train.
        likelihood: A name, a :class:`natgrad.Likelihood`, or a torch loss module.
        lr: Learning rate, or ``"isotropic"`` for 1/α, measured on the first batch.
        damping: λ, in the units of F, or a :class:`natgrad.LevenbergMarquardt`.
        momentum: Momentum of the natural gradient.
        weight_decay: Decoupled weight decay.
        fisher: ``"exact"``, ``"mc"``, ``"empirical"`` or ``"improved"``.
        mc_samples: Draws per input for ``"mc"``.
        kl_clip: Bound on the predicted change of the output distribution per step.
        **options: Further arguments of :class:`~natgrad.optim.NaturalGradient`.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood | nn.Module = "categorical",
        *,
        lr: float | Literal["isotropic"] = 1.0,
        damping: float | LevenbergMarquardt = 1e-2,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        fisher: str | FisherType = "exact",
        mc_samples: int = 1,
        kl_clip: float | None = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(
            model,
            "full",
            likelihood,
            lr=lr,
            damping=damping,
            momentum=momentum,
            weight_decay=weight_decay,
            fisher=fisher,
            mc_samples=mc_samples,
            kl_clip=kl_clip,
            **options,
        )
