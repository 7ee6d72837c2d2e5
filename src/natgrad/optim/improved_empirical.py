"""Natural gradient descent with the improved empirical Fisher matrix."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from natgrad.likelihoods import Likelihood
from natgrad.optim.levenberg_marquardt import LevenbergMarquardt
from natgrad.optim.natural_gradient import NaturalGradient

__all__ = ["ImprovedEmpiricalNGD"]


class ImprovedEmpiricalNGD(NaturalGradient):
    r"""Natural gradient descent with the improved empirical Fisher matrix of the batch (iEF).

    With ``s_n`` the squared norm of a sample's loss gradient at the output, its step is
    ``(F* + λI)⁻¹∇L = Gᵀ(GGᵀ + Nλ diag(s))⁻¹ s``: at zero damping every sample's linearised loss
    falls by its own ``s_n``, as under the Gauss-Newton step, and not, as with the empirical Fisher
    matrix, all by the same amount. One row per sample, whatever the number of outputs: ``N³/3``
    multiplications per step.

    Args:
        model: The model to train.
        likelihood: A name, a :class:`natgrad.Likelihood`, or a torch loss module.
        lr: Learning rate, or ``"isotropic"`` for 1/α, measured on the first batch.
        damping: λ, in the units of F, or a :class:`natgrad.LevenbergMarquardt`.
        momentum: Momentum of the natural gradient.
        weight_decay: Decoupled weight decay.
        kl_clip: Bound on the predicted change of the output distribution per step.
        **options: Further arguments of :class:`~natgrad.optim.NaturalGradient`.

    Source: Wu et al., An improved empirical Fisher approximation for natural gradient descent
    (2024), whose own damping, ``Gᵀ(GGᵀ + λI)⁻¹ s``, shrinks well-fitted samples more.
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
            fisher="improved",
            kl_clip=kl_clip,
            **options,
        )
