r"""The objective the source trains with: α-divergence with α = 1.

.. math:: \sum_n \log E_q\, p(y_n \mid f_n) - \mathrm{KL}, \qquad
          \mathrm{KL} = \tfrac12 [\log\det(I + B/\delta) - \mathrm{tr}(B (\delta I + B)^{-1})
          + \delta \|\theta^*\|^2]

The source has no ``δ‖θ*‖²``, the mean's norm in the dual, as it does not know it; nothing but the
targets then holds δ back.
With the variances ``s = diag(u (δI + B)⁻¹ uᵀ + (J Jᵀ − u uᵀ)/δ)`` of outputs, ``u = J U``, it is
stationary at ``B = −2 Σ_n u_nᵀ diag(∂ℓ_n/∂s_n) u_n``, which a natural-gradient step moves to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from natgrad import linalg
from natgrad.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood


def log_predictive_density(
    likelihood: Likelihood, output: Tensor, variance: Tensor, target: Tensor, noise: Tensor
) -> Tensor:
    """Return ``Σ log E p(y | f)`` of independent Gaussian outputs f, up to constants.

    Means and variances are in the shape of the outputs, the variance of Gaussian noise is
    multiplied by a scalar. Classes and binary outcomes go by the probit approximation; other
    likelihoods are a TypeError.
    """
    if isinstance(likelihood, Gaussian):
        own = likelihood.output_hessian(output).diagonal(dim1=2, dim2=3).reshape(output.shape)
        total = variance + noise / own
        weights = likelihood.spread(likelihood.event_weights(output, target), output)
        residual = torch.where(weights > 0, target - output, 0.0)
        return -0.5 * (weights * (total.log() + residual.square() / total)).sum()
    if isinstance(likelihood, (Bernoulli, Categorical)):
        scaled = output / (1.0 + math.pi / 8.0 * variance).sqrt()
        return -likelihood.loss(scaled, target) * likelihood.count(scaled, target)
    raise TypeError(
        f"fit_predictive() knows categorical, bernoulli and gaussian likelihoods, not "
        f"{likelihood!r}"
    )


@dataclass
class PredictiveFit:
    """Natural-gradient steps on B, steps of Adam on the logarithms of δ and of the noise.

    Attributes:
        moment: B, ``(r, r)``.
        logarithms: Of δ, and of the factor on the variance of Gaussian noise; ``(2,)``.
        rate: Rate of the natural gradient.
        squared_norm: ``‖θ*‖²`` in the divergence; 0 to leave it out.
        optimizer: Optimizer of ``logarithms``; None to leave them.
    """

    moment: Tensor
    logarithms: Tensor
    rate: float
    squared_norm: float
    optimizer: torch.optim.Optimizer | None

    @torch.enable_grad()
    def step(
        self,
        likelihood: Likelihood,
        output: Tensor,
        target: Tensor,
        coordinates: Tensor,
        prior: Tensor,
        scale: float,
    ) -> float:
        """Move on by a mini-batch and return the objective that it estimates, before the step.

        Coordinates are ``u``, ``(N, C, r)``, ``prior`` the diagonals of ``J_n J_nᵀ``, ``(N, C)``;
        the data is so many times the batch as ``scale`` says.
        """
        values, vectors = linalg.eigh(self.moment)
        values = values.clamp(min=0.0)
        coordinates = coordinates.double()
        rotated = (coordinates @ vectors).square()
        outside = (prior.double() - coordinates.square().sum(-1)).clamp(min=0.0)
        delta, noise = self.logarithms.exp()
        variance = (rotated @ (delta + values).reciprocal()) + outside / delta
        data = scale * log_predictive_density(
            likelihood, output.double(), variance.view(output.shape), target, noise
        )
        divergence = ((1.0 + values / delta).log() - values / (values + delta)).sum()
        divergence = 0.5 * (divergence + delta * self.squared_norm)
        gradients = torch.autograd.grad(data - divergence, [variance, self.logarithms])
        new = -2.0 * (coordinates * gradients[0].unsqueeze(-1)).flatten(0, 1).T
        new = new @ coordinates.flatten(0, 1)
        present = (vectors * values) @ vectors.T
        self.moment = (1.0 - self.rate) * present + self.rate * 0.5 * (new + new.T)
        if self.optimizer is not None:
            self.logarithms.grad = -gradients[1]
            self.optimizer.step()
        return float((data - divergence).detach())

    def result(self) -> tuple[Tensor, float, float]:
        """Return B, δ and the factor on the variance of noise."""
        delta, noise = self.logarithms.detach().exp().tolist()
        return self.moment, delta, noise
