"""Thermodynamic natural gradient descent."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from natgrad.fisher import FisherType
from natgrad.likelihoods import Likelihood
from natgrad.optim.levenberg_marquardt import LevenbergMarquardt
from natgrad.optim.natural_gradient import NaturalGradient

__all__ = ["ThermodynamicNGD"]


class ThermodynamicNGD(NaturalGradient):
    """Natural gradient descent with the natural gradient as a thermal equilibrium.

    The Ornstein-Uhlenbeck process ``dx = −((F + λI)x − ∇L)dt + √(2T)dW`` is simulated for some time
    and its state is the step. For long times that is the damped natural gradient; started from the
    gradient and for no time at all it is gradient descent.

    Args:
        model: The model to train.
        likelihood: A name, a :class:`natgrad.Likelihood`, or a torch loss module.
        lr: Learning rate, or ``"isotropic"`` for 1/α, measured on the first batch.
        damping: λ, in the units of F, or a :class:`natgrad.LevenbergMarquardt`.
        time: Simulated time, in units of one over the largest eigenvalue of ``F + λI``.
        step_size: Length of a simulation step, in the same units, below 2.
        temperature: T, the strength of the noise; 0 for none.
        start: ``"warm"`` (where the last simulation ended, which acts like momentum),
            ``"gradient"`` or ``"zero"``.
        delay: Simulated time, in the same units, at most ``time``, during which the process still
            runs under the matrix and the gradient of the step before (starting from that gradient
            for ``start="gradient"``), as an analog device does while the new ones are computed;
            the rest, ``time - delay``, runs under the new. The first step runs all the time under
            its own. Checkpoints hold the state the delay leads to, so resumed runs go on exactly.
        burn_in: Take the mean of the states later than this under the new matrix, which has less
            of the noise than the last state. None (default) for the last state.
        noise_seed: Seed of the noise; the global random state is never used.
        momentum: Momentum of the natural gradient.
        weight_decay: Decoupled weight decay.
        fisher: ``"exact"``, ``"mc"``, ``"empirical"`` or ``"improved"``.
        kl_clip: Bound on the predicted change of the output distribution per step.
        **options: Further arguments of :class:`~natgrad.optim.NaturalGradient`.

    Source: Donatella et al., Thermodynamic natural gradient descent (2024). How the delay splits
    the simulated time, and the mean after burn-in, are choices of natgrad.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood | nn.Module = "categorical",
        *,
        lr: float | Literal["isotropic"] = 1.0,
        damping: float | LevenbergMarquardt = 0.1,
        time: float = 20.0,
        step_size: float = 1.0,
        temperature: float = 0.0,
        start: Literal["warm", "gradient", "zero"] = "warm",
        delay: float = 0.0,
        burn_in: float | None = None,
        noise_seed: int = 0,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        fisher: str | FisherType = "exact",
        kl_clip: float | None = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(
            model,
            "thermodynamic",
            likelihood,
            lr=lr,
            damping=damping,
            time=time,
            step_size=step_size,
            temperature=temperature,
            start=start,
            delay=delay,
            burn_in=burn_in,
            noise_seed=noise_seed,
            momentum=momentum,
            weight_decay=weight_decay,
            fisher=fisher,
            kl_clip=kl_clip,
            **options,
        )
