"""Unit-wise natural gradient descent."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from natgrad.fisher import FisherType
from natgrad.likelihoods import Likelihood
from natgrad.optim.levenberg_marquardt import LevenbergMarquardt
from natgrad.optim.natural_gradient import NaturalGradient

__all__ = ["UnitWiseNGD"]


class UnitWiseNGD(NaturalGradient):
    """Natural gradient descent with one dense block per unit.

    It needs some damping: a unit whose gradients nearly vanish moves far without. With
    ``lr="isotropic"`` about 1e-6 of the mean eigenvalue of the blocks is enough.

    Args:
        model: The model to train.
        likelihood: A name, a :class:`natgrad.Likelihood`, or a torch loss module.
        lr: Learning rate, or ``"isotropic"`` for 1/α, measured on the first batch.
        damping: λ, in the units of F, or a :class:`natgrad.LevenbergMarquardt`.
        momentum: Momentum of the natural gradient.
        weight_decay: Decoupled weight decay.
        fisher: ``"exact"``, ``"mc"``, ``"empirical"`` or ``"improved"``.
        mc_samples: Draws per input for ``"mc"``.
        factor_interval: Steps between updates of the curvature.
        inverse_interval: Steps between factorisations.
        ema_decay: Decay of the moving average of the curvature.
        kl_clip: Bound on the predicted change of the output distribution per step.
        **options: Further arguments of :class:`~natgrad.optim.NaturalGradient`.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood | nn.Module = "categorical",
        *,
        lr: float | Literal["isotropic"] = 0.05,
        damping: float | LevenbergMarquardt = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        fisher: str | FisherType = "exact",
        mc_samples: int = 1,
        factor_interval: int = 1,
        inverse_interval: int = 1,
        ema_decay: float = 0.9,
        kl_clip: float | None = 1e-2,
        **options: Any,
    ) -> None:
        super().__init__(
            model,
            "unit_wise",
            likelihood,
            lr=lr,
            damping=damping,
            momentum=momentum,
            weight_decay=weight_decay,
            fisher=fisher,
            mc_samples=mc_samples,
            factor_interval=factor_interval,
            inverse_interval=inverse_interval,
            ema_decay=ema_decay,
            kl_clip=kl_clip,
            **options,
        )
