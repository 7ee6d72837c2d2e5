"""Likelihoods of errors that count by their size: absolute errors, and Huber's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from natgrad.likelihoods.base import Reduction
from natgrad.likelihoods.elementwise import Elementwise, ReduceOutputs, random_like


@dataclass(frozen=True, repr=False)
class Huber(Elementwise):
    r"""Errors r = z − y that count by their square up to a threshold β, beyond it by their size.

    .. math:: -\log p(y \mid z) = \begin{cases} s r^2/(2\beta) & |r| \le \beta \\
              s (|r| - \beta/2) & |r| > \beta \end{cases} + \text{const.}

    Λ is the Fisher information ``E[(∂ log p/∂z)²] = (s/β) P(|r| ≤ β)``, the same for every output,
    and not the second derivative, which depends on the target and is zero beyond β. With β = 0
    this is the Laplace distribution, with Λ = s².

    Args:
        threshold: β ≥ 0, in units of the output; 0 for absolute errors.
        slope: s > 0, of large errors.
        reduce_outputs: "sum" or "mean" over the C outputs of a sample. ``nn.L1Loss()`` is
            ``Huber(0.0, reduce_outputs="mean")``, ``nn.SmoothL1Loss(beta)`` has the threshold beta
            and ``nn.HuberLoss(delta)`` threshold and slope delta. None (default) is "sum" until an
            optimizer sees a loss that averages over outputs.
        reduction: How the user's loss reduces over samples, "mean" (default) or "sum".

    Raises:
        ValueError: If the threshold is negative, the slope is not positive, or either is not
            finite, or an option is unknown.

    Source: Huber, Robust estimation of a location parameter (1964).
    """

    threshold: float = 1.0
    slope: float = 1.0
    reduce_outputs: ReduceOutputs = None
    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < math.inf:
            raise ValueError(f"threshold must be finite and not negative, got {self.threshold}.")
        if not 0 < self.slope < math.inf:
            raise ValueError(f"slope must be positive and finite but is {self.slope}.")
        super().__post_init__()

    @cached_property
    def _small(self) -> float:
        """The probability of an error up to the threshold."""
        half = self.slope * self.threshold / 2
        inside = math.sqrt(4 * math.pi * half) * math.erf(math.sqrt(half))  # Times the slope.
        return inside / (inside + 2 * math.exp(-half))

    def _is_foreign(self, output: Tensor, cotangent: Tensor) -> bool:
        """Return False: errors that are all large, and to one side, have one gradient."""
        return False

    def _nll(self, output: Tensor, target: Tensor) -> Tensor:
        size = (output - target).abs()
        large = self.slope * (size - self.threshold / 2)
        if self.threshold == 0:
            return large
        small = size.square() * (self.slope / (2 * self.threshold))
        return torch.where(size <= self.threshold, small, large)

    def _gradient(self, output: Tensor, target: Tensor) -> Tensor:
        error = output - target
        if self.threshold == 0:
            return self.slope * error.sign()
        return self.slope * (error / self.threshold).clamp(-1.0, 1.0)

    def _hessian(self, output: Tensor) -> Tensor:
        if self.threshold == 0:
            return torch.full_like(output, self.slope**2)
        return torch.full_like(output, self.slope / self.threshold * self._small)

    def _sample(self, output: Tensor, generator: torch.Generator | None) -> Tensor:
        # One number a draw: quantiles, from the middle to either side.
        place = 2 * random_like(output, generator, "uniform") - 1
        size, half = place.abs(), self.slope * self.threshold / 2
        tail = ((1 - size) / (1 - self._small)).clamp(min=torch.finfo(place.dtype).tiny)
        error = self.threshold - tail.log() / self.slope
        if self.threshold > 0:
            share = (size / self._small).clamp(max=1.0) * math.erf(math.sqrt(half))
            small = math.sqrt(2 * self.threshold / self.slope) * torch.erfinv(share)
            error = torch.where(size <= self._small, small, error)
        return output + error.copysign(place)
