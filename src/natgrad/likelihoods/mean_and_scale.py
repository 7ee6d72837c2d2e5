"""Gaussian likelihood of outputs that are a mean and its variance, as in ``nn.GaussianNLLLoss``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from natgrad.capture.model_output import Selection
from natgrad.distributed.replicas import drawn
from natgrad.likelihoods.base import FOREIGN, Likelihood, Reduction, full_precision, per_sample
from natgrad.likelihoods.elementwise import ReduceOutputs, alike, plausible_scale

Scale = Literal["variance", "deviation", "log_variance", "log_deviation"] | None

#: Least variance, that of ``nn.GaussianNLLLoss``, and least deviation, which has none there.
LEAST_VARIANCE = LEAST_DEVIATION = 1e-6

#: Relative spread of what the loss is multiplied by, beyond which it is no loss of the likelihood.
SPREAD = 0.5

#: The same, below which it surely is, and of how many means.
SURE_SPREAD, FEWEST_MEANS = 0.05, 8


@dataclass(frozen=True, repr=False)
class MeanAndScale(Likelihood):
    r"""y ~ N(m, v) with outputs m and s, of which v is a function: nll = ½ (log v + (y − m)²/v).

    Λ = diag(1/v, ½ (d log v/ds)²). For ``nn.GaussianNLLLoss``, ``-Normal(m, s).log_prob(y)``,
    probabilistic forecasts and policies with a standard deviation of their own.

    Args:
        scale: What s is: "variance", "deviation", "log_variance" or "log_deviation". None (default)
            is the variance until an optimizer sees in the gradient what it is.
        keys: Where the model's output holds m and s, both of one shape: keys of a mapping, names of
            attributes or indices, (0, 1) by default. None: both are halves of the last dimension of
            a tensor.
        reduce_outputs: "sum" or "mean" over the C means of a sample; ``nn.GaussianNLLLoss()`` is
            ``MeanAndScale("variance", reduce_outputs="mean")``. None (default) is "sum" until an
            optimizer sees in the gradient which.
        reduction: How the user's loss reduces over samples, "mean" (default) or "sum".

    Raises:
        ValueError: If an option is unknown.

    Source: Nix and Weigend, Estimating the mean and variance of the target probability distribution
    (1994).

    Example:
        >>> optimizer = natgrad.KFAC(model, nn.GaussianNLLLoss())  # The model returns (m, v).
    """

    scale: Scale = None
    keys: tuple[Any, Any] | None = (0, 1)
    reduce_outputs: ReduceOutputs = None
    reduction: Reduction = "mean"
    shows_scale: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._check_reduction()
        if self.scale not in (*FORMS, None):
            raise ValueError(f"scale must be one of {', '.join(FORMS)} but is {self.scale!r}.")
        if self.reduce_outputs not in ("sum", "mean", None):
            raise ValueError(
                f"reduce_outputs must be 'sum', 'mean' or None but is {self.reduce_outputs!r}."
            )

    # -- where the outputs are ---------------------------------------------------------------------

    def selection(self, output: Callable[[Any], Any] | None) -> Callable[[Any], Any] | None:
        """Return what picks m and s out of a model's output; see the base."""
        return output if self.keys is None else Selection(self.keys, output)

    def of_shapes(self, shapes: Mapping[Any, torch.Size] | None) -> Likelihood:
        """Return the same: m and s side by side are halves, too.

        Raises:
            ValueError: If their shapes differ.
        """
        found = set() if shapes is None else {tuple(one) for one in shapes.values()}
        if len(found) > 1:
            raise ValueError(
                f"{type(self).__name__} needs means and scales of one shape but got "
                f"{' and '.join(map(str, sorted(found)))}: let the model expand the smaller one."
            )
        return self

    # -- what is seen ------------------------------------------------------------------------------

    @property
    def decision(self) -> Any:
        """What s is, and what the losses of a sample's means are reduced to."""
        return self.scale, self.reduce_outputs

    @property
    def undecided(self) -> bool:
        """Whether the gradient has something to say."""
        return self.scale is None or (self.reduce_outputs is None and self.reduction == "mean")

    def decided(self, decision: Any) -> Likelihood:
        """Return the likelihood with a :attr:`decision` that was made before."""
        scale, reduce_outputs = decision or (None, None)
        return dataclasses.replace(
            self,
            scale=self.scale or scale,
            reduce_outputs=self.reduce_outputs or reduce_outputs,
        )

    @full_precision
    def seen_with(
        self, output: Tensor, cotangent: Tensor, target: Any = None
    ) -> tuple[Likelihood, list[str]]:
        """Decide what s is and on the reduction: both gradients show what the loss is times.

        Of one entry they are two equations for the error and for that factor, and with the right
        form of the variance all factors are alike.
        """
        told = cotangent.any() & cotangent.isfinite().all()
        if not bool(told):
            return self, []
        found = {one: self._factors(one, output, cotangent) for one in self._possible(output)}
        spreads = {one: float(c.std() / c.mean()) for one, c in found.items() if c.numel() > 1}
        if not spreads:
            return self, []
        form = min(spreads, key=lambda one: spreads[one])
        if not spreads[form] < SPREAD:  # Not a number, or weights of all sizes.
            fault = f"is not that of errors and their {(self.scale or 'scale').replace('_', ' ')}"
            return self, [FOREIGN.format(fault=fault, name=self)]
        factor, samples = float(found[form].mean()), len(output)
        size = output[0].numel() // 2
        summed, averaged = factor * samples, factor * samples * size
        means = plausible_scale(averaged, samples) < plausible_scale(summed, samples)
        reduce_outputs = "mean" if means else "sum"
        return self.decided((form, reduce_outputs if self.reduction == "mean" else None)), []

    @classmethod
    def shown_by(
        cls, output: Tensor, cotangent: Tensor, reduction: Reduction = "mean"
    ) -> MeanAndScale | None:
        """Return the likelihood of halves of an output that a gradient surely shows to be m and s.

        Args:
            output: The output.
            cotangent: The gradient of the loss at it.
            reduction: How the loss reduces over samples.

        Returns:
            The likelihood; None if it shows something else.
        """
        if output.dim() < cls.least_dimensions or output.shape[-1] % 2:
            return None
        found, _ = cls(keys=None, reduction=reduction).seen_with(output, cotangent)
        if not isinstance(found, MeanAndScale) or found.scale is None:
            return None
        factors, number = found._factors(found.scale, output, cotangent), output.numel() // 2
        if factors.numel() < max(FEWEST_MEANS, 0.9 * number):
            return None
        return found if float(factors.std() / factors.mean()) < SURE_SPREAD else None

    def _possible(self, output: Tensor) -> list[str]:
        if self.scale is not None:
            return [self.scale]
        positive = bool((output.chunk(2, -1)[1] > 0).all())
        return [one for one in FORMS if positive or one.startswith("log")]

    def _factors(self, form: str, output: Tensor, cotangent: Tensor) -> Tensor:
        """Return what the loss of every mean is multiplied by where it is seen, ``(n,)``.

        c solves ``A² = c² a²`` and ``B = c (1 − a²)`` with ``a = (m − y)/√v``.
        """
        c = self._factor_of_each(form, output, cotangent)
        seen: Tensor = c[(c > 0) & c.isfinite()]
        return seen

    def _factor_of_each(self, form: str, output: Tensor, cotangent: Tensor) -> Tensor:
        """Return the same like m; 0 where both gradients are."""
        _, s = output.chunk(2, -1)
        variance, slope = FORMS[form](s)
        of_mean, of_scale = cotangent.to(output.dtype).chunk(2, -1)
        a, b = of_mean * variance.sqrt(), 2 * of_scale / slope
        root = torch.hypot(b, 2 * a)
        # Each where nothing cancels.
        return torch.where(b < 0, 2 * a.square() / (root - b), (b + root) / 2)

    @full_precision
    def infer_event_weights(
        self, output: Tensor, cotangent: Tensor, target: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Read weights, of any kind, and the loss scale off the cotangent; see the base class."""
        self._check_cotangent(output, cotangent)
        each = self._factor_of_each(self.scale or "variance", output, cotangent)
        each = torch.where(each.isfinite(), each, 0.0)
        number = (each > 0).sum()
        mean = each.sum() / number
        weights = per_sample(torch.cat([each, each], -1) / mean)
        weights = torch.where(number > 0, alike(weights, 1e-3), 1.0)
        usual = self._usual_scale(self.seen_count(output, weights))
        return weights, torch.where(number > 0, mean / self._share(output), usual)

    # -- the distribution --------------------------------------------------------------------------

    def _share(self, output: Tensor) -> float:
        return 2 * len(output) / output.numel() if self.reduce_outputs == "mean" else 1.0

    def _form(self, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return m, v and d log v/ds."""
        mean, s = output.chunk(2, -1)
        return (mean, *FORMS[self.scale or "variance"](s))

    def _checked(self, output: Tensor, target: Tensor) -> Tensor:
        mean, _ = output.chunk(2, -1)
        if target.numel() != mean.numel():
            raise ValueError(
                f"{type(self).__name__} needs a target of the shape of the means, "
                f"{tuple(mean.shape)}, but got {tuple(target.shape)}."
            )
        return target.reshape(mean.shape).to(mean.dtype)

    @full_precision
    def nll(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the negative log-likelihood of each sample, ``(N,)``; see the base class."""
        mean, variance, _ = self._form(output)
        error = self._checked(output, target) - mean
        values = 0.5 * (variance.log() + error.square() / variance)
        return per_sample(values).sum(1) * self._share(output)

    @full_precision
    def gradient(self, output: Tensor, target: Tensor) -> Tensor:
        """Return ``∂nll/∂(m, s)``, of the output's shape; see the base class."""
        return self._gradient(output, self._checked(output, target)) * self._share(output)

    def _gradient(self, output: Tensor, target: Tensor) -> Tensor:
        mean, variance, slope = self._form(output)
        a = (mean - target) / variance.sqrt()
        return torch.cat([a / variance.sqrt(), 0.5 * slope * (1 - a.square())], -1)

    def _root(self, output: Tensor) -> Tensor:
        """Return √Λ, of the output's shape."""
        _, variance, slope = self._form(output)
        root: Tensor = torch.cat([variance.rsqrt(), slope.abs() / math.sqrt(2)], -1)
        return root * math.sqrt(self._share(output))

    @full_precision
    def output_hessian_root(self, output: Tensor, target: Tensor | None = None) -> Tensor:
        """Return ``diag(√Λ)``, ``(N, 1, 2 C, 2 C)``; see the base class."""
        return torch.diag_embed(per_sample(self._root(output))).unsqueeze(1)

    @full_precision
    def root_inverse_apply(
        self, output: Tensor, cotangent: Tensor, target: Tensor | None = None
    ) -> Tensor:
        """Return ``cotangent / √Λ``, ``(N, 2 C)``; see the base class."""
        self._check_cotangent(output, cotangent)
        return per_sample(cotangent.to(output.dtype) / self._root(output))

    @full_precision
    def largest_decrement(
        self, output: Tensor, cotangent: Tensor, weights: Tensor, scale: Tensor
    ) -> Tensor:
        """Return ``c² Σ w (a² + min((1 − a²)²/2, a² − 1 − log a²))``; see the base class.

        a² is the deviance of a mean, and what follows at most that of a variance.
        """
        output = output.double()
        each = self.spread(weights, output).double().chunk(2, -1)[0] * self._share(output)
        _, variance, _ = self._form(output)
        of_mean = cotangent.double().chunk(2, -1)[0] * variance.sqrt()
        square = torch.where(each > 0, of_mean / (scale * each), 0.0).square()
        logarithm = square.clamp_min(torch.finfo(square.dtype).tiny).log()
        of_variance = torch.minimum((1 - square).square() / 2, square - 1 - logarithm)
        return scale.double().square() * (each * (square + of_variance)).sum()

    @full_precision
    def sample(self, output: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw a target of the shape of the means; see the base class."""
        mean, variance, _ = self._form(output.detach())
        noise = drawn(
            Tensor.normal_, mean.shape, generator, dim=0, dtype=mean.dtype, device=mean.device
        )
        return mean + variance.sqrt() * noise

    @full_precision
    def sampled_vectors(
        self,
        output: Tensor,
        generator: torch.Generator | None = None,
        samples: int = 1,
        target: Tensor | None = None,
    ) -> Tensor:
        """Return sampled pseudo-gradients, ``(samples, *output.shape)``; see the base class."""
        output = output.detach()
        many = [self._gradient(output, self.sample(output, generator)) for _ in range(samples)]
        return torch.stack(many) * math.sqrt(self._share(output) / samples)


def _as_variance(s: Tensor) -> tuple[Tensor, Tensor]:
    variance = s.clamp_min(LEAST_VARIANCE)
    return variance, 1 / variance


def _as_deviation(s: Tensor) -> tuple[Tensor, Tensor]:
    deviation = s.clamp_min(LEAST_DEVIATION)
    return deviation.square(), 2 / deviation


def _as_log_variance(s: Tensor) -> tuple[Tensor, Tensor]:
    return s.exp(), torch.ones_like(s)


def _as_log_deviation(s: Tensor) -> tuple[Tensor, Tensor]:
    return (2 * s).exp(), torch.full_like(s, 2)


#: What s is → its variance v and d log v/ds.
FORMS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "variance": _as_variance,
    "deviation": _as_deviation,
    "log_variance": _as_log_variance,
    "log_deviation": _as_log_deviation,
}
