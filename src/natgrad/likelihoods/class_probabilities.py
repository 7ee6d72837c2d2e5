"""Categorical likelihood of outputs that are probabilities: the logarithm is left to the loss."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from natgrad.likelihoods.base import FOREIGN, Likelihood, full_precision, root_floor

if TYPE_CHECKING:
    from natgrad.likelihoods.categorical import Categorical


@dataclass(frozen=True, repr=False)
class ClassProbabilities(Likelihood):
    """y ~ Categorical(p) for outputs p that sum to 1: nll = −log p_y.

    For models that end in a softmax, of which the loss takes the logarithm, as
    ``torch.distributions.Categorical(probs=output).log_prob(y)`` does. The Fisher matrix is that of
    :class:`natgrad.Categorical` at the logits behind it, but for the "improved" one, which
    normalises gradients at the outputs.

    Args:
        logarithms: The likelihood of the outputs' logarithms, as ``Categorical()``; its options say
            where classes lie and what is left out.
    """

    shows_scale: ClassVar[bool] = True

    logarithms: Categorical

    def __post_init__(self) -> None:
        object.__setattr__(self, "reduction", self.logarithms.reduction)

    # -- what the likelihood defines ---------------------------------------------------------------

    @full_precision
    def nll(self, output: Tensor, target: Tensor) -> Tensor:
        """Return −log p_y, of the target's shape."""
        return self.logarithms.nll(_at_least(output).log(), target)

    @full_precision
    def gradient(self, output: Tensor, target: Tensor) -> Tensor:
        """Return ``w − q/p`` with the weighted labels q, the gradient if p is normalised again."""
        p = _at_least(output)
        return self.logarithms.gradient(p.log(), target) / p

    @full_precision
    def output_hessian_root(self, output: Tensor, target: Tensor | None = None) -> Tensor:
        """Return S with column c equal to √(w p_c) (e_c/p_c − 1), (N, E, C, C)."""
        p = _at_least(output)
        root = self.logarithms.output_hessian_root(p.log(), target)
        return root / self.split_events(p).unsqueeze(-1)

    @full_precision
    def sample(self, output: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw class indices of the output's shape without the class dimension; see the base."""
        return self.logarithms.sample(_at_least(output).log(), generator)

    @full_precision
    def event_weights(self, output: Tensor, target: Tensor | None = None) -> Tensor:
        """Return the event weights, (N, E); see :class:`natgrad.Categorical`."""
        return self.logarithms.event_weights(output, target)

    @full_precision
    def count(self, output: Tensor, target: Tensor | None = None) -> Tensor:
        """Return what a mean over events divides by, a scalar tensor."""
        return self.logarithms.count(_at_least(output).log(), target)

    # -- what a gradient at the outputs tells ------------------------------------------------------

    @full_precision
    def root_inverse_apply(
        self, output: Tensor, cotangent: Tensor, target: Tensor | None = None
    ) -> Tensor:
        """Return coordinates of what the outputs let through of a cotangent; see the base class."""
        p = _at_least(output)
        return self.logarithms.root_inverse_apply(p.log(), p * cotangent, target)

    @full_precision
    def passing(self, output: Tensor, cotangent: Tensor) -> Tensor:
        """Return ``r − Σ p r``, as a softmax lets through; see the base class."""
        p = _at_least(output)
        return self.logarithms.passing(p.log(), p * cotangent) / p

    @full_precision
    def sampled_vectors(
        self,
        output: Tensor,
        generator: torch.Generator | None = None,
        samples: int = 1,
        target: Tensor | None = None,
    ) -> Tensor:
        """Return √w (1 − e_ŷ/p) with ŷ ~ p, ``(samples, *output.shape)``; see the base class."""
        p = _at_least(output.detach())
        return self.logarithms.sampled_vectors(p.log(), generator, samples, target) / p

    @full_precision
    def infer_event_weights(
        self, output: Tensor, cotangent: Tensor, target: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Read labels, ignored events and the loss scale off the cotangent; see the base class."""
        p = _at_least(output)
        return self.logarithms.infer_event_weights(p.log(), p * cotangent, target)

    @full_precision
    def largest_decrement(
        self, output: Tensor, cotangent: Tensor, weights: Tensor, scale: Tensor
    ) -> Tensor:
        """Return the bound at the logits; see the base class."""
        p = _at_least(output)
        return self.logarithms.largest_decrement(p.log(), p * cotangent, weights, scale)

    @property
    def decision(self) -> Any:
        """That outputs are probabilities, and the dimension of the classes."""
        return "probabilities", self.logarithms.class_dim

    def decided(self, decision: Any) -> Likelihood:
        """Return the likelihood with a :attr:`decision` that was made before."""
        if not isinstance(decision, (tuple, list)):
            return self
        return replace(self, logarithms=replace(self.logarithms, class_dim=decision[1]))

    @full_precision
    def seen_with(
        self, output: Tensor, cotangent: Tensor, target: Any = None
    ) -> tuple[Likelihood, list[str]]:
        """Say so if outputs are no probabilities; see the base class."""
        if not hold_class_probabilities(self.split_events(output)):
            fault = "is at outputs that are no probabilities of classes"
            return self, [FOREIGN.format(fault=fault, name=self)]
        return self, []

    # -- layout ------------------------------------------------------------------------------------

    def split_events(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the output's shape as (N, E, C), classes last."""
        return self.logarithms.split_events(tensor)

    def merge_events(self, events: Tensor, output: Tensor) -> Tensor:
        """Undo :meth:`split_events`: ``(..., N, E, C)`` becomes ``(..., *output.shape)``."""
        return self.logarithms.merge_events(events, output)


def hold_class_probabilities(events: Tensor) -> bool:
    """Return whether all events, ``(N, E, C)``, are probabilities that sum to 1."""
    return bool((events >= 0).all() & ((events.sum(-1) - 1).abs() < 1e-3).all())


def _at_least(p: Tensor) -> Tensor:
    """Return probabilities that have a logarithm."""
    return p.clamp_min(root_floor(p.dtype))
