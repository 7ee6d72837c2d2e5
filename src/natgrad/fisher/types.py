r"""Fisher types: which output vectors are pulled back.

Every type gives vectors :math:`v_{nk}` such that
:math:`F = \frac{1}{count} \sum_{nk} J_n^\top v_{nk} v_{nk}^\top J_n`: columns of the square root
of the output Hessian (``exact``), pseudo-gradients of sampled labels (``mc``), or gradients at the
true labels (``empirical``), or those divided by their norms (``improved``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from natgrad.arguments import check_choice, check_integer
from natgrad.distributed.replicas import drawn
from natgrad.likelihoods import Likelihood
from natgrad.likelihoods.base import per_sample


class FisherType(ABC):
    """Which output vectors define the Fisher matrix."""

    #: Name under which it is known.
    name: ClassVar[str]
    #: Whether the user's own backward pass already carries the rows.
    from_user_gradients = False
    #: Whether the vectors of different samples are independent with mean zero.
    independent: ClassVar[bool] = False
    #: Whether some vectors are random.
    draws: ClassVar[bool] = False

    def directions(self, outputs: int) -> int:
        """Return how many vectors are pulled back per sample with so many outputs."""
        return outputs

    @abstractmethod
    def vectors(
        self,
        likelihood: Likelihood,
        output: Tensor,
        weights: Tensor,
        generator: torch.Generator | None = None,
        target: Tensor | None = None,
        cotangent: Tensor | None = None,
    ) -> Tensor:
        """Return the vectors to pull back, ``(K, *output.shape)``.

        Args:
            likelihood: The likelihood.
            output: Model output, ``(N, ...)``, detached.
            weights: Event weights ``(N, E)``, or ``(N, E, C)`` where entries have their own.
            generator: Source of randomness.
            target: True target, where it is known.
            cotangent: Gradient of the user's loss with respect to the output, where it is known.
        """

    def coordinates(
        self, likelihood: Likelihood, output: Tensor, cotangent: Tensor, weights: Tensor
    ) -> Tensor | None:
        """Return ``u`` (N, K) with ``Σ_k vectors_kn u_nk = cotangent_n``, or None.

        With it a natural gradient in sample space needs no division by the damping: if
        ``∇L = Jᵀu`` then ``(F + λI)⁻¹∇L = Jᵀ (JJᵀ/count + λI)⁻¹ u`` (push-through identity).
        """
        return None

    def row_scales(
        self,
        likelihood: Likelihood,
        output: Tensor,
        weights: Tensor,
        target: Tensor | None = None,
        cotangent: Tensor | None = None,
    ) -> tuple[Tensor, Tensor] | None:
        """Return scales t and coordinates u of scaled rows, ``(N·K,)`` each, or None.

        A type that returns them has its damping added in the units of ``TJJᵀT/count`` by the
        structures that keep exact rows (:class:`natgrad.jacobians.collection.ScaledRows`). The
        arguments are those of :meth:`vectors`.
        """
        return None

    def check_method(self, method: Any) -> None:  # noqa: B027
        """Raise a ValueError if the type does not go with what an optimizer is made of.

        Args:
            method: A :class:`natgrad.optim.Method`.
        """


@dataclass(frozen=True)
class ExactFisher(FisherType):
    """The Fisher matrix itself: expectation over the model's labels, in closed form."""

    name: ClassVar[str] = "exact"

    def vectors(
        self,
        likelihood: Likelihood,
        output: Tensor,
        weights: Tensor,
        generator: torch.Generator | None = None,
        target: Tensor | None = None,
        cotangent: Tensor | None = None,
    ) -> Tensor:
        """Return the columns of the square root of the output Hessian."""
        return likelihood.root_vectors(output) * likelihood.spread(weights.sqrt(), output)

    def coordinates(
        self, likelihood: Likelihood, output: Tensor, cotangent: Tensor, weights: Tensor
    ) -> Tensor | None:
        """Return ``S⁺ r``."""
        plain = likelihood.root_inverse_apply(output, cotangent)
        scale = likelihood.root_weights(weights.sqrt(), plain.shape[1])
        return torch.where(scale > 0, plain / scale, torch.zeros_like(plain))


