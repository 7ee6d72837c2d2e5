"""Poisson likelihood of counts, with the rate itself as output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from natgrad.distributed.replicas import drawn
from natgrad.likelihoods.base import Reduction
from natgrad.likelihoods.elementwise import NOT_NEGATIVE, ReduceOutputs
from natgrad.likelihoods.mean_outputs import MeanOutputs

#: Least rate, as torch's loss has it.
LEAST_RATE = 1e-8


@dataclass(frozen=True, repr=False)
class PoissonRates(MeanOutputs):
    """y ~ Poisson(z) for every output z: nll = z − y log z, Λ = diag(1/z).

    For models that end in ``exp``, a softplus or a ReLU, with ``log_input=False``. The Fisher
    matrix is that of :class:`natgrad.Poisson` at the logarithms of the rates.

    Args:
        reduce_outputs: "sum" or "mean" over the C outputs of a sample;
            ``nn.PoissonNLLLoss(log_input=False)`` is ``PoissonRates("mean")``. None (default) is
            "sum" until an optimizer sees a loss that averages over outputs.
        reduction: How the user's loss reduces over samples, "mean" (default) or "sum".

    Raises:
        ValueError: If an option is unknown.

    Source: McCullagh and Nelder, Generalized Linear Models (1989), ch. 6.
    """

    reduce_outputs: ReduceOutputs = None
    reduction: Reduction = "mean"

    bounds: ClassVar[tuple[float, float, str]] = NOT_NEGATIVE
    outputs: ClassVar[str] = "rates"
    fault: ClassVar[str] = "is at outputs that are no rates, as some are negative"

    def _is_mean(self, output: Tensor) -> Tensor:
        return ~(output < 0)

    def _sure_scale(self, output: Tensor, cotangent: Tensor) -> float | None:
        return scale_of_counts(output, cotangent)

    def _shown_scale(self, output: Tensor, cotangent: Tensor, usual: Tensor) -> Tensor:
        scale = scale_of_counts(output, cotangent)
        return usual if scale is None else usual.new_full((), scale / self._scale(output))

    def _nll(self, output: Tensor, target: Tensor) -> Tensor:
        return output - target * output.clamp_min(LEAST_RATE).log()

    def _gradient(self, output: Tensor, target: Tensor) -> Tensor:
        return 1 - target / output.clamp_min(LEAST_RATE)

    def _hessian(self, output: Tensor) -> Tensor:
        return output.clamp_min(LEAST_RATE).reciprocal()

    def _fitted(self, output: Tensor, cotangent: Tensor) -> Tensor:
        return output <= 0

    def _deviance(self, output: Tensor, residual: Tensor) -> Tensor:
        rate = output.clamp_min(LEAST_RATE)
        target = (rate * (1 - residual)).clamp_min(0.0)
        return 2 * (torch.xlogy(target, target / rate) - target + rate)

    def _sample(self, output: Tensor, generator: torch.Generator | None) -> Tensor:
        return drawn_counts(output, generator, lambda rates: rates.clamp_min(LEAST_RATE))


def scale_of_counts(output: Tensor, cotangent: Tensor) -> float | None:
    """Return the scale c of a gradient c (1 − y/z) of rates z that is one of counts y, surely.

    A count of zero has a gradient of exactly c, and all others less.

    Args:
        output: Rates z.
        cotangent: Gradient of the loss at them.

    Returns:
        c, or None where targets are no counts for any c that may be: the largest gradient, or that
        of a sum, or of a mean over samples or entries.
    """
    cotangent = cotangent.to(output.dtype)
    largest = float(cotangent.max()) if cotangent.numel() else 0.0
    eps = torch.finfo(cotangent.dtype).eps
    for scale in (largest, 1.0, 1 / len(output), 1 / max(1, output.numel())):
        if scale <= 0 or largest > scale * (1 + 16 * eps):
            continue
        present = cotangent != 0
        counts = output * (1 - cotangent / scale)
        error = (counts - counts.round()).abs()[present]
        several = counts.round()[present].unique().numel() > 1
        if several and bool((error <= 256 * eps * (1 + output[present])).all()):
            return scale
    return None


def hold_rates(output: Tensor, cotangent: Tensor) -> bool:
    """Return whether a gradient is that of counts at their rates, surely."""
    if output.numel() < 4 or not bool((output >= 0).all()):
        return False
    return scale_of_counts(output, cotangent) is not None


def drawn_counts(
    output: Tensor, generator: torch.Generator | None, rates: Callable[[Tensor], Tensor]
) -> Tensor:
    """Draw counts at rates, a function of the output; each depends on its place in the batch."""
    exact = torch.float32 if output.device.type == "mps" else torch.float64
    numbers = drawn(
        Tensor.uniform_, output.shape, generator, dim=1, dtype=exact, device=output.device
    )  # One a draw, whatever the rate.
    return counts_at(numbers, rates(output.to(exact))).to(output.dtype)


def counts_at(numbers: Tensor, rates: Tensor) -> Tensor:
    """Return the least counts whose cumulative probability exceeds some numbers in [0, 1).

    Quantiles of the normal distribution, corrected for the skewness (Cornish & Fisher 1938), are
    less than 12 above and 4 below; four halvings of what they leave find the counts exactly.
    Numbers below 1e-16, which count as that, do not come up.
    """
    z = torch.special.ndtri(numbers).clamp(-8.2, 8.2)
    about = rates + rates.sqrt() * z + (z.square() - 1) / 6
    below = torch.where(z < 0, torch.minimum(about, rates), about).floor() - 12
    for step in (8.0, 4.0, 2.0, 1.0):
        middle = below + step
        known = torch.special.gammaincc(middle.clamp(min=0.0) + 1, rates)
        below = torch.where((middle < 0) | (known <= numbers), middle, below)
    return (below + 1).clamp(min=0.0)
