"""The interface of a likelihood, with everything that follows from its four basic functions."""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, TypeVar, cast

import torch
from torch import Tensor

Reduction = Literal["mean", "sum"]

#: What is said of a loss that has nothing to do with the likelihood.
FOREIGN = (
    "the gradient of the loss {fault}, so it is no loss of {name!r} (but perhaps a contrastive, an "
    "adversarial or a residual one), and the Fisher matrix does not belong to it: say what the "
    "output means by likelihood=..., or train losses made of residuals by ResidualNGD"
)

_Method = TypeVar("_Method", bound=Callable[..., Any])


def full_precision(method: _Method) -> _Method:
    """Run a method on the output in float32 or better, with autocast switched off.

    float16 and bfloat16 outputs reach the method as float32.
    """

    @functools.wraps(method)
    def wrapped(self: Any, output: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            kind = output.dtype if isinstance(output, Tensor) else type(output).__name__
            raise TypeError(
                f"{type(self).__name__} needs the model's output as a floating-point tensor "
                f"but got {kind}."
            )
        if output.dim() < self.least_dimensions:
            raise ValueError(
                f"{type(self).__name__} needs an output of shape (samples, outputs, ...) but got "
                f"{tuple(output.shape)}; give a single sample a first dimension of size 1, and say "
                "what single numbers mean by likelihood='bernoulli', 'gaussian' or 'poisson'."
            )
        if output.dtype in (torch.float16, torch.bfloat16):
            output = output.float()
        device = output.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return method(self, output, *args, **kwargs)
        return method(self, output, *args, **kwargs)

    return cast(_Method, wrapped)


class Likelihood(ABC):
    """The distribution p(y | z) of a target y given a model output z.

    An output of shape (N, ...) is split into N samples of E *events*, each predicted by C numbers:
    one event per sample for Gaussian, Bernoulli and Poisson, one per token or pixel for
    Categorical. The Fisher matrix is ``F = (1/count) Σ_n Σ_e w_ne J_neᵀ Λ_ne J_ne`` with the output
    Hessian ``Λ = ∇²_z nll`` and the event weights ``w``.

    In all methods ``output`` is the model output z, (N, ...), ``target`` the target y, and
    ``generator`` a source of randomness on any device, by default torch's global one. Where a
    target may be None (default), it is used for the event weights only, which are then 1.

    A new likelihood implements :meth:`nll`, :meth:`gradient`, :meth:`output_hessian_root` and
    :meth:`sample`, decorated with :func:`full_precision`; the rest follows and may be overridden
    where something faster or safer exists.

    Attributes:
        reduction: How the user's loss reduces over samples, "mean" (default) or "sum". The Fisher
            matrix never depends on it; it only scales gradients observed in a backward pass.
    """

    reduction: Reduction = "mean"
    #: Dimensions of an output; 1 where a sample may have a single number, ``(N,)``.
    least_dimensions: ClassVar[int] = 2
    #: Whether the gradient at the outputs shows what the loss is multiplied by, whatever targets.
    shows_scale: ClassVar[bool] = False

    # -- what a likelihood defines ---------------------------------------------------------------

    @abstractmethod
    def nll(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the negative log-likelihood of each event, unweighted, in nats.

        Its shape is (N,) or, with several events per sample, (N, ...). Additive constants that do
        not depend on z are left out.
        """

    @abstractmethod
    def gradient(self, output: Tensor, target: Tensor) -> Tensor:
        """Return ``w ∂nll/∂z``, the gradient of each sample's un-averaged weighted loss, like z."""

    @abstractmethod
    def output_hessian_root(self, output: Tensor, target: Tensor | None = None) -> Tensor:
        """Return S with ``S Sᵀ = w Λ`` for every event, (N, E, C, R).

        The built-in likelihoods have R = C columns.
        """

    @abstractmethod
    def sample(self, output: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw a target, as :meth:`nll` takes it, from the model's own distribution."""

    def event_weights(self, output: Tensor, target: Tensor | None = None) -> Tensor:
        """Return the event weights w, (N, E); all 1 without a target (default)."""
        return torch.ones(self.split_events(output).shape[:2], dtype=_working_dtype(output),
                          device=output.device)  # fmt: skip

    def count(self, output: Tensor, target: Tensor | None = None) -> Tensor:
        """Return what a mean-reduced loss divides by, the sum of the event weights: a scalar."""
        return self.event_weights(output, target).sum()

    def seen_count(self, output: Tensor, weights: Tensor, target: Tensor | None = None) -> Tensor:
        """Return the count behind weights that :meth:`infer_event_weights` read off a gradient."""
        if target is not None:
            return self.count(output, target)
        # That of all events, less those that are ignored.
        return self.count(output) * (weights.sum() / weights.numel())

    # -- what follows ------------------------------------------------------------------------------

    @property
    def decision(self) -> Any:
        """What :meth:`seen_with` has decided, for checkpoints; None for nothing."""
        return None

    @property
    def undecided(self) -> bool:
        """Whether :meth:`seen_with` has still something to decide."""
        return False

    def decided(self, decision: Any) -> Likelihood:
        """Return the likelihood with a :attr:`decision` that was made before."""
        return self

    def seen_with(
        self, output: Tensor, cotangent: Tensor, target: Any = None
    ) -> tuple[Likelihood, list[str]]:
        """Return the likelihood of the user's own loss, as its gradient at the output shows it.

        Args:
            output: Model output z.
            cotangent: Gradient of the user's loss with respect to the output.
            target: Target y if it is known.

        Returns:
            The likelihood, this one if nothing is left open, and sentences for the user: what is
            taken for granted, or that no loss of this likelihood has such a gradient.
        """
        return self, []

    def selection(self, output: Callable[[Any], Any] | None) -> Callable[[Any], Any] | None:
        """Return what picks the outputs this likelihood is about out of a model's, given a wish."""
        return output

    def of_shapes(self, shapes: Mapping[Any, torch.Size] | None) -> Likelihood:
        """Return the likelihood of an output; :class:`natgrad.likelihoods.Heads` need its parts.

        Args:
            shapes: Key of a head → shape ``(N, ...)``; None for a single output.
        """
        return self

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return ``Σ w nll / count``, a scalar differentiable in the output."""
        weights = self.event_weights(output, target)
        nll = self.nll(output, target).reshape(weights.shape)
        return (weights * nll).sum() / self.count(output, target)

    @full_precision
    def output_hessian(self, output: Tensor, target: Tensor | None = None) -> Tensor:
        """Return w Λ for every event, (N, E, C, C)."""
        root = self.output_hessian_root(output, target)
        return root @ root.mT

    @full_precision
    def root_vectors(self, output: Tensor, target: Tensor | None = None) -> Tensor:
        """Return the columns of the square root of w Λ as vectors of the output's shape.

        Returns:
            Tensor of shape ``(K, *output.shape)``, K = E·R. Vector k = e·R + r holds column r of
            event e and is zero at every other event, so that
            ``Σ_k v_kn v_knᵀ = blockdiag_e(w_ne Λ_ne)`` for every sample n.
        """
        root = self.output_hessian_root(output, target)
        samples, events, size, columns = root.shape
        if events == 1:
            return self.merge_events(root.permute(3, 0, 1, 2).contiguous(), output)
        vectors = root.new_zeros(events, columns, samples, events, size)
        vectors.diagonal(dim1=0, dim2=3).copy_(root.permute(3, 0, 2, 1))
        return self.merge_events(vectors.flatten(0, 1), output)

    @full_precision
    def root_inverse_apply(
        self, output: Tensor, cotangent: Tensor, target: Tensor | None = None
    ) -> Tensor:
        """Return coordinates of an output cotangent in the vectors of :meth:`root_vectors`.

        Args:
            output: Model output z.
            cotangent: Tensor of the shape of ``output`` in the range of w Λ (for Categorical: each
                event's entries sum to 0).
            target: Target y or None.

        Returns:
            u of shape (N, K) with ``Σ_k root_vectors_kn u_nk = cotangent_n``; zero where w = 0.
        """
        root = self.output_hessian_root(output, target)
        events = self.split_events(cotangent.to(root.dtype))
        found: Tensor = (torch.linalg.pinv(root) @ events.unsqueeze(-1)).flatten(1)
        return found

    def passing(self, output: Tensor, cotangent: Tensor) -> Tensor:
        """Return of a cotangent what the outputs let through, like z; all of it by default."""
        return cotangent

    @full_precision
    def sampled_vectors(
        self,
        output: Tensor,
        generator: torch.Generator | None = None,
        samples: int = 1,
        target: Tensor | None = None,
    ) -> Tensor:
        """Return random output vectors v with ``E[Σ_k v_kn v_knᵀ] = blockdiag_e(w_ne Λ_ne)``.

        These are the pseudo-gradients of the Monte-Carlo Fisher, ``(samples, *output.shape)``, each
        scaled by 1/√samples. They are not always ``gradient(output, sample(output))``: a weight w
        enters by its square root, and label smoothing and averaging must not bias them.
        """
        root = self.event_weights(output, target).sqrt().unsqueeze(-1) / samples**0.5
        draws = [
            self.merge_events(
                root * self.split_events(self.gradient(output, self.sample(output, generator))),
                output,
            )
            for _ in range(samples)
        ]
        return torch.stack(draws)

    @full_precision
    def infer_event_weights(
        self, output: Tensor, cotangent: Tensor, target: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the event weights and the loss scale behind an observed output gradient.

        Args:
            output: Model output z.
            cotangent: Gradient of the user's loss with respect to the output, same shape.
            target: Target y if it is known; None (default) infers what can be inferred.

        Returns:
            ``(weights, scale)``: the event weights, (N, E), or (N, E, C) where the entries of an
            event have weights of their own, and a scalar c such that the cotangent is
            ``c · gradient(output, y)`` for the true target y. Where c cannot be read off the
            cotangent it follows :attr:`reduction`: 1/count for "mean", 1 for "sum".

        Raises:
            ValueError: If the shapes differ, or the cotangent shows that classes lie along another
                dimension than the likelihood assumes.
        """
        self._check_cotangent(output, cotangent)
        weights = self.event_weights(output, target)
        usual = self._usual_scale(self.count(output, target))
        if target is None:
            return weights, usual
        gradient = self.gradient(output, target)
        cotangent = cotangent.to(gradient.dtype)
        return weights, positive_ratio((cotangent * gradient).sum(), gradient.square().sum(), usual)

    @full_precision
    def largest_decrement(
        self, output: Tensor, cotangent: Tensor, weights: Tensor, scale: Tensor
    ) -> Tensor:
        """Return a bound of ``(Δᵀ∇L)² / (count · ΔᵀFΔ)`` over all directions Δ, a float64 scalar.

        By the inequality of Cauchy and Schwarz it is ``Σ uᵀ(wΛ)⁻¹u`` with the gradients u at the
        output: Pearson's χ² of the events, times w and the squared scale. What is predicted
        wrongly and with confidence has next to no Λ, and a χ² far beyond what its loss can fall.
        So built-in likelihoods count no event with more than its deviance, twice what its loss is
        above the least one.

        Args:
            output: Model output z.
            cotangent: Gradient of the user's loss with respect to the output.
            weights: What :meth:`infer_event_weights` returned for both.
            scale: Likewise.
        """
        found = self.root_inverse_apply(output, cotangent).double().square()
        each = self.root_weights(weights, found.shape[1])
        return torch.where(each > 0, found / each, 0.0).sum()

    # -- layout ------------------------------------------------------------------------------------

    def split_events(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the output's shape as (N, E, C)."""
        return per_sample(tensor).unsqueeze(1)

    def merge_events(self, events: Tensor, output: Tensor) -> Tensor:
        """Undo :meth:`split_events`: ``(..., N, E, C)`` becomes ``(..., *output.shape)``."""
        return events.reshape(*events.shape[:-3], *output.shape)

    def spread(self, weights: Tensor, output: Tensor) -> Tensor:
        """Return event weights, (N, E) or (N, E, C), as one per entry of the output."""
        events = self.split_events(output)
        weights = weights.to(output.device)
        weights = weights if weights.dim() == 3 else weights.unsqueeze(-1)
        return self.merge_events(weights.expand(events.shape), output)

    def root_weights(self, weights: Tensor, vectors: int) -> Tensor:
        """Return the weight of every one of so many :meth:`root_vectors`, (N, K)."""
        if weights.dim() == 3:
            return weights.flatten(1)
        return weights.repeat_interleave(vectors // weights.shape[1], dim=1)

    # -- helpers -----------------------------------------------------------------------------------

    def __repr__(self) -> str:
        if not dataclasses.is_dataclass(self):
            return super().__repr__()
        shown = []
        for field in dataclasses.fields(cast(Any, self)):
            value = getattr(self, field.name)
            if value == field.default:
                continue
            if isinstance(value, tuple) and len(value) > 6:
                shown.append(f"{field.name}=<{len(value)} values>")
            else:
                shown.append(f"{field.name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"

    def _check_cotangent(self, output: Tensor, cotangent: Tensor) -> None:
        if cotangent.shape != output.shape:
            raise ValueError(
                f"The cotangent must have the output's shape {tuple(output.shape)} but has "
                f"{tuple(cotangent.shape)}."
            )

    def _check_reduction(self) -> None:
        if self.reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum' but is {self.reduction!r}.")

    def _usual_scale(self, count: Tensor) -> Tensor:
        """Return the loss scale that :attr:`reduction` promises."""
        return count.reciprocal() if self.reduction == "mean" else torch.ones_like(count)


def _working_dtype(output: Tensor) -> torch.dtype:
    """Return the dtype that :func:`full_precision` gives to an output."""
    return torch.float32 if output.dtype in (torch.float16, torch.bfloat16) else output.dtype


def per_sample(tensor: Tensor) -> Tensor:
    """Return a tensor ``(N, ...)``, or ``(N,)``, as ``(N, C)``."""
    return tensor.flatten(1) if tensor.dim() > 1 else tensor.unsqueeze(-1)


def positive_ratio(numerator: Tensor, denominator: Tensor, otherwise: Tensor) -> Tensor:
    """Return numerator/denominator, or ``otherwise`` where that is not a positive finite number."""
    ratio = numerator / denominator
    return torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, otherwise)


def root_floor(dtype: torch.dtype) -> float:
    """Return the floor under the curvature of one output in square roots: the dtype's eps².

    It keeps the root invertible for saturated outputs and moves Λ by less than rounding does.
    """
    return torch.finfo(dtype).eps ** 2