@dataclass(frozen=True)
class MonteCarloFisher(FisherType):
    """Labels sampled from the model.

    Attributes:
        samples: Draws per input; the error falls as one over its square root.
    """

    name: ClassVar[str] = "mc"
    independent: ClassVar[bool] = True
    draws: ClassVar[bool] = True
    samples: int = 1

    def __post_init__(self) -> None:
        """Check the number of draws."""
        check_integer("samples", self.samples)

    def directions(self, outputs: int) -> int:
        """Return the number of draws."""
        return self.samples

    def vectors(
        self,
        likelihood: Likelihood,
        output: Tensor,
        weights: Tensor,
        generator: torch.Generator | None = None,
        target: Tensor | None = None,
        cotangent: Tensor | None = None,
    ) -> Tensor:
        """Return one pseudo-gradient per draw, scaled by ``1/√samples``."""
        drawn = likelihood.sampled_vectors(output, generator, self.samples)
        return drawn * likelihood.spread(weights.sqrt(), output)


@dataclass(frozen=True)
class EmpiricalFisher(FisherType):
    """Gradients at the true labels. Cheap, but not the Fisher matrix (Kunstner et al. 2019)."""

    name: ClassVar[str] = "empirical"
    from_user_gradients = True

    def directions(self, outputs: int) -> int:
        """Return 1."""
        return 1

    def vectors(
        self,
        likelihood: Likelihood,
        output: Tensor,
        weights: Tensor,
        generator: torch.Generator | None = None,
        target: Tensor | None = None,
        cotangent: Tensor | None = None,
    ) -> Tensor:
        """Return the gradient of each sample's weighted loss."""
        if target is None:
            raise ValueError("the empirical Fisher matrix needs the true targets")
        return likelihood.gradient(output, target).unsqueeze(0)


