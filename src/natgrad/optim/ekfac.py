"""EKFAC."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from natgrad.fisher import FisherType
from natgrad.jacobians import WeightSharing
from natgrad.likelihoods import Likelihood
from natgrad.optim.levenberg_marquardt import LevenbergMarquardt
from natgrad.optim.natural_gradient import NaturalGradient

__all__ = ["EKFAC"]


class EKFAC(NaturalGradient):
    """Natural gradient descent in the eigenbases of K-FAC's factors (George et al. 2018).

    Second moments are measured in the eigenbases with every update of the curvature, eigenbases
    renewed more rarely. Damping is added to the moments. A step costs four matrix products per
    layer, twice what K-FAC's take.

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
        inverse_interval: Steps between eigendecompositions.
        early_updates: Update and factorise also at steps 1, 2, 4, 8, … of the first interval.
        ema_decay: Decay of the moving average of the curvature.
        kl_clip: Bound on the predicted change of the output distribution per step.
        weight_sharing: ``"expand"`` (every position a sample of its own) or ``"reduce"``, for the
            eigenbases; moments are those of the exact rows.
        max_factor_size: Larger factors are kept as their diagonal; None for no limit.
        rows_per_unit: If a batch has more rows (samples times positions of a shared weight) than
            this times the size of a layer's larger factor, an update of its factors takes a random
            subset of positions, unbiased; None for all.
        max_moment_samples: Where a weight is shared and a batch has more samples, an update of the
            second moments takes a random subset of samples, unbiased; None for all.
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
        kl_clip: float | None = 3e-5,
        weight_sharing: WeightSharing = "expand",
        max_factor_size: int | None = 8192,
        rows_per_unit: float | None = 4.0,
        max_moment_samples: int | None = 16,
        **options: Any,
    ) -> None:
        super().__init__(
            model,
            "ekfac",
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
            max_factor_size=max_factor_size,
            rows_per_unit=rows_per_unit,
            max_moment_samples=max_moment_samples,
            **options,
        )
