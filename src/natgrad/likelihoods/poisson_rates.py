"""Poisson likelihood of counts, with the rate itself as output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from natgrad.distributed.place import drawn
from natgrad.likelihoods.base import Reduction
from natgrad.likelihoods.elementwise import ReduceOutputs
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
        from natgrad.likelihoods.poisson import counts_at  # It knows these rates, too.

        exact = torch.float32 if output.device.type == "mps" else torch.float64
        numbers = drawn(
            Tensor.uniform_, output.shape, generator, dim=1, dtype=exact, device=output.device
        )
        return counts_at(numbers, output.to(exact).clamp_min(LEAST_RATE)).to(output.dtype)

    def _checked(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        target, missing = super()._checked(output, target)
        if target.device.type == "cpu" and not bool((target >= 0).all()):
            raise ValueError("PoissonRates needs targets that are counts, not negative numbers.")
        return target, missing


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
