"""Fast natural gradient descent: coefficients of a first phase, kept for good."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from natgrad.arguments import check_integer
from natgrad.fisher import FisherType
from natgrad.fngd.coefficients import (
    CoefficientPreconditioner,
    Coefficients,
    DampingScale,
    Normalization,
    Share,
    SharedCoefficients,
)
from natgrad.fngd.weighted_gradients import CoefficientClock, WeightedGradient, weighable_layers
from natgrad.likelihoods import LikelihoodLike
from natgrad.optim.natural_gradient import NaturalGradient
from natgrad.optim.options import Fallback, StepRule
from natgrad.optim.step.isotropic_rate import is_isotropic
from natgrad.optim.step.measures import all_finite, on_host, scalar_checks
from natgrad.optim.step.plan import StepPlan

#: Entries from which on a tensor is large.
LARGE = 2**16


class FNGD(NaturalGradient):
    r"""Natural gradient descent at the cost of gradient descent.

    Layer by layer, the natural gradient of the empirical Fisher matrix is a weighted sum of the
    samples' gradients. Its coefficients ``c = (GGᵀ/N + λI)⁻¹1`` are computed during the first
    ``coefficient_steps`` steps only, usually one epoch, and shared by all later ones. There, the
    backward pass scales the rows of each layer by them on its way to the weight's gradient: no
    inverse, no second pass, no gradient per sample.

    Linear layers, convolutions and embeddings weigh each sample; all other layers (normalisation,
    attention, tied weights of unlike layers) weigh all samples by their mean coefficient. While
    coefficients are in use ``.grad`` holds the weighted gradient. Penalties in the loss are added
    to it as they are.

    The source shows that this works and leaves open how coefficients are shared, damped and scaled;
    the options below name the possibilities and ``benchmarks/shared_coefficients.py`` compares
    them. Where a loader shuffles, positions in a batch are exchangeable, so that coefficients by
    position tend to their mean, and the method to gradient descent with a fixed learning rate for
    every layer; ``share="mean"`` is exactly that. ``share="sample"`` alone keeps what belongs to a
    sample.

    Args:
        model: The model to train.
        likelihood: A name, a :class:`natgrad.Likelihood`, or a torch loss module.
        lr: Learning rate; with ``normalization`` other than "none" in the units of gradient
            descent.
        damping: Damping, in the units of ``damping_scale``.
        coefficient_steps: Steps that compute coefficients: the batches of one epoch.
        share: ``"position"``, ``"iteration"``, ``"sample"`` or ``"mean"``; see
            :class:`natgrad.fngd.coefficients.SharedCoefficients`. For "sample"
            call :meth:`set_indices` before every forward pass.
        damping_scale: ``"absolute"``, or ``"relative"`` to the mean eigenvalue of each layer's
            ``GGᵀ/N``: then the coefficients of a layer are inverse to its squared gradients however
            small these are, which harms networks with normalisation layers.
        normalization: ``"model"``, ``"layer"`` or ``"none"``: what the coefficients are divided by.
        refresh_interval: Steps between the beginnings of phases that compute coefficients anew, a
            multiple of the batches of an epoch; None for never.
        fisher: ``"empirical"``, or ``"improved"`` for coefficients that do not favour fitted
            samples.
        momentum: Momentum of the weighted gradient.
        nesterov: Whether momentum looks ahead.
        weight_decay: Decoupled weight decay.
        norm_clip: Bound on the Euclidean norm of the step. None for no bound.
        fallback: Optimizer of parameters that have no coefficients; see
            :class:`natgrad.NaturalGradient`, as for the rest.
        params: Parameter groups with options of their own.
        output: Picks the tensor the likelihood looks at out of the model's output.
        batch_dim: See :class:`natgrad.NaturalGradient`.
        seed: Seed of the signs of ``fisher="improved"``.
        process_group: See :class:`natgrad.NaturalGradient`.

    Raises:
        ValueError: If an argument is out of range or excluded; from ``step``, if ``share="sample"``
            and the indices are missing.

    Source: Ou, Zhu, Huang & Liu, Fast natural gradient descent (2024).

    Example:
        >>> optimizer = natgrad.FNGD(model, coefficient_steps=len(loader))
        >>> for x, y in loader:
        ...     optimizer.zero_grad()
        ...     cross_entropy(model(x), y).backward()
        ...     optimizer.step()
    """

    preconditioner_type: ClassVar[type[CoefficientPreconditioner]] = CoefficientPreconditioner

    def __init__(
        self,
        model: nn.Module,
        likelihood: LikelihoodLike = "categorical",
        *,
        lr: float | Tensor = 0.1,
        damping: float = 1.0,
        coefficient_steps: int = 100,
        share: Share = "position",
        damping_scale: DampingScale = "absolute",
        normalization: Normalization = "model",
        refresh_interval: int | None = None,
        fisher: str | FisherType = "empirical",
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        norm_clip: float | None = None,
        fallback: Literal["adamw", "sgd"] | Fallback = "adamw",
        params: Iterable[dict[str, Any]] | None = None,
        output: Callable[[Any], Tensor] | None = None,
        batch_dim: int | None = None,
        seed: int = 0,
        process_group: Any = None,
    ) -> None:
        check_integer("coefficient_steps", coefficient_steps)
        if refresh_interval is not None and not refresh_interval > coefficient_steps:
            raise ValueError(
                f"refresh_interval must be above coefficient_steps={coefficient_steps}, or None, "
                f"got {refresh_interval}"
            )
        if is_isotropic(lr) or not isinstance(damping, (int, float)):
            raise ValueError(
                "FNGD does not take lr='isotropic' or an adaptive damping: after its first steps "
                "it knows neither curvature nor the plain gradient"
            )
        if not damping > 0:
            raise ValueError(f"damping must be positive, got {damping}")
        super().__init__(
            model,
            likelihood,
            structure=SharedCoefficients(
                share=share, damping_scale=damping_scale, normalization=normalization
            ),
            lr=lr,
            damping=damping,
            momentum=momentum,
            weight_decay=weight_decay,
            fisher=fisher,
            step_rule=StepRule(nesterov=nesterov, norm_clip=norm_clip),
            fallback=fallback,
            params=params,
            output=output,
            batch_dim=batch_dim,
            seed=seed,
            process_group=process_group,
        )
        found = self.preconditioner.observer.fisher.name
        if found not in ("empirical", "improved"):
            raise ValueError(
                "FNGD needs rows that are multiples of the samples' gradients: fisher must be "
                f"'empirical' or 'improved', got {found!r}"
            )
        self.coefficient_steps: int = coefficient_steps
        self.refresh_interval: int | None = refresh_interval
        self.share = share
        self.preconditioner.observer.schedule = self.computes_coefficients
        self.clock: CoefficientClock = CoefficientClock(self.model, counts=share == "iteration")
        self._indices: list[Tensor] = []
        self._lay_backward_passes()

    @property
    def _coefficients(self) -> CoefficientPreconditioner:
        assert isinstance(self.preconditioner, CoefficientPreconditioner)
        return self.preconditioner

    def _lay_backward_passes(self) -> None:
        keeper = self._coefficients
        for name, block in keeper.capture.blocks.items():
            layers, layout = weighable_layers(block.uses), block.layout
            if layers and self.share != "mean":
                kept = functools.partial(_kept, keeper, name)
                keeper.own_backward[name] = WeightedGradient(layout, kept, layers, self.clock)

    def _follow_model(self) -> None:
        super()._follow_model()
        self.preconditioner.own_backward.remove()
        self._lay_backward_passes()

    def computes_coefficients(self, step: int) -> bool:
        """Return whether a step computes coefficients, counted from 0."""
        if self.refresh_interval is not None:
            step %= self.refresh_interval
        return step < self.coefficient_steps

    def coefficients(self) -> dict[str, Tensor]:
        """Return block name → mean coefficient: the factor on each layer's learning rate."""
        return self._coefficients.means()

    def set_indices(self, indices: Tensor) -> None:
        """Tell which samples of the data set the next forward pass is about.

        Args:
            indices: Indices, ``(N,)``, from 0 on. Needed for ``share="sample"``.
        """
        self.clock.indices = indices
        self._indices.append(indices)

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        """Take one step with the coefficients of its samples, and choose the next one's phase."""
        if self.share == "sample" and not self._indices:
            raise ValueError(
                "share='sample' got indices of no samples: call set_indices(indices) with the "
                "samples' indices in the data set before every forward pass"
            )
        self._coefficients.indices = torch.cat(self._indices) if self._indices else None
        try:
            result = super()._step(closure)
        except ValueError:
            self.preconditioner.skip()
            raise
        finally:
            self._indices = []
            self._coefficients.indices = self.clock.indices = None
        self._set_phase()
        return result

    def _plan(
        self, covered: dict[str, Tensor], rest: dict[str, Tensor], loss: float | Tensor | None
    ) -> StepPlan | None:
        """Return the step to take; with coefficients in use there is no curvature to look after."""
        if not self.clock.weighing or self.step_rule.norm_clip is not None:
            return super()._plan(covered, rest, loss)
        active = self.preconditioner.own_backward.active.keys()
        natural = self._coefficients.scaled(covered, active)
        self.preconditioner.replicas.average(natural)
        values = scalar_checks(rest.values(), loss)
        self.preconditioner.replicas.average(values)
        if natural:
            values["size"] = _squared_norm(natural.values())
        if values and not all_finite(on_host(values)):
            self._skip()
            return None
        groups = sum(group["preconditioned"] for group in self.param_groups)
        return StepPlan(covered, {}, [natural], [-1.0], [1.0] * groups)

    def _set_phase(self) -> None:
        """Take up or put down the coefficients, as the next step wants it."""
        computes = self.computes_coefficients(self.preconditioner.observer.steps)
        if computes and self.clock.weighing:
            self._coefficients.forget()
        if computes == self.clock.weighing:
            self.clock.weighing, self.clock.passes = not computes, 0

    def _own_state(self) -> dict[str, Any]:
        return {**super()._own_state(), "coefficient_passes": self.clock.passes}

    def _checked(self, own: Mapping[str, Any], state_dict: Mapping[str, Any]) -> Callable[[], None]:
        rest, passes = super()._checked(own, state_dict), own.get("coefficient_passes", 0)

        def restore() -> None:
            rest()
            self.clock.weighing = not self.computes_coefficients(self.preconditioner.observer.steps)
            self.clock.passes = passes

        return restore


def _kept(keeper: CoefficientPreconditioner, name: str) -> Coefficients:
    return keeper.coefficients[name]


def _squared_norm(values: Iterable[Tensor]) -> Tensor:
    """Return ``Σ ‖v‖²``: large tensors one by one, which is faster, small ones all together."""
    terms: list[Tensor] = []
    small: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for value in values:
        if value.numel() < LARGE:
            small.setdefault((value.device, value.dtype), []).append(value)
        else:
            terms.append(torch.dot(value.reshape(-1), value.reshape(-1)))
    terms += [torch.stack(list(torch._foreach_norm(v))).square().sum() for v in small.values()]
    return torch.stack([term.to(terms[0].device, torch.float64) for term in terms]).sum()
