"""The optimizer every natural-gradient method is a composition of."""

from __future__ import annotations

import dataclasses
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, overload

import torch
from torch import Tensor, nn

from natgrad.arguments import check_kind, check_range, check_rate
from natgrad.capture.hooks import outside_graphs
from natgrad.capture.model_output import unwrap
from natgrad.curvature import Structure, as_structure
from natgrad.distributed.shards import whole
from natgrad.fisher import FisherType
from natgrad.likelihoods import LikelihoodLike
from natgrad.optim.checkpoints import CheckpointedOptimizer, only_initialises
from natgrad.optim.copying import CopiedByState
from natgrad.optim.eager import plain_step
from natgrad.optim.options import Fallback, Refresh, StepRule, check_options
from natgrad.optim.parameter_groups import (
    check_group,
    first_order_names,
    make_fallback,
    members,
    split_groups,
)
from natgrad.optim.preconditioner import Preconditioner
from natgrad.optim.step.compared_step import ComparedStep
from natgrad.optim.step.grafting import AdamMoments, grafted
from natgrad.optim.step.groups import PreconditionedGroups, rate_of
from natgrad.optim.step.isotropic_rate import IsotropyProbe, is_isotropic
from natgrad.optim.step.levenberg_marquardt import LevenbergMarquardt
from natgrad.optim.step.measured_length import LengthState, MeasuredLength
from natgrad.optim.step.measures import (
    Measures,
    all_finite,
    clip_scales,
    damped_model,
    measure,
    on_host,
    scalar_checks,
)
from natgrad.optim.step.plan import StepPlan
from natgrad.optim.step.reevaluation import Reevaluation, as_float, evaluated
from natgrad.optim.step.relative_damping import RelativeDamping
from natgrad.optim.summary import Summary, summarize

__all__ = ["Method", "NaturalGradient"]


class _Default:
    """Stands for what an optimizer's method says."""

    def __repr__(self) -> str:
        return "<default of the method>"


_DEFAULT: Any = _Default()


@dataclass(frozen=True)
class Method:
    """What a natural-gradient method is made of, and the defaults of its optimizer.

    Attributes:
        structure: Which entries of the Fisher matrix are kept, and how they are inverted.
        lr: Learning rate.
        damping: λ, or the rule that adapts it.
        momentum: μ.
        weight_decay: w.
        fisher: Which vectors are pulled back.
        kl_clip: Bound on the predicted change of the output distribution per step.
        refresh: When curvature is updated, averaged and inverted.
        step_rule: How a natural gradient becomes a step.
    """

    structure: str | Structure = "kfac"
    lr: float | Tensor | Literal["isotropic"] = 0.1
    damping: float | RelativeDamping | LevenbergMarquardt = 1e-3
    momentum: float = 0.0
    weight_decay: float = 0.0
    fisher: str | FisherType = "exact"
    kl_clip: float | None = None
    refresh: Refresh = Refresh()  # noqa: RUF009, frozen
    step_rule: StepRule = StepRule()  # noqa: RUF009, frozen

    def __post_init__(self) -> None:
        """Check that groups of options are groups of options."""
        check_kind("refresh", self.refresh, Refresh)
        check_kind("step_rule", self.step_rule, StepRule)


