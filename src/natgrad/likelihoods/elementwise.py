"""Likelihoods whose outputs are independent given z: Λ is diagonal."""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from natgrad.distributed.replicas import drawn
from natgrad.likelihoods.base import (
    FOREIGN,
    Likelihood,
    full_precision,
    per_sample,
    positive_ratio,
    root_floor,
)

ReduceOutputs = Literal["sum", "mean"] | None

UNIT_INTERVAL = 0.0, 1.0, "between 0 and 1"
NOT_NEGATIVE = 0.0, math.inf, "that are counts, not negative numbers"

#: From so many outputs per sample on, their sum and their mean are told apart without a target.
MANY = 16


class Elementwise(Likelihood):
    """A product of one-dimensional likelihoods over all outputs of a sample; a sample is one event.

    Subclasses define the four functions of one output; this class adds shapes and scaling.

    Entries that are missing, NaN in a target, leave the loss, the Fisher matrix and the count, as
    ignored labels do: with "sum" the count is the number of samples with any entry left, with
    "mean" that of the entries left, divided by C.

    Attributes:
        reduce_outputs: "sum" adds the outputs' negative log-likelihoods, "mean" divides the sum by
            the number C of outputs per sample, as torch's mean-reduced losses do; Λ is then divided
            by C too. None (default) is "sum" until an optimizer sees a loss that averages over
            outputs, and then what :meth:`averaging` returns.
    """

    reduce_outputs: ReduceOutputs = None
    least_dimensions: ClassVar[int] = 1
    #: Between which numbers targets must lie, and how that is said.
    bounds: ClassVar[tuple[float, float, str] | None] = None

    def averaging(self) -> Elementwise:
        """Return the likelihood of torch's own loss that averages over outputs."""
        return cast(Elementwise, dataclasses.replace(cast(Any, self), reduce_outputs="mean"))

    @property
    def decision(self) -> Any:
        """What the losses of a sample's outputs are reduced to: "sum", "mean" or None."""
        return self.reduce_outputs

    @property
    def undecided(self) -> bool:
        """Whether the loss may average over outputs."""
        return self.reduce_outputs is None and self.reduction == "mean"

    def decided(self, decision: Any) -> Likelihood:
        """Return the likelihood with a reduction over outputs, if it has none of its own."""
        if self.reduce_outputs is not None or decision is None:
            return self
        return self.averaging() if decision == "mean" else self._summing()

    def _summing(self) -> Elementwise:
        return cast(Elementwise, dataclasses.replace(cast(Any, self), reduce_outputs="sum"))

    @full_precision
    def seen_with(
        self, output: Tensor, cotangent: Tensor, target: Any = None
    ) -> tuple[Likelihood, list[str]]:
        """Decide between the sum and the mean over outputs; see the base class.

        With a target, hard labels or counts the gradient tells. Else it is held against what is to
        be expected of a model that is not trained yet, and the sentence says so.
        """
        said = []
        if self._is_foreign(output, cotangent):
            said.append(FOREIGN.format(fault="is the same at every output", name=self))
        told = cotangent.any() & cotangent.isfinite().all()
        if not self.undecided or not bool(told):
            return self, said
        size, summing = output[0].numel(), self._summing()
        if size == 1:
            return summing, said
        averages = summing._tells_average(output, cotangent, target)
        if averages is None:
            averages = not said and size >= MANY and summing._looks_average(output, cotangent)
            if averages:
                found = self.averaging()
                said.append(
                    f"the gradient of the loss looks like that of a mean over the {size} outputs "
                    f"of a sample, as torch's losses take it, so the Fisher matrix is that of "
                    f"{found!r}; if the loss sums over outputs, pass {summing!r}"
                )
        return self.averaging() if averages else summing, said

    def _is_foreign(self, output: Tensor, cotangent: Tensor) -> bool:
        """Return whether a gradient is one number where that of any target would differ."""
        if output.numel() < 4:
            return False
        largest = cotangent.abs().max()
        constant = cotangent.max() - cotangent.min() <= 1e-6 * largest
        base = self._gradient(output, torch.zeros_like(output))
        rounding = max(1e-3, 4 * torch.finfo(cotangent.dtype).eps)
        varies = base.max() - base.min() > rounding * base.abs().max()
        return bool(constant & varies & (largest > 0))

    def _tells_average(self, output: Tensor, cotangent: Tensor, target: Any) -> bool | None:
        """Return whether a gradient is certainly that of a mean over outputs; None if unclear."""
        if target is None:
            return None
        weights, scale = self.infer_event_weights(output, cotangent, target)
        count = float(self.seen_count(output, weights, target))
        return count > 0 and float(scale) * count * output[0].numel() ** 0.5 < 1

    def _looks_average(self, output: Tensor, cotangent: Tensor) -> bool:
        """Return whether a mean over outputs is the better explanation of a gradient."""
        return False

    @abstractmethod
    def _nll(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the negative log-likelihood of every output, elementwise."""

    @abstractmethod
    def _gradient(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the derivative of :meth:`_nll` with respect to the output, elementwise."""

    @abstractmethod
    def _hessian(self, output: Tensor) -> Tensor:
        """Return the second derivative of :meth:`_nll`, elementwise (independent of the target)."""

    @property
    def _weighs_labels(self) -> bool:
        """Whether the loss of an output is multiplied by a weight of its label."""
        return False

    def _label_weights(self, output: Tensor, target: Tensor) -> Tensor | float:
        """Return the weights of the labels of every output."""
        return 1.0

    def _weighted_nll(self, output: Tensor, target: Tensor) -> Tensor:
        """Return :meth:`_nll` with the weights of labels, which soft ones have in part."""
        return self._nll(output, target)

    def _weighted_gradient(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the derivative of :meth:`_weighted_nll`."""
        return self._gradient(output, target)

    def _deviance(self, output: Tensor, residual: Tensor) -> Tensor:
        """Return twice what every output's nll is above its least, by its gradient; ∞ if unknown.

        That of a Gaussian is what bounds it anyway.
        """
        return torch.full_like(residual, math.inf)

    @abstractmethod
    def _sample(self, output: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw a target for every output."""

    def __post_init__(self) -> None:
        self._check_reduction()
        if self.reduce_outputs not in ("sum", "mean", None):
            raise ValueError(
                f"reduce_outputs must be 'sum', 'mean' or None but is {self.reduce_outputs!r}."
            )

    @full_precision
    def nll(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the negative log-likelihood of each sample, (N,); see the base class."""
        target, missing = self._checked(output, target)
        values = self._weighted_nll(output, target).masked_fill(missing, 0)
        return per_sample(values).sum(1) * self._scale(output)

    @full_precision
    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return ``Σ nll / count``, a scalar differentiable in the output."""
        return self.nll(output, target).sum() / self.count(output, target)

    @full_precision
    def gradient(self, output: Tensor, target: Tensor) -> Tensor:
        """Return ``∂nll/∂z``, of the output's shape; see the base class."""
        target, missing = self._checked(output, target)
        found = self._weighted_gradient(output, target).masked_fill(missing, 0)
        return found * self._scale(output)

    @full_precision
    def event_weights(self, output: Tensor, target: Tensor | None = None) -> Tensor:
        """Return ones, (N, 1), or where entries of a target are missing their mask, (N, 1, C).

        Both times the weights of labels, if these have any.
        """
        if target is None or not (target.is_floating_point() or self._weighs_labels):
            return super().event_weights(output, target)
        target, missing = self._checked(output, target)
        weights = (~missing).to(output.dtype) * self._label_weights(output, target)
        return alike(per_sample(weights))

    @full_precision
    def count(self, output: Tensor, target: Tensor | None = None) -> Tensor:
        """Return the number of samples, or with "mean" of entries left over C; a scalar."""
        return self.seen_count(output, self.event_weights(output, target))

    def seen_count(self, output: Tensor, weights: Tensor, target: Tensor | None = None) -> Tensor:
        """Return the count behind event weights; see the base class."""
        if weights.dim() == 2:
            return weights.sum()
        if self.reduce_outputs == "mean":
            return weights.sum() / weights[0].numel()
        return weights.any(-1).to(weights.dtype).sum()

    @full_precision
    def output_hessian(self, output: Tensor, target: Tensor | None = None) -> Tensor:
        """Return the diagonal Λ as (N, 1, C, C)."""
        diagonal = self._hessian(output) * self._scale(output)
        return torch.diag_embed(self.split_events(diagonal * self._weights(output, target)))

    @full_precision
    def output_hessian_root(self, output: Tensor, target: Tensor | None = None) -> Tensor:
        """Return the diagonal square root of Λ as (N, 1, C, C)."""
        return torch.diag_embed(self.split_events(self._root(output, target)))

    @full_precision
    def root_inverse_apply(
        self, output: Tensor, cotangent: Tensor, target: Tensor | None = None
    ) -> Tensor:
        """Return ``cotangent / √Λ``, (N, C), 0 where an entry is missing; see the base class."""
        self._check_cotangent(output, cotangent)
        root = self._root(output, target)
        return per_sample(torch.where(root > 0, cotangent.to(output.dtype) / root, 0))

    @full_precision
    def infer_event_weights(
        self, output: Tensor, cotangent: Tensor, target: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Read masks and, with a target, weights and the loss scale off the cotangent.

        Without a target, entries whose cotangent is exactly zero, though rounding does not explain
        it, were masked. With one, the ratio of the cotangent to the plain gradient tells the
        weight of every sample or entry. Weights are normalised to a mean of 1 over samples or
        entries that have any, as their common factor is one of the loss.
        """
        self._check_cotangent(output, cotangent)
        if target is None:
            weights = alike(per_sample(~self._masked(output, cotangent)).to(output.dtype))
            usual = self._usual_scale(self.seen_count(output, weights))
            return weights, self._shown_scale(output, cotangent, usual)
        gradient = per_sample(self.gradient(output, target))
        cotangent = per_sample(cotangent)
        tolerance = max(8 * torch.finfo(cotangent.dtype).eps, 1e-5)
        cotangent = cotangent.to(gradient.dtype)
        weights = self.event_weights(output, target)
        usual = self._usual_scale(self.seen_count(output, weights))
        scale = positive_ratio((cotangent * gradient).sum(), gradient.square().sum(), usual)

        def explains(ratio: Tensor) -> bool:
            rest = (cotangent - ratio * gradient).norm()
            return bool((rest <= tolerance * cotangent.norm()) & (ratio >= 0).all())

        if explains(scale):
            return weights, scale
        present = gradient != 0
        samples = (cotangent * gradient).sum(1, True) / gradient.square().sum(1, True)
        entries = torch.where(present, cotangent / gradient, 0)
        for ratio in (samples.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0), entries):
            if explains(ratio):
                scale = ratio.sum() / (ratio > 0).sum()
                found = (ratio / scale).expand_as(gradient)
                if self._weighs_labels:
                    found = found * per_sample(self.spread(weights, output))
                return alike(found), scale
        return weights, scale

    @full_precision
    def largest_decrement(
        self, output: Tensor, cotangent: Tensor, weights: Tensor, scale: Tensor
    ) -> Tensor:
        """Return ``c² Σ w min(r²/λ, deviance)`` over entries with residuals r; see the base."""
        output = output.double()
        each = self.spread(weights, output).double() * self._scale(output)
        residual = torch.where(each > 0, cotangent.double() / (scale * each), 0.0)
        pearson = residual.square() / self._hessian(output).clamp_min(root_floor(output.dtype))
        least = torch.minimum(pearson, self._deviance(output, residual))
        return scale.double().square() * (each * least).sum()

    def _shown_scale(self, output: Tensor, cotangent: Tensor, usual: Tensor) -> Tensor:
        """Return the scale that the cotangent shows without a target; the usual one if none."""
        return usual

    def _masked(self, output: Tensor, cotangent: Tensor) -> Tensor:
        """Return which entries are exactly zero in the cotangent for no reason of rounding."""
        zero = cotangent == 0
        info = torch.finfo(cotangent.dtype)
        size = cotangent.abs().to(output.dtype)
        mean = size.sum() / (~zero).sum().clamp_min(1)
        # An entry may vanish by coincidence of output and target, or by underflow.
        chance = info.eps + info.smallest_normal * info.eps / mean.clamp_min(info.tiny)
        whole = per_sample(zero).all(1).view(-1, *[1] * (zero.dim() - 1))
        often = zero.double().mean() > 16 * chance
        masked = zero & (often | (whole & (chance ** output[0].numel() < 1e-6)))
        # Saturated outputs are fitted to the last bit, as those of a last ReLU, sigmoid or tanh.
        off = (output == 0) | (output.abs() == 1)
        clamped = (off.double().mean() > 16 * info.eps) & ~off.all()
        return masked & ~self._fitted(output, cotangent) & ~(off & clamped)

    def _fitted(self, output: Tensor, cotangent: Tensor) -> Tensor:
        """Return at which entries the gradient may vanish because the output is saturated."""
        return torch.zeros_like(output, dtype=torch.bool)

    @full_precision
    def sample(self, output: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw a target of the output's shape; see the base class."""
        return self._sample(output.detach().unsqueeze(0), generator)[0]

    @full_precision
    def sampled_vectors(
        self,
        output: Tensor,
        generator: torch.Generator | None = None,
        samples: int = 1,
        target: Tensor | None = None,
    ) -> Tensor:
        """Return sampled pseudo-gradients, (samples, *output.shape); see the base class."""
        many = output.detach().expand(samples, *output.shape)
        vectors = self._gradient(many, self._sample(many, generator))
        return vectors * (self._scale(output) / samples * self._weights(output, target)) ** 0.5

    def _scale(self, output: Tensor) -> float:
        return len(output) / output.numel() if self.reduce_outputs == "mean" else 1.0

    def _root(self, output: Tensor, target: Tensor | None = None) -> Tensor:
        curvature = self._hessian(output).clamp_min(root_floor(output.dtype))
        return (curvature * self._scale(output) * self._weights(output, target)).sqrt()

    def _weights(self, output: Tensor, target: Tensor | None) -> Tensor | float:
        return 1.0 if target is None else self.spread(self.event_weights(output, target), output)

    def _checked(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return a target with zeros for missing entries, and which these are."""
        if target.shape != output.shape:
            raise ValueError(
                f"{type(self).__name__} needs a target of the output's shape "
                f"{tuple(output.shape)} but got {tuple(target.shape)}."
            )
        target = target.to(output.dtype)
        missing = target.isnan()
        target = target.masked_fill(missing, 0)
        if self.bounds is not None and target.device.type == "cpu":
            least, largest, words = self.bounds
            if not bool(((target >= least) & (target <= largest)).all()):
                raise ValueError(f"{type(self).__name__} needs targets {words}.")
        return target, missing


def alike(weights: Tensor, tolerance: float = 1e-6) -> Tensor:
    """Return weights of entries, (N, C), as (N, 1) where those of a sample agree, else (N, 1, C).

    It waits for the device.
    """
    first = weights[:, :1]
    same = (weights - first).abs().max() <= tolerance * first.abs().max() if len(weights) else True
    return first if bool(same) else weights.unsqueeze(1)


def plausible_scale(scale: float, samples: int) -> float:
    """Return how far-fetched a factor of a loss is: 0 for none, more the less usual it is.

    Usual are sums over samples, a k-th of accumulated batches, and powers of two near 65536, with
    which mixed precision begins.
    """
    if not scale > 0:
        return math.inf
    power, inverse = math.log2(scale), 1 / scale
    if abs(scale - 1) < 0.01:
        return 0.0
    if abs(scale / samples - 1) < 0.01:
        return 0.5
    if scale < 1 and abs(inverse - round(inverse)) < 0.01 * inverse:
        return 1 - power / 8
    if 1 <= power <= 24 and abs(power - round(power)) < 0.01:
        return 1 + abs(power - 16) / 8
    return 4.0


def random_like(
    output: Tensor, generator: torch.Generator | None, kind: Literal["normal", "uniform"]
) -> Tensor:
    """Draw noise like outputs ``(draws, N, ...)``, N(0, 1) or uniform in [0, 1)."""
    fill = Tensor.normal_ if kind == "normal" else Tensor.uniform_
    return drawn(fill, output.shape, generator, dim=1, dtype=output.dtype, device=output.device)