@dataclass(frozen=True)
class ImprovedFisher(FisherType):
    r"""Gradients at the true labels, each divided by its norm at the output (iEF).

    .. math:: F^\star = \frac{1}{count} \sum_n \frac{w_n}{s_n} g_n g_n^\top, \qquad
              s_n = \|\partial \ell_n / \partial f_n\|^2

    with ``g_n = J_nᵀ ∂ℓ_n/∂f_n``. The empirical Fisher matrix weighs a sample less the better it
    is fitted, so that its natural gradient grows without bound for fitted samples; the scaling
    undoes that. For one output per sample it is the Gauss-Newton matrix. It costs one vector per
    sample to pull back. With several events per sample (tokens) each event is normalised on its
    own and gets a random sign, which leaves the cross terms between events zero on average.

    There are two places for λ. With ``damping_on="fisher"`` it is added to ``F*``, as everywhere
    in natgrad. With ``"gram"``, the rule of the source, it is added to the mean Gram matrix of the
    samples' loss gradients, rows ``√w_n g_n`` of G,

    .. math:: \Delta = G^\top (G G^\top + count\,\lambda I)^{-1} D w^{1/2}
              = (\tilde F + \lambda I)^{-1} \frac{1}{count} \sum_n w_n s_n g_n, \qquad
              \tilde F = \frac{1}{count} \sum_n w_n g_n g_n^\top

    with ``D = diag(s)``: a sample is damped by ``λ/s_n`` in the units of ``F*``, so well-fitted
    samples move the step less, and the more so the larger λ. For λ → 0 both are the same, as they
    are where all ``s_n`` are 1. Sample weights count as repetitions. The λ of the source, which has
    sums for means, is ``Nλ`` here. It makes a difference only to structures that keep exact rows,
    when they precondition a gradient; it takes one event per sample, and losses whose scale the
    likelihood knows (for a Gaussian one: its own mean or sum).

    Attributes:
        damping_on: ``"fisher"`` or ``"gram"``.

    Source: Wu et al., An improved empirical Fisher approximation for natural gradient descent
    (2024).
    """

    name: ClassVar[str] = "improved"
    draws: ClassVar[bool] = True
    damping_on: Literal["fisher", "gram"] = "fisher"

    def __post_init__(self) -> None:
        """Check the place of damping."""
        check_choice("damping_on", self.damping_on, "fisher", "gram")

    def check_method(self, method: Any) -> None:  # noqa: B027
        """Refuse what needs ``F* + λI`` where damping is on the Gram matrix."""
        if self.damping_on == "fisher":
            return
        refused = {
            "a LevenbergMarquardt damping": not isinstance(method.damping, (int, float)),
            "lr='isotropic'": isinstance(method.lr, str),
            "length='quadratic_model'": method.step_rule.uses_model,
            "weight_decay_mode='model'": method.step_rule.decays_in_model,
            "momentum_on='gradient'": method.step_rule.momentum_on == "gradient",
        }
        for option, chosen in refused.items():
            if chosen:
                raise ValueError(
                    "damping_on='gram' is a rule for the gradient of the batch's own loss, with "
                    f"nothing added to F*, so it does not take {option}: use damping_on='fisher'"
                )

    def directions(self, outputs: int) -> int:
        """Return 1."""
        return 1

    def vectors(
        self,
        likelihood: Likelihood,
        output: Tensor,
        weights: Tensor,
        generator: torch.Generator | None = None,
        target: Tensor | None = None,
        cotangent: Tensor | None = None,
    ) -> Tensor:
        """Return the normalised gradients times the roots of the event weights, K = 1."""
        if target is not None:
            gradient = likelihood.gradient(output, target)
        elif cotangent is not None:
            gradient = likelihood.passing(output, cotangent.to(weights.dtype))
        else:
            raise ValueError("the improved empirical Fisher matrix needs the true targets")
        weights = _of_events(weights)
        events = likelihood.split_events(gradient)  # (N, E, C)
        squares = events.square().sum(-1)
        # Fitted events have s → 0 with a bounded ratio; the mean sets the scale of rounding.
        floor = torch.finfo(squares.dtype).eps * squares.mean()
        scale = weights.to(squares).sqrt() * (squares + floor).rsqrt()
        scale = torch.where(squares > 0, scale, torch.zeros_like(scale))
        if events.shape[1] > 1:
            numbers = drawn(
                Tensor.uniform_, squares.shape, generator, dtype=scale.dtype, device=scale.device
            )
            scale = torch.where(numbers < 0.5, -scale, scale)
        return likelihood.merge_events(events * scale.unsqueeze(-1), output).unsqueeze(0)

    def coordinates(
        self, likelihood: Likelihood, output: Tensor, cotangent: Tensor, weights: Tensor
    ) -> Tensor | None:
        """Return the norms of the gradients; None with several events, which share a row."""
        if weights.shape[1] > 1:
            return None
        vectors = self.vectors(likelihood, output, weights, cotangent=cotangent)[0]
        vectors = per_sample(vectors)
        norm = vectors.square().sum(1)
        passing = likelihood.passing(output, cotangent.to(vectors.dtype))
        inner = (vectors * per_sample(passing)).sum(1)
        share = torch.where(norm > 0, inner / torch.where(norm > 0, norm, 1.0), 0.0)
        return share.unsqueeze(1)

    def row_scales(
        self,
        likelihood: Likelihood,
        output: Tensor,
        weights: Tensor,
        target: Tensor | None = None,
        cotangent: Tensor | None = None,
    ) -> tuple[Tensor, Tensor] | None:
        """Return ``√s`` and ``√(ws)``, for gradients of the loss without its reduction or scale.

        None with damping on F*. The rows are those of G divided by ``√s_n``.

        Raises:
            ValueError: If samples have several events.
        """
        if self.damping_on == "fisher":
            return None
        if weights.shape[1] > 1:
            raise ValueError(
                f"damping_on='gram' needs one event per sample, and there are {weights.shape[1]} "
                "(tokens or pixels): use damping_on='fisher'"
            )
        roots = _of_events(weights)[:, 0].sqrt()
        if target is not None:
            gradient = likelihood.gradient(output, target)
        elif cotangent is not None:
            _, scale = likelihood.infer_event_weights(output, cotangent)
            gradient = likelihood.passing(output, cotangent.to(weights.dtype)) / scale
        else:
            raise ValueError("the improved empirical Fisher matrix needs the true targets")
        weighted = per_sample(gradient).norm(dim=1)  # w_n √s_n
        scales = torch.where(roots > 0, weighted / roots.square(), torch.zeros_like(weighted))
        return scales, roots * scales


#: Name → Fisher type.
FISHER_TYPES: dict[str, Callable[[], FisherType]] = {
    "exact": ExactFisher,
    "mc": MonteCarloFisher,
    "empirical": EmpiricalFisher,
    "improved": ImprovedFisher,
}


def as_fisher_type(fisher: str | FisherType) -> FisherType:
    """Return the Fisher type of a name.

    Raises:
        ValueError: If the name is unknown.
    """
    if isinstance(fisher, FisherType):
        return fisher
    if fisher not in FISHER_TYPES:
        raise ValueError(f"fisher must be one of {', '.join(sorted(FISHER_TYPES))}, got {fisher!r}")
    return FISHER_TYPES[fisher]()


def _of_events(weights: Tensor) -> Tensor:
    """Return the weights of events, ``(N, E)``; 1 where entries have theirs, as gradients do."""
    return weights if weights.dim() == 2 else weights.any(-1).to(weights.dtype)
