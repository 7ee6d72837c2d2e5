"""Bernoulli likelihood of outputs that are probabilities: binary cross-entropy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from natgrad.likelihoods.base import Reduction, per_sample
from natgrad.likelihoods.elementwise import UNIT_INTERVAL, ReduceOutputs, random_like
from natgrad.likelihoods.mean_outputs import MeanOutputs

#: Least variance of a label, as torch's gradient has it: that of a saturated sigmoid is 0.
LEAST_VARIANCE = 1e-12

#: Least number of outputs that tell what the gradient in an area is a function of,
AREA = 64

#: and about how many are looked at.
LOOKED_AT = 1024

#: Share of labels that must be hard for the gradient to tell its scale.
MANIFEST = 0.1


@dataclass(frozen=True, repr=False)
class BinaryProbabilities(MeanOutputs):
    """y ~ Bernoulli(p) for every output p: nll = −y log p − (1 − y) log(1 − p), Λ = 1/(p(1 − p)).

    For models that end in a sigmoid. The Fisher matrix is that of :class:`natgrad.Bernoulli` at the
    logits behind it, but for the "improved" one, which normalises gradients at the outputs. Targets
    may be soft, in [0, 1].

    Args:
        reduce_outputs: "sum" or "mean" over the C outputs of a sample; ``nn.BCELoss()`` is
            ``BinaryProbabilities("mean")``. None (default) is "sum" until an optimizer sees a loss
            that averages over outputs.
        reduction: How the user's loss reduces over samples, "mean" (default) or "sum".

    Raises:
        ValueError: If an option is unknown.
    """

    reduce_outputs: ReduceOutputs = None
    reduction: Reduction = "mean"

    bounds: ClassVar[tuple[float, float, str]] = UNIT_INTERVAL
    outputs: ClassVar[str] = "probabilities"
    fault: ClassVar[str] = (
        "is at outputs that are no probabilities, as they are not between 0 and 1"
    )

    def _is_mean(self, output: Tensor) -> Tensor:
        return ~((output < 0) | (output > 1))

    def _sure_scale(self, output: Tensor, cotangent: Tensor) -> float | None:
        _, sure, scale = hard_labels(output, cotangent)
        return float(scale) if bool(sure) else None

    def _shown_scale(self, output: Tensor, cotangent: Tensor, usual: Tensor) -> Tensor:
        _, sure, scale = hard_labels(output, cotangent)
        return torch.where(sure, scale / self._scale(output), usual)

    def _nll(self, output: Tensor, target: Tensor) -> Tensor:
        return functional.binary_cross_entropy(output.clamp(0.0, 1.0), target, reduction="none")

    def _gradient(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - target) / _variance(output)

    def _hessian(self, output: Tensor) -> Tensor:
        return _variance(output).reciprocal()

    def _fitted(self, output: Tensor, cotangent: Tensor) -> Tensor:
        return (output <= 0) | (output >= 1)

    def _deviance(self, output: Tensor, residual: Tensor) -> Tensor:
        label = (output - residual * _variance(output)).clamp(0.0, 1.0)
        least = -torch.xlogy(label, label) - torch.xlogy(1 - label, 1 - label)
        return 2 * (self._nll(output, label) - least)

    def _sample(self, output: Tensor, generator: torch.Generator | None) -> Tensor:
        return (random_like(output, generator, "uniform") < output).to(output.dtype)


def hard_labels(
    output: Tensor, cotangent: Tensor, logits: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the share of outputs whose labels are 0 or 1, whether it is sure, and the scale.

    A gradient c(p − y)/(p(1 − p)) asks for a c of at least its size times 1 − p, or p, with y in
    [0, 1], and hard labels all ask for the same. Some of them, or all, must.

    Args:
        output: Probabilities, or logits.
        cotangent: Gradient of the loss at them.
        logits: Whether they are logits, whose gradient is c(p − y).
    """
    tolerance = max(1e-3, 4 * torch.finfo(cotangent.dtype).eps)
    cotangent = cotangent.to(output.dtype)
    if logits:
        least = cotangent / torch.where(cotangent > 0, output.sigmoid(), -(-output).sigmoid())
    else:
        least = cotangent * torch.where(cotangent > 0, 1 - output, -output)
    least = torch.where(cotangent == 0, 0, least)
    scale = least.max()
    number = ((least >= (1 - tolerance) * scale) & (cotangent != 0)).sum()
    share = number / (cotangent != 0).sum().clamp_min(1)
    sure = (share >= MANIFEST) & (number >= 4) | (share == 1) & (number >= 2)
    return share, sure & scale.isfinite(), scale


def hold_probabilities(output: Tensor, cotangent: Tensor) -> bool:
    """Return whether a gradient is that of a binary cross-entropy of probabilities, surely."""
    share, sure, _ = hard_labels(output, cotangent)
    other, *_ = hard_labels(output, cotangent, logits=True)
    between = ((output >= 0) & (output <= 1)).all()
    return bool(between & sure & (share > 2 * other))


def shows_overlaps(output: Tensor, cotangent: Tensor) -> bool:
    """Return whether a gradient at logits is that of overlaps, as of Dice, Jaccard or Tversky.

    In every channel of every sample it is ``p(1 − p)(β_y + γp) + α(p − y)`` of an output with label
    y, by its sign: overlaps are functions of sums over areas, and α is of a cross-entropy beside
    them. One number for each sign (absolute errors), and ``a + bz`` for both (squares), must not
    explain as much.
    """
    channels = output.dim() > 2 and output[0, 0].numel() >= AREA
    z = per_sample(output.flatten(0, 1) if channels else output)
    if z.shape[1] < AREA:
        return False
    step = max(1, z.shape[1] // LOOKED_AT)
    g = cotangent.reshape(z.shape)[:, ::step].double()
    z = z[:, ::step].double()
    if not bool(z.isfinite().all()):
        return False
    p, y = z.sigmoid(), (g < 0).double()
    variance = p * (1 - p)

    def unexplained(*terms: Tensor) -> Tensor:
        columns = torch.stack(terms, -1) * (g != 0).unsqueeze(-1)
        found: Tensor = columns @ (torch.linalg.pinv(columns) @ g.unsqueeze(-1))
        return (g - found.squeeze(-1)).square().sum()

    left = unexplained(variance * y, variance * (1 - y), variance * p, p - y)
    others = torch.minimum(unexplained(y, 1 - y), unexplained(torch.ones_like(z), z))
    size, eps = g.square().sum(), torch.finfo(cotangent.dtype).eps
    told = others > 100 * torch.maximum(left, eps**2 * size)
    both = (g > 0).any() & (g < 0).any()
    return bool(both & told & (left < max(1e-4, 4 * eps) ** 2 * size))


def _variance(output: Tensor) -> Tensor:
    return (output * (1 - output)).clamp_min(LEAST_VARIANCE)
