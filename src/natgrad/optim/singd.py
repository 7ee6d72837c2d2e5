"""SINGD."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from natgrad.curvature.singd import InitialScale
from natgrad.curvature.structured_factors import FactorStructure
from natgrad.fisher import FisherType
from natgrad.jacobians import WeightSharing
from natgrad.likelihoods import Likelihood
from natgrad.optim.levenberg_marquardt import LevenbergMarquardt
from natgrad.optim.natural_gradient import NaturalGradient

__all__ = ["SINGD"]


class SINGD(NaturalGradient):
    """Natural gradient descent with structured factors and without inversion (Lin et al. 2024).

    As K-FAC, but factors of the inverse are kept up to date by products alone. So it runs in
    bfloat16 throughout, and the factors may be structured: block-diagonal ones, say, take memory
    proportional to the layer's width.

    Args:
        model: The model to train.
        likelihood: A name, a :class:`natgrad.Likelihood`, or a torch loss module.
        lr: Learning rate, or ``"isotropic"`` for 1/α, measured on the first batch.
        damping: λ > 0, in the units of F (``coupled=False``: of each Kronecker factor), or a
            :class:`natgrad.LevenbergMarquardt`. With 0, factors grow without bound in directions no
            batch has.
        momentum: Momentum of the natural gradient.
        nesterov: Whether momentum looks ahead.
        weight_decay: Decoupled weight decay.
        fisher: ``"exact"``, ``"mc"``, ``"empirical"`` or ``"improved"``.
        mc_samples: Draws per input for ``"mc"``.
        factor_interval: T, steps between steps of the factors.
        early_updates: Move the factors also at steps 1, 2, 4, 8, … of the first interval.
        factor_lr: β₁, the step size of the factors.
        early_factor_lr: Let step k = 0, 1, … of the factors take ``max(β₁, 1/(k + 2))``.
        factor_momentum: α₁, the momentum of the factors.
        factor_structures: ``"dense"``, ``"diagonal"``, ``"block_diagonal"``,
            ``"lower_triangular"``, ``"upper_triangular"``, ``"lower_toeplitz"``,
            ``"upper_toeplitz"`` or ``"hierarchical"``, for both factors or one for that of the
            inputs and one for that of the outputs.
        factor_dtype: Type of factors and products with them: bfloat16, float32 or float64; that of
            the parameters by default.
        coupled: Let the steps of the two factors depend on each other (SINGD), which damps their
            product; False is IKFAC, which damps each factor, so that λ of about 1e-2 suits it.
        max_change: Bound below 1 on the relative change of a factor in a step, which lowers β₁
            where statistics are large; None is the recursion as it stands, for β₁ about 0.01.
        initial_scale: ``"batch"`` starts from multiples of the identity that suit the first batch,
            ``"identity"`` from the identity.
        block_size: Size of the blocks of ``"block_diagonal"``; the last one may be smaller.
        hierarchical_sizes: Dense corners of ``"hierarchical"``.
        weight_sharing: ``"expand"`` (every position a sample of its own) or ``"reduce"``.
        kl_clip: Bound on the predicted change of the output distribution per step.
        max_factor_size: Larger factors are diagonal, unless they are block-diagonal or
            hierarchical; None for no limit.
        rows_per_unit: If a batch has more rows (samples times positions of a shared weight) than
            this times the size of a layer's larger factor, its statistics take a random subset of
            positions, unbiased; None for all.
        **options: Further arguments of :class:`~natgrad.optim.NaturalGradient`. With
            ``curvature_warmup``, give ``ema_decay``: it weighs batches that no step of the factors
            has used yet.

    Source: Lin et al., Structured inverse-free natural gradient descent (2024), arXiv 2312.05705.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood | nn.Module = "categorical",
        *,
        lr: float | Literal["isotropic"] = 0.1,
        damping: float | LevenbergMarquardt = 1e-3,
        momentum: float = 0.9,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        fisher: str | FisherType = "mc",
        mc_samples: int = 1,
        factor_interval: int = 10,
        early_updates: bool = True,
        factor_lr: float = 0.05,
        early_factor_lr: bool = True,
        factor_momentum: float = 0.0,
        factor_structures: FactorStructure | tuple[FactorStructure, FactorStructure] = "dense",
        factor_dtype: torch.dtype | None = None,
        coupled: bool = True,
        max_change: float | None = 0.9,
        initial_scale: InitialScale = "batch",
        block_size: int = 32,
        hierarchical_sizes: tuple[int, int] = (16, 16),
        weight_sharing: WeightSharing = "expand",
        kl_clip: float | None = 3e-5,
        max_factor_size: int | None = 8192,
        rows_per_unit: float | None = 4.0,
        **options: Any,
    ) -> None:
        super().__init__(
            model,
            "singd",
            likelihood,
            lr=lr,
            damping=damping,
            momentum=momentum,
            nesterov=nesterov,
            weight_decay=weight_decay,
            fisher=fisher,
            mc_samples=mc_samples,
            factor_interval=factor_interval,
            early_updates=early_updates,
            factor_lr=factor_lr,
            early_factor_lr=early_factor_lr,
            factor_momentum=factor_momentum,
            factor_structures=factor_structures,
            factor_dtype=factor_dtype,
            coupled=coupled,
            max_change=max_change,
            initial_scale=initial_scale,
            block_size=block_size,
            hierarchical_sizes=hierarchical_sizes,
            weight_sharing=weight_sharing,
            kl_clip=kl_clip,
            max_factor_size=max_factor_size,
            rows_per_unit=rows_per_unit,
            **{"inverse_interval": factor_interval, **options},
        )
