"""What data say at the trained parameters: sums over data points."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from natgrad.likelihoods import Gaussian, Likelihood
from natgrad.likelihoods.heads import JoinedHeads


@dataclass(frozen=True)
class Observations:
    """Sums over data points; those of two data sets add.

    Attributes:
        count: N, the number of data points.
        loss: Sum of their losses.
        normalizer: Part of ``log p(D | θ*)`` beside the losses that depends on Gaussian noise,
            ``−Σ log σ``.
        observed: Number of outputs with Gaussian noise that have a target.
    """

    count: float = 0.0
    loss: float = 0.0
    normalizer: float = 0.0
    observed: float = 0.0

    @classmethod
    def of(cls, likelihood: Likelihood, output: Tensor, target: Any) -> Observations:
        """Return what a batch of outputs ``(N, …)`` and targets says."""
        count = float(likelihood.count(output, target)) if output.numel() else 0.0
        if not count > 0:
            return cls()
        loss = float(likelihood.loss(output, target)) * count
        normalizer, observed = log_normalizer(likelihood, output, target)
        return cls(count, loss, normalizer, observed)

    def __add__(self, other: Observations) -> Observations:
        """Return the sums over both."""
        names = [field.name for field in fields(self)]
        return Observations(*(getattr(self, name) + getattr(other, name) for name in names))

    def log_likelihood(self, noise: Any = 1.0) -> Any:
        """Return ``log p(D | θ*)``, up to constants; noise is in units of that of the losses."""
        logarithm = noise.log() if isinstance(noise, Tensor) else math.log(noise)
        return self.normalizer - self.loss / noise - 0.5 * self.observed * logarithm


def log_normalizer(likelihood: Likelihood, output: Tensor, target: Any) -> tuple[float, float]:
    """Return ``−Σ log σ`` over outputs with Gaussian noise that have a target, and their number."""
    if isinstance(likelihood, JoinedHeads):
        heads = zip(
            likelihood.parts, likelihood.pieces(output), likelihood.targets(target), strict=True
        )
        total = number = 0.0
        for part, z, y in heads:
            count = float(part.count(z, y))
            if count > 0:  # Losses of heads are means over their own events, times N.
                found = log_normalizer(part, z, y)
                total += found[0] * len(output) / count
                number += found[1] * len(output) / count
        return total, number
    if not isinstance(likelihood, Gaussian):
        return 0.0, 0.0
    precision = likelihood.output_hessian(output).diagonal(dim1=2, dim2=3)
    weights = likelihood.event_weights(output, target).to(precision)
    weights = weights if weights.dim() == 3 else weights.unsqueeze(-1)
    return float((weights * precision.log()).sum() / 2), float(weights.expand_as(precision).sum())
