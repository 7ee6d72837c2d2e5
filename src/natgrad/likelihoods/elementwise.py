"""Likelihoods whose outputs are independent given z: Λ is diagonal."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import torch
from torch import Tensor

from natgrad.likelihoods.base import Likelihood, full_precision, root_floor

ReduceOutputs = Literal["sum", "mean"]


class Elementwise(Likelihood):
    """A product of one-dimensional likelihoods over all outputs of a sample; a sample is one event.

    Subclasses define the four functions of one output; this class adds shapes and scaling.

    Attributes:
        reduce_outputs: "sum" (default) adds the outputs' negative log-likelihoods, "mean" divides
            the sum by the number C of outputs per sample, as torch's mean-reduced losses do; Λ is
            then divided by C too.
    """

    reduce_outputs: ReduceOutputs = "sum"

    @abstractmethod
    def _nll(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the negative log-likelihood of every output, elementwise."""

    @abstractmethod
    def _gradient(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the derivative of :meth:`_nll` with respect to the output, elementwise."""

    @abstractmethod
    def _hessian(self, output: Tensor) -> Tensor:
        """Return the second derivative of :meth:`_nll`, elementwise (independent of the target)."""

    @abstractmethod
    def _sample(self, output: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw a target for every output."""

    def __post_init__(self) -> None:
        self._check_reduction()
        if self.reduce_outputs not in ("sum", "mean"):
            raise ValueError(
                f"reduce_outputs must be 'sum' or 'mean' but is {self.reduce_outputs!r}."
            )

    @full_precision
    def nll(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the negative log-likelihood of each sample, (N,); see the base class."""
        values = self._nll(output, self._checked(output, target)).flatten(1).sum(1)
        return values * self._scale(output)

    @full_precision
    def gradient(self, output: Tensor, target: Tensor) -> Tensor:
        """Return ``∂nll/∂z``, of the output's shape; see the base class."""
        return self._gradient(output, self._checked(output, target)) * self._scale(output)

    @full_precision
    def output_hessian(self, output: Tensor, target: Tensor | None = None) -> Tensor:
        """Return the diagonal Λ as (N, 1, C, C)."""
        return torch.diag_embed(self.split_events(self._hessian(output) * self._scale(output)))

    @full_precision
    def output_hessian_root(self, output: Tensor, target: Tensor | None = None) -> Tensor:
        """Return the diagonal square root of Λ as (N, 1, C, C)."""
        return torch.diag_embed(self.split_events(self._root(output)))

    @full_precision
    def root_inverse_apply(
        self, output: Tensor, cotangent: Tensor, target: Tensor | None = None
    ) -> Tensor:
        """Return ``cotangent / √Λ``, (N, C); see the base class."""
        self._check_cotangent(output, cotangent)
        return (cotangent.to(output.dtype) / self._root(output)).flatten(1)

    @full_precision
    def sample(self, output: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw a target of the output's shape; see the base class."""
        return self._sample(output.detach(), generator)

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
        return vectors * (self._scale(output) / samples) ** 0.5

    def _scale(self, output: Tensor) -> float:
        return len(output) / output.numel() if self.reduce_outputs == "mean" else 1.0

    def _root(self, output: Tensor) -> Tensor:
        floor = root_floor(output.dtype)
        return (self._hessian(output).clamp_min(floor) * self._scale(output)).sqrt()

    def _checked(self, output: Tensor, target: Tensor) -> Tensor:
        if target.shape != output.shape:
            raise ValueError(
                f"{type(self).__name__} needs a target of the output's shape "
                f"{tuple(output.shape)} but got {tuple(target.shape)}."
            )
        return target.to(output.dtype)


def random_like(
    output: Tensor, generator: torch.Generator | None, kind: Literal["normal", "uniform"]
) -> Tensor:
    """Draw noise like the output on the generator's device, N(0, 1) or uniform in [0, 1)."""
    device = output.device if generator is None else generator.device
    draw = torch.randn if kind == "normal" else torch.rand
    noise = draw(output.shape, generator=generator, dtype=output.dtype, device=device)
    return noise.to(output.device)
