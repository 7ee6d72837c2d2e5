"""Natural gradient descent with the improved empirical Fisher matrix."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from natgrad.curvature.base import check_choice
from natgrad.fisher import GramDampedImprovedFisher
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

    There are two places for λ. With ``damping_rule="fisher"`` it is added to ``F*``, as everywhere
    in natgrad. With ``"gram"``, the rule of the source, it is added to the mean Gram matrix of the
    samples' loss gradients, ``Gᵀ(GGᵀ + NλI)⁻¹ s``, which is
    ``(F̃ + λI)⁻¹ (1/N) Σ s_n g_n`` with the empirical Fisher matrix ``F̃``: a sample is damped by
    ``λ/s_n`` in the units of ``F*``, so well-fitted samples move the step less, and the more so
    the larger λ. For λ → 0 both are the same, as they are where all ``s_n`` are 1. Sample weights
    count as repetitions. The λ of the source, which has sums for means, is ``Nλ`` here.

    Args:
        model: The model to train.
        likelihood: A name, a :class:`natgrad.Likelihood`, or a torch loss module.
        lr: Learning rate, or ``"isotropic"`` for 1/α, measured on the first batch.
        damping: λ, in the units of F, or a :class:`natgrad.LevenbergMarquardt`. With
            ``damping_rule="gram"`` a number, in the units of squared loss gradients by parameters,
            so that it depends on the units of the loss.
        damping_rule: ``"fisher"`` or ``"gram"``. The latter takes one event per sample, losses
            whose scale the likelihood knows (for a Gaussian one: its own mean or sum), and none of
            the options that need ``F* + λI`` or precondition other vectors than ``∇L``.
        momentum: Momentum of the natural gradient.
        weight_decay: Decoupled weight decay.
        kl_clip: Bound on the predicted change of the output distribution per step.
        **options: Further arguments of :class:`~natgrad.optim.NaturalGradient`.

    Raises:
        ValueError: If ``damping_rule`` is unknown, or does not go with another option.

    Source: Wu et al., An improved empirical Fisher approximation for natural gradient descent
    (2024).
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood | nn.Module = "categorical",
        *,
        lr: float | Literal["isotropic"] = 1.0,
        damping: float | LevenbergMarquardt = 1e-2,
        damping_rule: Literal["fisher", "gram"] = "fisher",
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        kl_clip: float | None = 0.1,
        **options: Any,
    ) -> None:
        check_choice("damping_rule", damping_rule, "fisher", "gram")
        if damping_rule == "gram":
            refused = {
                "a LevenbergMarquardt damping": isinstance(damping, LevenbergMarquardt),
                "lr='isotropic'": isinstance(lr, str),
                "step_rule='quadratic_model'": options.get("step_rule") == "quadratic_model",
                "weight_decay_mode='model'": options.get("weight_decay_mode") == "model",
                "momentum_on='gradient'": options.get("momentum_on") == "gradient",
            }
            for option, chosen in refused.items():
                if chosen:
                    raise ValueError(
                        "damping_rule='gram' is a rule for the gradient of the batch's own loss, "
                        f"with nothing added to F*, so it does not take {option}: use "
                        "damping_rule='fisher'"
                    )
        super().__init__(
            model,
            "full",
            likelihood,
            lr=lr,
            damping=damping,
            momentum=momentum,
            weight_decay=weight_decay,
            fisher=GramDampedImprovedFisher() if damping_rule == "gram" else "improved",
            kl_clip=kl_clip,
            **options,
        )
