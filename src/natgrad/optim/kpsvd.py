"""KPSVD."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from natgrad.curvature.kfac import DampingRule
from natgrad.curvature.kpsvd import SVDMethod
from natgrad.fisher import FisherType
from natgrad.likelihoods import Likelihood
from natgrad.optim.levenberg_marquardt import LevenbergMarquardt
from natgrad.optim.natural_gradient import NaturalGradient

__all__ = ["KPSVD"]


class KPSVD(NaturalGradient):
    """Natural gradient descent with the nearest Kronecker products (Koroko et al. 2022).

    The curvature of each update is decomposed by a few products with its rows. Where the damped
    sum of two products is not positive definite, the first alone is inverted, and a warning says
    so once per layer.

    Args:
        model: The model to train.
        likelihood: A name, a :class:`natgrad.Likelihood`, or a torch loss module.
        lr: Learning rate, or ``"isotropic"`` for 1/α, measured on the first batch.
        damping: λ, in the units of F, or a :class:`natgrad.LevenbergMarquardt`.
        momentum: Momentum of the natural gradient.
        nesterov: Whether momentum looks ahead.
        weight_decay: Decoupled weight decay.
        fisher: ``"exact"``, ``"mc"``, ``"empirical"`` or ``"improved"``.
        mc_samples: Draws per input for ``"mc"``.
        factor_interval: Steps between updates of the curvature.
        inverse_interval: Steps between factorisations.
        early_updates: Update and factorise also at steps 1, 2, 4, 8, … of the first interval.
        ema_decay: Decay of the moving average of the curvature.
        kl_clip: Bound on the predicted change of the output distribution per step.
        rank: Kronecker products per layer, 1 or 2 (more only with ``"tikhonov"``).
        method: ``"lanczos"`` or ``"deflation"``.
        damping_rule: ``"pi"`` (factored) or ``"tikhonov"`` (exact; for two products or more it
            needs the dense block of each layer).
        max_factor_size: Layers with larger factors get those of K-FAC; None for no limit.
        **options: Further arguments of :class:`~natgrad.optim.NaturalGradient`.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood | nn.Module = "categorical",
        *,
        lr: float | Literal["isotropic"] = 0.1,
        damping: float | LevenbergMarquardt = 1e-4,
        momentum: float = 0.9,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        fisher: str | FisherType = "mc",
        mc_samples: int = 1,
        factor_interval: int = 10,
        inverse_interval: int = 20,
        early_updates: bool = True,
        ema_decay: float = 0.95,
        kl_clip: float | None = 5e-5,
        rank: int = 1,
        method: SVDMethod = "lanczos",
        damping_rule: DampingRule = "pi",
        max_factor_size: int | None = 8192,
        **options: Any,
    ) -> None:
        super().__init__(
            model,
            "kpsvd",
            likelihood,
            lr=lr,
            damping=damping,
            momentum=momentum,
            nesterov=nesterov,
            weight_decay=weight_decay,
            fisher=fisher,
            mc_samples=mc_samples,
            factor_interval=factor_interval,
            inverse_interval=inverse_interval,
            early_updates=early_updates,
            ema_decay=ema_decay,
            kl_clip=kl_clip,
            rank=rank,
            method=method,
            damping_rule=damping_rule,
            max_factor_size=max_factor_size,
            **options,
        )
