"""Bernoulli likelihood: binary cross-entropy with logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from natgrad.likelihoods.base import (
    Likelihood,
    Reduction,
    full_precision,
    per_sample,
    positive_ratio,
)
from natgrad.likelihoods.binary_probabilities import (
    BinaryProbabilities,
    hard_labels,
    hold_probabilities,
)
from natgrad.likelihoods.elementwise import (
    UNIT_INTERVAL,
    Elementwise,
    ReduceOutputs,
    alike,
    plausible_scale,
    random_like,
)
from natgrad.linalg import constant


@dataclass(frozen=True, repr=False)
class Bernoulli(Elementwise):
    """y ~ Bernoulli(σ(z)) for every output: nll = softplus(z) − y z, Λ = diag(σ(z) σ(−z)).

    Targets may be soft, in [0, 1]. Where an optimizer sees the gradient of a loss of probabilities,
    the likelihood becomes :class:`natgrad.likelihoods.BinaryProbabilities`.

    Args:
        reduce_outputs: "sum" or "mean" over the C outputs of a sample; ``nn.BCEWithLogitsLoss()``
            is ``Bernoulli("mean")``. None (default) is "sum" until an optimizer sees a loss that
            averages over outputs.
        reduction: How the user's loss reduces over samples, "mean" (default) or "sum".
        positive_weights: What the losses of labels 1 are multiplied by, a number or one for each
            output, as ``pos_weight`` of ``nn.BCEWithLogitsLoss``; kept as tuples. Without a target
            the gradient shows which labels these are. None (default) for no weights.

    Raises:
        ValueError: If an option is unknown, or a weight is negative or not finite.

    Source: Martens, New insights and perspectives on the natural gradient method (2020), §9.
    """

    reduce_outputs: ReduceOutputs = None
    reduction: Reduction = "mean"
    positive_weights: Any = None
    bounds: ClassVar[tuple[float, float, str]] = UNIT_INTERVAL

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positive_weights is not None:
            weights = torch.as_tensor(self.positive_weights, dtype=torch.float64, device="cpu")
            if not bool((weights.isfinite() & (weights >= 0)).all()):
                raise ValueError("positive_weights must be finite numbers that are not negative.")
            object.__setattr__(self, "positive_weights", _as_tuples(weights.tolist()))

    @property
    def _weighs_labels(self) -> bool:
        return self.positive_weights is not None

    def _label_weights(self, output: Tensor, target: Tensor) -> Tensor | float:
        weights = self._positive(output)
        return 1.0 if weights is None else 1 + (weights - 1) * target

    def _positive(self, output: Tensor) -> Tensor | None:
        """Return the weights of labels 1."""
        return None if self.positive_weights is None else constant(self.positive_weights, output)

    def _weighted_nll(self, output: Tensor, target: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(
            output, target, pos_weight=self._positive(output), reduction="none"
        )

    def _weighted_gradient(self, output: Tensor, target: Tensor) -> Tensor:
        weights = self._positive(output)
        ones = target if weights is None else weights * target
        return (1 - target) * torch.sigmoid(output) - ones * torch.sigmoid(-output)

    def _unweighted(self, output: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        """Return a gradient without the weights of labels, which its signs tell, and these."""
        weights = self._label_weights(output, (cotangent < 0).to(output.dtype))
        assert isinstance(weights, Tensor)
        return torch.where(weights > 0, cotangent / weights, 0.0).to(cotangent.dtype), weights

    @full_precision
    def infer_event_weights(
        self, output: Tensor, cotangent: Tensor, target: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Read masks and weights off the gradient, those of labels, too; see the base class."""
        if not self._weighs_labels or target is not None:
            return super().infer_event_weights(output, cotangent, target)
        self._check_cotangent(output, cotangent)
        cotangent, labels = self._unweighted(output, cotangent)
        weights, scale = super().infer_event_weights(output, cotangent)
        return alike(per_sample(self.spread(weights, output) * labels)), scale

    def seen_count(self, output: Tensor, weights: Tensor, target: Tensor | None = None) -> Tensor:
        """Return the count behind event weights, in which labels count alike."""
        if self._weighs_labels:
            weights = (weights != 0).to(weights.dtype)
        return super().seen_count(output, weights, target)

    def _shown_scale(self, output: Tensor, cotangent: Tensor, usual: Tensor) -> Tensor:
        scale, hard = self._hard_scale(output, cotangent, usual)
        return torch.where(hard, scale, usual)

    def _hard_scale(
        self, output: Tensor, cotangent: Tensor, usual: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the scale of the loss if all labels are hard, or surely some, and whether so."""
        cotangent = cotangent.to(output.dtype)
        gradient = self._gradient(output, (cotangent < 0).to(output.dtype)) * self._scale(output)
        gradient = torch.where(cotangent == 0, 0, gradient)
        scale = positive_ratio(cotangent.abs().sum(), gradient.abs().sum(), usual)
        hard = (cotangent - scale * gradient).abs().sum() <= 0.05 * cotangent.abs().sum()
        _, some, least = hard_labels(output, cotangent, logits=True)
        return torch.where(hard, scale, least / self._scale(output)), hard | some

    @full_precision
    def seen_with(
        self, output: Tensor, cotangent: Tensor, target: Any = None
    ) -> tuple[Likelihood, list[str]]:
        """Decide on the reduction, and whether outputs are probabilities; see the base class."""
        if self._weighs_labels:
            if target is None:
                cotangent, _ = self._unweighted(output, cotangent)
        elif hold_probabilities(output, cotangent):
            found = BinaryProbabilities(self.reduce_outputs, self.reduction)
            return found.seen_with(output, cotangent, target)
        return super().seen_with(output, cotangent, target)

    @property
    def decision(self) -> Any:
        """That outputs are logits, and what the losses of a sample's are reduced to."""
        return "logits", self.reduce_outputs

    def decided(self, decision: Any) -> Likelihood:
        """Return the likelihood with a :attr:`decision` that was made before."""
        if isinstance(decision, (tuple, list)):
            if decision[0] == "logits":
                return super().decided(decision[1])
            return BinaryProbabilities(self.reduce_outputs, self.reduction).decided(decision)
        return super().decided(decision)

    def _tells_average(self, output: Tensor, cotangent: Tensor, target: Any) -> bool | None:
        if target is not None:
            return super()._tells_average(output, cotangent, target)
        scale, hard = self._hard_scale(output, cotangent, output.new_ones(()))
        if not bool(hard):
            return None
        weights, _ = super().infer_event_weights(output, cotangent)
        count = float(self.seen_count(output, weights))
        entries = float(weights.sum()) if weights.dim() == 3 else count * output[0].numel()
        summed, averaged = float(scale) * count, float(scale) * entries
        return plausible_scale(averaged, len(output)) < plausible_scale(summed, len(output))

    def _looks_average(self, output: Tensor, cotangent: Tensor) -> bool:
        """Return whether a mean is likelier than a sum, by labels between 0 and 1 or errors.

        Losses that are none of labels, as of overlaps, have gradients of the size of errors all the
        same: those of a model that is not trained yet, far above 1/C.
        """
        predicted = torch.sigmoid(output)
        errors = cotangent.to(output.dtype) * output.numel()
        labels, tolerance = predicted - errors, 16 * torch.finfo(cotangent.dtype).eps
        between = (labels >= -tolerance).all() & (labels <= 1 + tolerance).all()
        factor = 2.0**-16 if cotangent.dtype == torch.float16 else 1.0  # Of scaled losses.
        sizes = predicted * (1 - predicted)  # Of errors on average, where labels are as predicted.
        small = errors.abs().mean() * factor < 2 * sizes.mean() * output[0].numel() ** 0.5
        return bool(between | small)

    def _fitted(self, output: Tensor, cotangent: Tensor) -> Tensor:
        info = torch.finfo(cotangent.dtype)
        scale, _ = self._hard_scale(output, cotangent, cotangent.new_ones((), dtype=output.dtype))
        smallest = info.smallest_normal * info.eps / (scale * self._scale(output))
        return self._hessian(output) <= 4 * smallest.clamp_min(info.eps)

    def _nll(self, output: Tensor, target: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(output, target, reduction="none")

    def _gradient(self, output: Tensor, target: Tensor) -> Tensor:
        return (1 - target) * torch.sigmoid(output) - target * torch.sigmoid(-output)

    def _hessian(self, output: Tensor) -> Tensor:
        return torch.sigmoid(output) * torch.sigmoid(-output)

    def _deviance(self, output: Tensor, residual: Tensor) -> Tensor:
        label = (torch.sigmoid(output) - residual).clamp(0.0, 1.0)
        least = -torch.xlogy(label, label) - torch.xlogy(1 - label, 1 - label)
        return 2 * (self._nll(output, label) - least)

    def _sample(self, output: Tensor, generator: torch.Generator | None) -> Tensor:
        return (random_like(output, generator, "uniform") < torch.sigmoid(output)).to(output.dtype)


def _as_tuples(value: Any) -> Any:
    """Return nested lists as tuples, which can be compared and hashed."""
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value
