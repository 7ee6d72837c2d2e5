"""TKFAC."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from natgrad.curvature.kfac import DampingRule
from natgrad.fisher import FisherType
from natgrad.jacobians import WeightSharing
from natgrad.likelihoods import Likelihood
from natgrad.optim.levenberg_marquardt import LevenbergMarquardt
from natgrad.optim.natural_gradient import NaturalGradient

__all__ = ["TKFAC"]


class TKFAC(NaturalGradient):
    """Natural gradient descent with a trace-restricted Kronecker product (Gao et al. 2021).

    K-FAC with factors that weigh each sample's inputs by the size of its output gradients and the
    other way round, scaled to the exact trace of the layer. A step costs what K-FAC's does.

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
        weight_sharing: ``"expand"`` (every position a sample of its own) or ``"reduce"``.
        damping_rule: ``"pi"`` (factored) or ``"tikhonov"`` (exact, by eigendecomposition).
        max_factor_size: Larger factors are kept as their diagonal; None for no limit.
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
        weight_sharing: WeightSharing = "expand",
        damping_rule: DampingRule = "pi",
        max_factor_size: int | None = 8192,
        **options: Any,
    ) -> None:
        super().__init__(
            model,
            "tkfac",
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
            weight_sharing=weight_sharing,
            damping_rule=damping_rule,
            max_factor_size=max_factor_size,
            **options,
        )
