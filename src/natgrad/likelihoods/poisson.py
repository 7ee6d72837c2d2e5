"""Poisson likelihood of counts, with the logarithm of the rate as output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from natgrad.likelihoods.base import Likelihood, Reduction, full_precision
from natgrad.likelihoods.elementwise import NOT_NEGATIVE, Elementwise, ReduceOutputs
from natgrad.likelihoods.poisson_rates import PoissonRates, drawn_counts, hold_rates

#: Mean of squared residuals, in the variance of counts, that says of outputs that they are no
#: logarithms of rates, and the least one that says of them that they are rates.
NO_COUNTS, COUNTS = 1e-4, 1e-3


@dataclass(frozen=True, repr=False)
class Poisson(Elementwise):
    """y ~ Poisson(exp z) for every output: nll = exp(z) − y z, Λ = diag(exp z).

    Where an optimizer sees the gradient of counts at their rates, the likelihood becomes
    :class:`natgrad.likelihoods.PoissonRates`; with a sentence, where it sees that outputs are no
    logarithms and may be rates, as those of a negative binomial are.

    Args:
        reduce_outputs: "sum" or "mean" over the C outputs of a sample; ``nn.PoissonNLLLoss()`` is
            ``Poisson("mean")``. None (default) is "sum" until an optimizer sees a loss that
            averages over outputs.
        reduction: How the user's loss reduces over samples, "mean" (default) or "sum".

    Raises:
        ValueError: If an option is unknown.

    Source: McCullagh and Nelder, Generalized Linear Models (1989), ch. 6.
    """

    reduce_outputs: ReduceOutputs = None
    reduction: Reduction = "mean"
    bounds: ClassVar[tuple[float, float, str]] = NOT_NEGATIVE

    @full_precision
    def seen_with(
        self, output: Tensor, cotangent: Tensor, target: Any = None
    ) -> tuple[Likelihood, list[str]]:
        """Decide on the reduction, and whether outputs are rates; see the base class."""
        told = self._tells_average(output, cotangent, None)
        if told is None and hold_rates(output, cotangent):
            found = PoissonRates(self.reduce_outputs, self.reduction)
            return found.seen_with(output, cotangent, target)
        if told is None and _seem_rates(output, cotangent):
            rates = PoissonRates(self.reduce_outputs, self.reduction)
            decided, said = rates.seen_with(output, cotangent, target)
            sentence = (
                "the outputs look like rates of counts, not like their logarithms, beside whose "
                f"exponentials the gradient of the loss is nothing, so the Fisher matrix of "
                f"{decided!r} is taken: say what they are by likelihood=..."
            )
            return decided, [sentence, *said]
        return super().seen_with(output, cotangent, target)

    def decided(self, decision: Any) -> Likelihood:
        """Return the likelihood with a :attr:`decision` that was made before."""
        if isinstance(decision, (tuple, list)):
            return PoissonRates(self.reduce_outputs, self.reduction).decided(decision)
        return super().decided(decision)

    def _tells_average(self, output: Tensor, cotangent: Tensor, target: Any) -> bool | None:
        """Return by which factor the gradient is that of counts."""
        if target is not None:
            return super()._tells_average(output, cotangent, target)
        rate, tolerance = output.exp(), 64 * torch.finfo(cotangent.dtype).eps
        found = []
        for factor in (output.numel(), len(output)):
            counts = rate - cotangent.to(output.dtype) * factor
            error = (counts - counts.round().clamp_min(0)).abs()
            found.append(bool((error <= tolerance * factor * (1 + rate)).all()))
        averages, sums = found
        return averages if averages != sums else None

    def _looks_average(self, output: Tensor, cotangent: Tensor) -> bool:
        """Return whether targets of a mean would not be negative."""
        rate = output.exp()
        targets = rate - cotangent.to(output.dtype) * output.numel()
        return bool((targets >= -16 * torch.finfo(cotangent.dtype).eps * (1 + rate)).all())

    def _nll(self, output: Tensor, target: Tensor) -> Tensor:
        return output.exp() - target * output

    def _gradient(self, output: Tensor, target: Tensor) -> Tensor:
        return output.exp() - target

    def _hessian(self, output: Tensor) -> Tensor:
        return output.exp()

    def _deviance(self, output: Tensor, residual: Tensor) -> Tensor:
        target = (output.exp() - residual).clamp_min(0.0)
        return 2 * (torch.xlogy(target, target) - target * output + residual)

    def _sample(self, output: Tensor, generator: torch.Generator | None) -> Tensor:
        return drawn_counts(output, generator, torch.exp)


def _seem_rates(output: Tensor, cotangent: Tensor) -> bool:
    """Return whether outputs are no logarithms of rates, but may be rates.

    Squared residuals of counts are about their variance: at logarithms z of the rates those of the
    loss are ``exp(z)`` or more, at rates z those of the logarithm are ``1/z``. The largest quarter
    of outputs tells.
    """
    if output.numel() < 16 or not bool((output >= 0).all()):
        return False
    z, gradient = output.flatten().double(), cotangent.flatten().double() * output.numel()
    largest = z.topk(len(z) // 4).indices
    z, square = z[largest], gradient[largest].square()
    logarithms, rates = (square * (-z).exp()).mean(), (square * z).mean()
    return bool((logarithms < NO_COUNTS) & (rates > COUNTS))
