"""Gaussian likelihood: squared error."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from natgrad.likelihoods.base import Reduction, full_precision, per_sample
from natgrad.likelihoods.elementwise import (
    Elementwise,
    ReduceOutputs,
    plausible_scale,
    random_like,
)


@dataclass(frozen=True, repr=False)
class Gaussian(Elementwise):
    """y ~ N(z, σ² I): nll = ‖z − y‖² / (2σ²), Λ = I/σ².

    Args:
        variance: σ² in squared units of the output, default 1.
        reduce_outputs: "sum" or "mean" over the C outputs of a sample; with "mean" the variance is
            in effect C σ². ``nn.MSELoss()`` is ``Gaussian(0.5, "mean")``. None (default) is "sum"
            until an optimizer sees a loss that averages over outputs.
        reduction: How the user's loss reduces over samples, "mean" (default) or "sum".

    Raises:
        ValueError: If the variance is not a positive finite number or an option is unknown.

    Source: Martens, New insights and perspectives on the natural gradient method (2020), §9.
    """

    variance: float = 1.0
    reduce_outputs: ReduceOutputs = None
    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        if not 0 < self.variance < float("inf"):
            raise ValueError(f"variance must be positive and finite but is {self.variance}.")
        super().__post_init__()

    def averaging(self) -> Gaussian:
        """Return the likelihood of ``F.mse_loss``, whose variance is ½ if none other was given."""
        variance = 0.5 if self.variance == 1 else self.variance
        return dataclasses.replace(self, variance=variance, reduce_outputs="mean")

    def _is_foreign(self, output: Tensor, cotangent: Tensor) -> bool:
        """Return whether the gradient is one number, unless the sum was asked for.

        Who gives ``reduce_outputs="sum"`` may mean to measure how far outputs move.
        """
        return self.reduce_outputs != "sum" and super()._is_foreign(output, cotangent)

    def _tells_average(self, output: Tensor, cotangent: Tensor, target: Any) -> bool | None:
        """Read the sum or the mean off a loss that is linear in the outputs, as of log-densities.

        Its gradient is one number at all outputs that count, and so its size tells.
        """
        counted = cotangent != 0
        if target is not None or not super()._is_foreign(output[counted], cotangent[counted]):
            return super()._tells_average(output, cotangent, target)
        size = float(cotangent.abs().max())
        samples, entries = int(per_sample(counted).any(1).sum()), int(counted.sum())
        averaged, summed = plausible_scale(size * entries, entries), size * samples
        return averaged < plausible_scale(summed, samples)

    def _looks_average(self, output: Tensor, cotangent: Tensor) -> bool:
        """Return whether the gradient is too small for the sum of an untrained model's errors.

        Its outputs have as yet nothing to do with the targets, so N times the gradient of a sum
        grows with the output at a rate of about 1, and is about as large as outputs and targets
        are; that of a mean is C/2 times smaller. Both must speak for the mean.
        """
        # Half precision goes with scaled losses, at first by 2^16.
        factor = 2.0**-16 if cotangent.dtype == torch.float16 else 1.0
        residual = per_sample(cotangent.to(output.dtype)) * (len(output) * self.variance * factor)
        z = per_sample(output)
        centered = z - z.mean(0)
        slope = (residual * centered).sum() / centered.square().sum()
        # The mean of the targets may lie anywhere.
        residual = torch.where(centered.any(), residual - residual.mean(0), residual)
        extent = z.square().mean().sqrt().clamp_min(0.5)
        between = output[0].numel() ** -0.5
        small = residual.square().mean().sqrt() < between * extent
        return bool(small & ~(slope.abs() >= between))  # There is no slope if z is constant.

    def is_shown(self, output: Tensor, cotangent: Tensor) -> bool:
        """Return whether the gradient grows with the outputs as that of squared errors does.

        Errors of a model that is not trained yet grow with its outputs at a rate of about 1. Of a
        loss that is linear in the outputs the size of the gradient says it.
        """
        if self._tells_average(output, cotangent, None) is not None:
            return True
        residual = per_sample(cotangent.to(output.dtype)) * len(output)
        centered = per_sample(output) - per_sample(output).mean(0)
        slope = (residual * centered).sum() / centered.square().sum()
        slope = slope * (self.variance / self._scale(output))
        return bool((slope > 0.5) & (slope < 2.0))

    @full_precision
    def root_vectors(self, output: Tensor, target: Tensor | None = None) -> Tensor:
        """Return the scaled unit vectors, a view without a copy per sample; see the base."""
        if target is not None:
            return super().root_vectors(output, target)
        shape, size = output.shape, output[0].numel()
        scale: float = (self._scale(output) / self.variance) ** 0.5
        eye = torch.eye(size, dtype=output.dtype, device=output.device) * scale
        return eye.reshape(size, 1, *shape[1:]).expand(size, *shape)

    @full_precision
    def sample(self, output: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw a target of the output's shape; see the base class."""
        deviation: float = (self.variance / self._scale(output)) ** 0.5
        noise = random_like(output.detach().unsqueeze(0), generator, "normal")[0]
        return output.detach() + deviation * noise

    def _nll(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square() / (2 * self.variance)

    def _gradient(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - target) / self.variance

    def _hessian(self, output: Tensor) -> Tensor:
        return torch.full_like(output, 1 / self.variance)

    def _sample(self, output: Tensor, generator: torch.Generator | None) -> Tensor:
        deviation: float = self.variance**0.5
        return output + deviation * random_like(output, generator, "normal")