class NaturalGradient(CheckpointedOptimizer, CopiedByState):
    r"""Natural gradient descent with any structure of the Fisher matrix.

    .. math::
        m \leftarrow \mu m + (\hat F + \lambda I)^{-1} \nabla L, \qquad
        \theta \leftarrow (1 - \eta w) \theta - \eta m

    A step whose gradient is not finite is skipped: parameters, momentum and curvature stay as they
    were. Parameters no layer kind covers are trained by a first-order fallback and reported once,
    by name. Named methods are subclasses that say nothing but their defaults.

    Args:
        model: The model to train (not its parameters: curvature comes from its layers).
        likelihood: ``"categorical"``, ``"gaussian"``, ``"bernoulli"``, ``"poisson"``, a
            :class:`natgrad.Likelihood`, or a torch loss module such as ``nn.MSELoss()``; for a
            model with several outputs a mapping from their keys to such, see
            :class:`natgrad.likelihoods.Heads`.
        structure: A name in :data:`natgrad.curvature.STRUCTURES`, or a
            :class:`natgrad.curvature.Structure` with options of its own.
        lr: Learning rate η, a number or a tensor of one. ``"isotropic"`` takes 1/α, with α measured
            on the first batch (see :func:`natgrad.ntk.isotropy`): the rate at which a wide network
            fits the batch in one step of the squared loss. The groups' ``lr`` is then 1, in units
            of 1/α, so that schedulers work as factors.
        damping: λ, in the units of F; a :class:`natgrad.RelativeDamping`, a share of F's mean
            eigenvalue; or a :class:`natgrad.LevenbergMarquardt` rule that adapts λ, for which
            ``step`` needs a closure. The λ of all groups rise and fall together.
        momentum: μ.
        weight_decay: Weight decay w.
        fisher: ``"exact"``, ``"mc"``, ``"empirical"``, ``"improved"`` or a
            :class:`natgrad.fisher.FisherType` with options of its own.
        kl_clip: Bound on ``η² ΔᵀFΔ``, twice the change (Kullback-Leibler divergence) of the
            output distribution that the curvature predicts for a step; larger steps are scaled
            down to it, before momentum. None for no bound.
        refresh: When curvature is updated, averaged and inverted, a :class:`natgrad.Refresh`.
        step_rule: How a natural gradient becomes a step, a :class:`natgrad.StepRule`: its length,
            the kind of momentum and decay, further bounds, grafting.
        fallback: Optimizer of parameters that are not preconditioned: ``"adamw"``, ``"sgd"`` or a
            :class:`natgrad.Fallback` with a learning rate of its own.
        params: Parameter groups with options of their own, as a list of dicts. A group says what
            it holds by ``"modules"`` (a list of modules), ``"params"`` (a name pattern such as
            ``"encoder.*"``, a list of patterns, or a list of parameters) and may set ``lr``,
            ``momentum``, ``weight_decay``, ``damping`` and ``preconditioned=False`` (train it by
            the fallback). All other parameters form the last group.
        output: Picks the tensor the likelihood looks at out of the model's output.
        batch_dim: The dimension of that tensor, and of targets of as many dimensions, that holds
            the samples; by default the first, or the second where they turn out to lie there.
        seed: Seed of the sampled labels; the global random state is never used.
        process_group: Processes that train replicas of the model and take the same steps; by
            default those of a model in DistributedDataParallel, and no others.

    Raises:
        TypeError: If ``model`` is not a module, or the structure is of another kind than the
            method's.
        ValueError: If an argument is out of range or a group matches nothing.
    """

    #: What turns gradients into natural ones.
    preconditioner_type: ClassVar[type[Preconditioner]] = Preconditioner
    #: What the optimizer is made of.
    method: ClassVar[Method] = Method()

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Tell where an option belongs that is none of the optimizer's."""
        defaults: dict[str, Any] = {}
        own = cls.__mro__[: cls.__mro__.index(NaturalGradient) + 1]
        for made in (vars(one)["__init__"] for one in own if "__init__" in vars(one)):
            for parameter in list(inspect.signature(made).parameters.values())[1:]:
                if parameter.kind is not parameter.VAR_KEYWORD:
                    default = getattr(cls.method, parameter.name, parameter.default)
                    defaults.setdefault(parameter.name, default)
        check_options(cls.__name__, kwargs, defaults)
        return super().__new__(cls, *args, **kwargs)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Show the method's defaults in the signature."""
        super().__init_subclass__(**kwargs)
        if "method" in cls.__dict__ and "__init__" not in cls.__dict__:
            cls.__signature__ = _signature(cls.method)  # type: ignore[attr-defined]

    def __init__(
        self,
        model: nn.Module,
        likelihood: LikelihoodLike = "categorical",
        *,
        structure: str | Structure = _DEFAULT,
        lr: float | Tensor | Literal["isotropic"] = _DEFAULT,
        damping: float | RelativeDamping | LevenbergMarquardt = _DEFAULT,
        momentum: float = _DEFAULT,
        weight_decay: float = _DEFAULT,
        fisher: str | FisherType = _DEFAULT,
        kl_clip: float | None = _DEFAULT,
        refresh: Refresh = _DEFAULT,
        step_rule: StepRule = _DEFAULT,
        fallback: Literal["adamw", "sgd"] | Fallback = "adamw",
        params: Iterable[dict[str, Any]] | None = None,
        output: Callable[[Any], Tensor] | None = None,
        batch_dim: int | None = None,
        seed: int = 0,
        process_group: Any = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"{type(self).__name__} takes the model itself, not its parameters: got "
                f"{type(model).__name__}"
            )
        method = self._composed(
            structure=structure, lr=lr, damping=damping, momentum=momentum,
            weight_decay=weight_decay, fisher=fisher, kl_clip=kl_clip, refresh=refresh,
            step_rule=step_rule,
        )  # fmt: skip
        rule, damping = method.step_rule, method.damping
        measured = is_isotropic(method.lr)
        lr = 1.0 if isinstance(method.lr, str) else method.lr
        check_rate("lr", lr)
        check_range("momentum", method.momentum, below=1.0)
        check_range("weight_decay", method.weight_decay)
        if method.kl_clip is not None:
            check_range("kl_clip", method.kl_clip)
        if measured:
            if step_rule is _DEFAULT and rule.measured is not None:  # α takes its place.
                rule = dataclasses.replace(rule, length="lr")
            rule.check_isotropic()
        if getattr(method.structure, "fused", False):
            rule.check_fused()
        self.step_rule = rule
        self.levenberg_marquardt = damping if isinstance(damping, LevenbergMarquardt) else None
        if isinstance(damping, LevenbergMarquardt):
            damping = damping.initial
        self._relative_damping = isinstance(damping, RelativeDamping)
        if isinstance(damping, RelativeDamping):
            damping = damping.share
        #: tr F/P at the last factorisation; None until it is known or where nothing depends on it.
        self._mean_eigenvalue: float | None = None
        self._length = LengthState(caution=rule.measured.start if rule.measured else 1.0)
        params = list(params or [])
        self.preconditioner = self.preconditioner_type(
            model,
            likelihood,
            structure=method.structure,
            fisher=method.fisher,
            damping=damping,
            refresh=method.refresh,
            output=output,
            batch_dim=batch_dim,
            seed=seed,
            excluded=first_order_names(unwrap(model), params),
            process_group=process_group,
        )
        self.preconditioner.observer.fisher.check_method(method)
        self.model = self.preconditioner.model
        self._names = {p: n for n, p in self.preconditioner.parameters.items()}
        defaults = {
            "lr": lr,
            "momentum": method.momentum,
            "weight_decay": method.weight_decay,
            "damping": damping,
            "kl_clip": method.kl_clip,
            "preconditioned": True,
            # What lr is multiplied by; None until it is measured.
            "unit": None if measured else 1.0,
        }
        uncovered = self.preconditioner.capture.uncovered
        groups, first_order = split_groups(self.model, defaults, uncovered, params)
        rules = (LevenbergMarquardt, RelativeDamping)
        if any(isinstance(group.get("damping"), rules) for group in groups):
            raise ValueError(
                "the damping of a parameter group must be a number: a rule, given as the "
                "optimizer's damping, is that of all groups together"
            )
        chosen = fallback if isinstance(fallback, Fallback) else Fallback(fallback)
        self.fallback_name = chosen.name
        self._fallback = make_fallback(chosen, first_order or [{"params": []}])
        if first_order:
            groups += self._fallback.param_groups
        #: Parameters that joined a group by themselves, and those of natural groups without rows.
        self._joined: set[Tensor] = set()
        self._left_out: set[str] = set()
        self._shadowed: set[Tensor] = set()
        self._constructed = False
        super().__init__(groups, defaults)
        self._constructed, self._groups_made = True, len(self.param_groups)
        self._told = set(uncovered)
        self._link_fallback()
        self._set_damping()
        self.preconditioner.on_change = self._follow_model
        self._skipped = 0
        #: Whether the last batch had a loss or gradient that is not finite.
        self._broken = False
        self._told_trouble = False
        self._adam_moments = AdamMoments(rule.graft_betas)
        #: Share of ``lr`` that the last line search took; 0 if nothing moved, None without one.
        self.searched_share: float | None = None
        observer = self.preconditioner.observer
        observer.wants_batch_fisher = self._wants_batch_fisher
        observer.exact_batch_fisher = self._needs_batch_fisher
        if measured:
            observer.isotropy_probe = IsotropyProbe(seed)
        if uncovered:
            self._tell_first_order(uncovered)

    def _composed(self, **given: Any) -> Method:
        """Return the method with what was given in place of its defaults."""
        changes = {name: value for name, value in given.items() if value is not _DEFAULT}
        own = as_structure(self.method.structure, training=True)
        takes_any = self.method is NaturalGradient.method
        if takes_any or "structure" not in changes:
            chosen = as_structure(changes.get("structure", own), training=True)
        else:
            chosen = changes["structure"]
            if not isinstance(chosen, type(own)):
                raise TypeError(
                    f"the structure of {type(self).__name__} must be a {type(own).__name__}, got "
                    f"{chosen!r}: NaturalGradient takes any"
                )
        return dataclasses.replace(self.method, **{**changes, "structure": chosen})

    # What users may tell.

    def loss(self, criterion: Callable[[Any, Any], Tensor], output: Any, target: Any) -> Tensor:
        """Return ``criterion(output, target)`` and let curvature see the true target.

        The plain loop needs this only where targets cannot be read off the loss gradient: label
        smoothing together with class weights, or weights of samples in a regression.
        """
        return self.preconditioner.loss(criterion, output, target)

    def update_fisher(self, output: Any, target: Any = None) -> None:
        """Update curvature from ``output`` now, before ``loss.backward()``.

        The plain loop needs this only where the hooks cannot see the model's output.
        """
        self.preconditioner.update_fisher(output, target)

    @outside_graphs
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset all gradients; a backward pass that no step followed leaves curvature too."""
        super().zero_grad(set_to_none)
        self.preconditioner.discard()

    # The step.

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @outside_graphs
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step.

        It waits for the device once, for the numbers that decide about the step; again only if a
        factorisation failed, or where the loss itself is evaluated.

        Args:
            closure: Evaluates the model, backpropagates and returns the loss. Adaptive damping
                evaluates it a second time on steps that adapt, a line search once per length
                tried: with the same random numbers, and without a trace in buffers and gradients.
                It may also return the loss with its graph and leave ``backward`` to this method,
                which saves the backward passes of a line search's trials.

        Returns:
            The closure's loss, or None.

        Raises:
            ValueError: If damping is adaptive or lengths are searched, and there is no closure, or
                none that makes gradients.
        """
        return self._step(closure)  # Which subclasses extend: around this one torch calls hooks.

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        if closure is None and not self.preconditioner.observer.seen and only_initialises(self):
            self._initialise()
            return None
        reevaluation = self._reevaluation(closure)
        loss, backpropagates = self._evaluated(closure)
        self.preconditioner.audit()
        lost = self.preconditioner.newly_untrusted()
        gradients = self._gradients(preconditioned=True)
        if lost and self.preconditioner.curvature.structure.joint:
            gradients = {}  # What is known of this batch is of other parameters together.
        rest = self._gradients(preconditioned=False)
        self._find_damping_unit()
        self._set_damping()
        if self.preconditioner.observer.warmup > 0:
            self._warm_up([*gradients.values(), *rest.values()], loss)
            return loss
        plan = self._plan(gradients, rest, loss)
        if plan is None:
            return loss
        batch, inverts = self.preconditioner.observer.batch_fisher, self.preconditioner.inverts
        self.preconditioner.finish()
        if reevaluation is None or closure is None or loss is None or not gradients:
            for update in plan.updates(self._grouped()):
                update.apply()
        else:
            before = as_float(loss)
            compared = ComparedStep(
                plan,
                self._grouped(),
                {n: self.preconditioner.parameters[n].clone() for n in gradients},
                lambda: reevaluation(closure, backpropagates) - before,
                self.levenberg_marquardt,
                batch,
            )
            with self.preconditioner.observer.paused():
                if self.step_rule.search is not None:
                    self.searched_share = compared.search(self.step_rule.search)
                else:
                    compared.take()
        self._step_fallback()
        curvature = self.preconditioner.curvature
        if inverts and curvature.is_divided and not curvature.is_spread:
            # Processors that round differently would drift apart.
            groups = [group for group in self.param_groups if group["preconditioned"]]
            moved = [p for group in groups for p in group["params"] if p.requires_grad]
            self.preconditioner.replicas.follow_first(moved)
        return loss

    def _evaluated(self, closure: Callable[[], Any] | None) -> tuple[Any, bool]:
        """Return a closure's loss, backpropagated, and whether the closure itself did that."""
        if closure is None:
            return None, True
        searches = self.step_rule.search is not None
        if searches:
            self.searched_share = None
            self.zero_grad()  # The gradient must be that of the loss the trials are compared with.
        parameters = [p for group in self.param_groups for p in group["params"]]
        loss, backpropagates = evaluated(closure, parameters)
        if searches and backpropagates and all(p.grad is None for p in parameters):
            raise ValueError(
                "the closure must call backward(), or return the loss as a tensor with its graph: "
                "it did neither, so there is no gradient"
            )
        return loss, backpropagates

    def _gradients(self, preconditioned: bool) -> dict[str, Tensor]:
        """Return parameter name → ``.grad`` of the preconditioned or of all other parameters."""
        found = {}
        for group in self.param_groups:
            for p in group["params"]:
                name = self._names[p]
                natural = group["preconditioned"] and name not in self._left_out
                if natural is preconditioned and p.grad is not None and p.requires_grad:
                    if p.grad.is_sparse:
                        p.grad = p.grad.to_dense()
                    found[name] = whole(p.grad) if preconditioned else p.grad
        return found

    def _plan(
        self, covered: dict[str, Tensor], rest: dict[str, Tensor], loss: float | Tensor | None
    ) -> StepPlan | None:
        """Return the step to take; None if it is skipped.

        Args:
            covered: Parameter name → gradient of the preconditioned parameters.
            rest: Likewise of all others.
            loss: The closure's loss.
        """
        grouped, preconditioner, rule = self._grouped(), self.preconditioner, self.step_rule
        if not self._has_batch_fisher():
            return None
        gradients = grouped.with_penalty(covered)
        source = gradients
        state: dict[str, dict[str, Any]] = {}
        if rule.momentum_on == "gradient":
            source, state = grouped.summed(gradients)
        for carefully in (False, True):
            natural, failed = preconditioner.natural_gradient(
                source, backpropagated=source is covered, carefully=carefully
            )
            natural = {n: natural[n] for n in covered}
            if not preconditioner.curvature.is_divided:
                grouped.replicas.average(natural)
            if rule.graft is not None:
                natural = self._graft(natural, gradients, source, state)
            directions = self._directions(natural, grouped)
            measures = rule.measured is not None and preconditioner.observer.keeps_batch_fisher
            scale = preconditioner.batch_scale(covered) if measures else None
            values = measure(preconditioner, grouped, directions, gradients, source, scale)
            if self._relative_damping and preconditioner.inverts:
                values["mean_eigenvalue"] = preconditioner.mean_eigenvalue()
            checks = {**scalar_checks(rest.values(), loss), "failed": failed}
            grouped.replicas.average(checks)  # What one finds broken is broken for all.
            found = on_host({**values, **checks})
            mean_eigenvalue = found.pop("mean_eigenvalue", math.nan)
            if not found.pop("failed"):
                break
        own = {name: found[name] for name in ("fisher", "scale") if name in found}
        if rule.measured is not None and not all_finite(own):  # A fault of natgrad's own pass.
            found = {name: value for name, value in found.items() if name not in own}
        if not all_finite(found):
            self._give_up_step(grouped)
            return None
        self._broken = False
        coefficients: list[float] | None = [-1.0]
        if rule.measured is not None:
            coefficients = self._measured_coefficients(rule.measured, found, grouped)
            if coefficients is None:
                return None
        elif "fisher" in found:
            coefficients = damped_model(found, grouped.dampings).minimiser()
        if coefficients is None:
            self._skip("its quadratic model predicted no decrease of the loss")
            return None
        if 0 < mean_eigenvalue < math.inf:  # A batch in which nothing counts has none.
            self._mean_eigenvalue = mean_eigenvalue
        if preconditioner.observer.isotropy_probe is not None:
            self._set_unit()
        scales = clip_scales(found, coefficients, grouped)
        return StepPlan(gradients, state, directions, coefficients, scales)

    def _measured_coefficients(
        self, rule: MeasuredLength, found: Measures, grouped: PreconditionedGroups
    ) -> list[float] | None:
        """Return −α; None if the last step went too far and is taken back instead."""
        along, inner = found.get("along", 0.0), found.get("inner", 0.0)
        share = self._length.share_kept(rule, along)
        if share < 1:
            self._take_back(grouped, share)
            return None
        state = self._length.met(rule, inner)
        if "fisher" in found:
            terms = zip(grouped.dampings, found["grams"], strict=True)
            damped = found["scale"] * sum(d * gram[0][0] for d, gram in terms)
            square = found["fisher"] + damped
            state = state.measured(rule, inner, square, found["scale"], found["largest"])
        pairs = zip(grouped.groups, found.get("changes", ()), strict=False)
        changes = sorted(rate_of(group) * change for group, pair in pairs for change in pair)
        length = state.length(inner, changes[-2] if changes else 0.0)
        rates = [rate_of(group) * (1.0 - group["momentum"]) for group in grouped.groups]
        kept = max((group["momentum"] for group in grouped.groups), default=0.0)
        slope = max(rates, default=0.0) * length * inner + kept * max(0.0, -along)
        self._length = state.taken(rule, slope)
        return [-length]

    def _take_back(self, grouped: PreconditionedGroups, share: float) -> None:
        """Keep a share of the last step, and take none now."""
        self._shorten_last_step(grouped, share)
        self.preconditioner.skip()
        if self._length.is_troubled() and not self._told_trouble:
            self._told_trouble = True
            warnings.warn(
                f"{type(self).__name__} took back {self._length.taken_back} of its "
                f"{self._length.steps} steps, as the next gradient showed that they went too far: "
                "they get shorter until that ends; a lower lr, more damping or a more frequent "
                "refresh may train faster",
                stacklevel=5,
            )

    def _give_up_step(self, grouped: PreconditionedGroups) -> None:
        """Take no step; where the batch before broke as well, not the last one taken either."""
        again, self._broken = self._broken, True
        if not again or self._length.slope is None:
            self._skip()
            return
        self._shorten_last_step(grouped, 0.0)
        self._skip(
            "its loss or gradient was NaN or infinite", "and the step before it was taken back"
        )

    def _shorten_last_step(self, grouped: PreconditionedGroups, share: float) -> None:
        grouped.shorten_last_step(share)
        self._length = self._length.shortened(share, grouped.largest_rate)

    def _grouped(self) -> PreconditionedGroups:
        return PreconditionedGroups(
            [group for group in self.param_groups if group["preconditioned"]],
            self._names,
            self.preconditioner.parameters,
            self.state,
            self.step_rule,
            self.preconditioner.replicas,
            self._left_out,
            self._damping_unit,
        )

    def _directions(
        self, natural: dict[str, Tensor], grouped: PreconditionedGroups
    ) -> list[dict[str, Tensor]]:
        """Return Δ and, where the quadratic model chooses momentum, the last step."""
        previous = grouped.previous_steps(natural) if self.step_rule.keeps_steps else {}
        return [natural, previous] if previous else [natural]

    def _has_batch_fisher(self) -> bool:
        """Return whether the Fisher matrix of the batch is there on steps that need it.

        A batch in which no sample counts has none, so that the step is skipped.
        """
        observer = self.preconditioner.observer
        if not (observer.keeps_batch_fisher and self._needs_batch_fisher):
            return True
        self.preconditioner.update_curvature()
        replicas = self.preconditioner.replicas
        if replicas.any(observer.batch_fisher is not None, self.preconditioner.device):
            observer.take_part()
            return True
        if observer.seen or not replicas.are_alone:
            self._skip("no sample of its batch counts")
            return False
        self.preconditioner.skip()
        raise ValueError(
            "no backward pass through the model's output was seen, so there is no Fisher matrix of "
            "the batch for the quadratic model: call the model itself (not its parts), pass "
            "output=lambda out: ... if the output is not the first tensor, or call "
            "update_fisher(output) before loss.backward()"
        )

    def _graft(
        self,
        natural: dict[str, Tensor],
        gradients: dict[str, Tensor],
        source: dict[str, Tensor],
        state: dict[str, dict[str, Any]],
    ) -> dict[str, Tensor]:
        """Return natural gradients of grafted length; Adam's moments go to ``state``."""
        if self.step_rule.graft == "sgd":
            return grafted(natural, source)
        lengths = {}
        for name, gradient in gradients.items():
            old = self.state.get(self.preconditioner.parameters[name], {})
            moments = self._adam_moments.following(old, gradient)
            state.setdefault(name, {}).update(moments)
            lengths[name] = self._adam_moments.direction(moments)
        return grafted(natural, lengths)

    def _warm_up(self, gradients: list[Tensor], loss: float | Tensor | None) -> None:
        """Update the curvature and let the fallback alone train."""
        self.preconditioner.update_curvature()
        sums = scalar_checks(gradients, loss)
        self.preconditioner.replicas.average(sums)
        if sums and not all_finite(on_host(sums)):
            self._skip()
            return
        self.preconditioner.drop_unusable()
        self.preconditioner.finish()
        self._step_fallback()

    def _set_unit(self) -> None:
        """Measure α and take 1/α as the unit of the learning rates."""
        measured = self.preconditioner.measure_isotropy()
        alpha, deviation = measured if measured is not None else (float("nan"), 0.0)
        value = {"alpha": torch.tensor(alpha, dtype=torch.float64)}
        self.preconditioner.replicas.average(value)
        alpha = float(value["alpha"])
        if not 0 < alpha < float("inf"):
            self.preconditioner.skip()
            raise ValueError(
                f"lr='isotropic' found α = {alpha:.3g} on the first batch, which gives no learning "
                "rate: give lr as a number (natgrad.ntk.isotropy(model, x, structure) tells more)"
            )
        if deviation > 0.5:
            warnings.warn(
                f"the coefficients of {self.preconditioner.curvature.structure.name!r} deviate by "
                f"about {100 * deviation:.0f} % from α times the identity, so lr = 1/α = "
                f"{1 / alpha:.3g} is not backed by theory: natgrad.ntk.isotropy(model, x, "
                "structure) tells which layer breaks the condition",
                stacklevel=4,
            )
        self.preconditioner.observer.isotropy_probe = None
        for group in self.param_groups:
            if group["preconditioned"]:
                group["unit"] = 1.0 / alpha

    def _reevaluation(self, closure: Callable[[], float] | None) -> Reevaluation | None:
        """Return how to evaluate the closure again, on steps that are held against the loss."""
        rule, searches = self.levenberg_marquardt, self.step_rule.search is not None
        if rule is None and not searches:
            return None
        if closure is None:
            chosen = "a line search" if searches else "damping by LevenbergMarquardt"
            raise ValueError(
                f"{chosen} compares losses before and after a step, so step() needs a closure that "
                "evaluates the model, backpropagates and returns the loss (which a GradScaler does "
                "not pass on)"
            )
        observer = self.preconditioner.observer
        due = searches or (rule is not None and (observer.steps + 1) % rule.interval == 0)
        return Reevaluation(self.model) if due and observer.warmup == 0 else None

    def _skip(
        self,
        reason: str = "its loss or gradient was NaN or infinite",
        outcome: str = "parameters and state are unchanged",
    ) -> None:
        self.preconditioner.skip()
        self._skipped += 1
        if self._skipped == 1:
            warnings.warn(
                f"{type(self).__name__} skipped a step because {reason}; {outcome}",
                stacklevel=4,
            )

    def _wants_batch_fisher(self, step: int) -> bool:
        """Return whether the rows of the batch are kept at a step, for length or damping."""
        rule, adapts = self.step_rule, self.levenberg_marquardt
        if rule.uses_model:
            return True
        if adapts is not None and (step + 1) % adapts.interval == 0:
            return True
        follows = self.preconditioner.curvature.structure.follows_updates
        refresh = self.preconditioner.refresh
        return rule.measured is not None and rule.measured.is_due(step, refresh, follows)

    @property
    def _needs_batch_fisher(self) -> bool:
        """Whether there is no step without the rows of the batch where these are wanted."""
        return self.step_rule.uses_model or self.levenberg_marquardt is not None

    @property
    def _damping_unit(self) -> float:
        """What the groups' damping is multiplied by."""
        known = self._relative_damping and self._mean_eigenvalue is not None
        return float(self._mean_eigenvalue) if known and self._mean_eigenvalue else 1.0

    @property
    def _units(self) -> dict[str, bool]:
        """What the learning rates and dampings of the groups are factors on."""
        measured = self.step_rule.measured is not None
        return {"measured_length": measured, "relative_damping": self._relative_damping}

    def _find_damping_unit(self) -> None:
        """Wait for the mean eigenvalue before the first factorisation; later ones come along."""
        if self._relative_damping and self._mean_eigenvalue is None:
            found = float(self.preconditioner.mean_eigenvalue())
            self._mean_eigenvalue = found if math.isfinite(found) and found > 0 else None

    def _set_damping(self) -> None:
        """Collect each block's damping from its parameter group."""
        by_parameter: dict[str, float] = {}
        grouped = self._grouped()
        for names, damping in zip(grouped.group_names, grouped.dampings, strict=True):
            by_parameter.update(dict.fromkeys(names, damping))
        self.preconditioner.damping = {
            name: by_parameter.get(block.names[0], self.defaults["damping"])
            for name, block in self.preconditioner.curvature.blocks.items()
        }

    # State.

    def _link_fallback(self) -> None:
        """Let the fallback work on its own groups, and on parameters of others without rows."""
        natural = [group for group in self.param_groups if group["preconditioned"]]
        before, covered = self._shadowed, self.preconditioner.covered
        self._left_out = {self._names[p] for g in natural for p in g["params"]} - covered
        self._shadows = []
        for group in natural:
            own = [p for p in group["params"] if p.numel() and p.requires_grad]
            own = [p for p in own if self._names[p] in self._left_out]
            shadow = {**self._fallback.defaults, "params": own}
            if group["weight_decay"] == 0 < self.defaults["weight_decay"]:
                shadow["weight_decay"] = 0.0
            self._shadows += [(shadow, group)] if own else []
        self._shadowed = {p for shadow, _ in self._shadows for p in shadow["params"]}
        for parameter in before ^ self._shadowed:  # One rule's momentum is not the other's.
            self.state.pop(parameter, None)
        first_order = [group for group in self.param_groups if not group["preconditioned"]]
        self._fallback.param_groups = first_order + [shadow for shadow, _ in self._shadows]
        self._fallback.state = self.state

    def _step_fallback(self) -> None:
        """Let the fallback train what is not preconditioned, at rates that follow their groups'."""
        if not any(group["params"] for group in self._fallback.param_groups):
            return
        for shadow, group in self._shadows:
            relative = float(group["lr"]) / group["first_lr"] if group["first_lr"] else 1.0
            shadow["lr"] = self._fallback.defaults["lr"] * relative
        plain_step(self._fallback)  # Hooks are of this step.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters of the model, as of a layer that is trained from now on.

        Args:
            param_group: What a group of ``params`` may be: a dict with ``"params"`` (a parameter,
                parameters, pairs of names and parameters, or name patterns) or ``"modules"``, and
                options. Parameters that had joined another group by themselves leave it.

        Raises:
            TypeError: If it is no dict.
            ValueError: If it holds something else than parameters of the model, parameters of
                another group, or an option that is unknown or out of range.
        """
        if not self._constructed:
            super().add_param_group(param_group)
            param_group.setdefault("first_lr", float(param_group["lr"]))
            return
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group).__name__}")
        self.preconditioner.parameters = dict(self.model.named_parameters())
        self._names.update({p: n for n, p in self.preconditioner.parameters.items()})
        chosen = members(self.model, param_group)
        options = {k: v for k, v in param_group.items() if k not in ("params", "modules")}
        check_group({**options, "params": []}, self.defaults)
        moving = {self.preconditioner.parameters[name] for name in chosen} & self._joined
        for group in self.param_groups:
            kept = [p for p in group["params"] if p not in moving]
            group["params"], group["param_names"] = kept, [self._names[p] for p in kept]
        self._joined -= moving
        found = [self.preconditioner.parameters[name] for name in chosen]
        if not options.get("preconditioned", True):
            options = {**self._fallback.defaults, **options, "preconditioned": False}
            self.preconditioner.excluded |= set(chosen)
        super().add_param_group({**options, "params": found, "param_names": chosen})
        self.param_groups[-1].setdefault("first_lr", float(self.param_groups[-1]["lr"]))
        param_group.update(self.param_groups[-1])
        self.preconditioner.find_layers()

    def regroup(self, groups: Iterable[Mapping[str, Any]]) -> None:
        """Take the parameter groups of a state dict, by the names of their parameters."""
        present, preconditioner = self.preconditioner.parameters, self.preconditioner
        self.param_groups = [
            {**group, "params": [present[name] for name in group["param_names"]]}
            for group in groups
        ]
        first_order = [g["param_names"] for g in self.param_groups if not g["preconditioned"]]
        left = preconditioner.covered & {name for names in first_order for name in names}
        if left:
            preconditioner.excluded |= left
            preconditioner.find_layers()
        self._link_fallback()

    def _follow_model(self) -> None:
        """Take up parameters that are trainable now, and those that replaced others."""
        present = self.preconditioner.parameters
        for group in self.param_groups:  # A parameter of the same name takes an old one's place.
            pairs = [(p, present.get(self._names[p], p)) for p in group["params"]]
            for old, new in pairs:
                if new is not old:
                    self.state.pop(old, None)
            group["params"] = [new for _, new in pairs]
        names = {p: n for n, p in present.items()}
        self._names = {**self._names, **names}
        held = {p for group in self.param_groups for p in group["params"]}
        joining = [p for p in names if p.requires_grad and p not in held]
        if joining:
            made = self.param_groups[: self._groups_made]  # The last of these held all the rest.
            home = ([g for g in made if g["preconditioned"]] or made)[-1]
            home["params"] += joining
            home["param_names"] += [names[p] for p in joining]
            self._joined.update(joining)
            listed = ", ".join(names[p] for p in joining)
            warnings.warn(
                f"{type(self).__name__} trains from now on, with the options it was made with, "
                f"parameters that were frozen or absent before: {listed} (add_param_group gives "
                "them options of their own)",
                stacklevel=2,
            )
        self._link_fallback()
        self._set_damping()
        reasons = {**self.preconditioner.capture.uncovered, **self.preconditioner.untrusted}
        new = {n: reasons[n] for n in self._left_out if n in reasons and n not in self._told}
        if new:
            self._told.update(new)
            self._tell_first_order(new)

    def _tell_first_order(self, reasons: Mapping[str, str]) -> None:
        listed = "; ".join(f"{name} ({why})" for name, why in reasons.items())
        warnings.warn(
            f"{type(self).__name__} trains these parameters by {self.fallback_name}: {listed}",
            stacklevel=4,
        )

    def _carrier(self) -> Tensor:
        for group in self.param_groups:  # The fallback looks whether a parameter has state.
            for p in group["params"] if group["preconditioned"] else ():
                if p.requires_grad and self._names[p] not in self._left_out:
                    return p
        return super()._carrier()

    def _initialise(self) -> None:
        """Make the state that a step would make, for distributed checkpoints to look at."""
        self._mark()
        grouped = self._grouped()
        for group in grouped.groups:
            for p in group["params"]:
                self.state[p].update(grouped.initial_state(p, group["momentum"]))
                if self.step_rule.graft == "adam":
                    self.state[p].update(self._adam_moments.initial(p))
        self._step_fallback()

    def _own_state(self) -> dict[str, Any]:
        return {
            **self.preconditioner.state_dict(),
            "units": self._units,
            "mean_eigenvalue": self._mean_eigenvalue,
            "length": self._length.state_dict(),
        }

    def _checked(self, own: Mapping[str, Any], state_dict: Mapping[str, Any]) -> Callable[[], None]:
        kinds = [group.get("preconditioned") for group in state_dict["param_groups"]]
        if kinds != [group["preconditioned"] for group in self.param_groups]:
            raise ValueError(
                "the checkpoint's parameter groups are not preconditioned where this optimizer's "
                "are: make the optimizer with the params= the checkpoint was saved with"
            )
        rest = self.preconditioner.checked(own)
        if own["units"] != self._units:
            raise ValueError(
                "the checkpoint's groups have learning rates and damping in other units than this "
                "optimizer's: make it with the step_rule= and damping= it was saved with"
            )
        unit, length = own["mean_eigenvalue"], LengthState.of(own["length"])

        def restore() -> None:
            loaded = dict(self.state)
            rest()
            self._mean_eigenvalue, self._length = unit, length
            self.state.update(loaded)
            self._link_fallback()
            self._set_damping()
            pending = any(g["unit"] is None for g in self.param_groups if g["preconditioned"])
            self.preconditioner.observer.isotropy_probe = IsotropyProbe() if pending else None

        return restore

    def summary(self, samples: int = 128) -> Summary:
        """Return, layer by layer, what is preconditioned, its factors, memory and cost.

        Args:
            samples: Batch size the costs are stated for.
        """
        return summarize(self.preconditioner, samples, fallback=self.fallback_name)


def _signature(method: Method) -> inspect.Signature:
    """Return the signature of :class:`NaturalGradient` with a method's defaults."""
    signature = inspect.signature(NaturalGradient.__init__)
    found = [
        one.replace(default=getattr(method, one.name)) if one.default is _DEFAULT else one
        for one in list(signature.parameters.values())[1:]
    ]
    return signature.replace(parameters=found)
