"""The optimizer every natural-gradient method is a composition of."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal, overload

import torch
from torch import Tensor, nn

from natgrad.arguments import check_range, check_rate
from natgrad.capture.hooks import outside_graphs
from natgrad.capture.model_output import unwrap
from natgrad.curvature import Structure
from natgrad.curvature.sharing import SharedWork
from natgrad.fisher import FisherType
from natgrad.likelihoods import LikelihoodLike
from natgrad.optim.checkpoints import CopiedByState, only_initialises
from natgrad.optim.gradient_rows import batch_scale
from natgrad.optim.grouped_optimizer import GroupedOptimizer
from natgrad.optim.method import DEFAULT, Method, ShowsMethod
from natgrad.optim.options import Fallback, Refresh, StepRule
from natgrad.optim.parameter_groups import first_order_names, read_groups
from natgrad.optim.preconditioner import Preconditioner
from natgrad.optim.step.compared_step import ComparedStep
from natgrad.optim.step.damping import LevenbergMarquardt, RelativeDamping
from natgrad.optim.step.grafting import AdamMoments, grafted
from natgrad.optim.step.isotropic_rate import IsotropyProbe, is_isotropic
from natgrad.optim.step.lengths import Lengths
from natgrad.optim.step.measures import (
    all_finite,
    clip_scales,
    damped_model,
    measure,
    on_host,
    scalar_checks,
    squared_gradient,
)
from natgrad.optim.step.plan import PreconditionedGroups, StepPlan
from natgrad.optim.step.quadratic_model import BatchFisher
from natgrad.optim.step.reevaluation import Reevaluation, as_float, evaluated
from natgrad.optim.summary import Summary, summarize
from natgrad.optim.zeroed_gradients import as_check


class NaturalGradient(ShowsMethod, GroupedOptimizer, CopiedByState):
    r"""Natural gradient descent with any structure of the Fisher matrix.

    .. math::
        m \leftarrow \mu m + (\hat F + \lambda I)^{-1} \nabla L, \qquad
        \theta \leftarrow (1 - \eta w) \theta - \eta m

    A step whose gradient is not finite is skipped: parameters, momentum and curvature stay as they
    were. Parameters no layer kind covers, and complex ones, are trained by a first-order fallback
    and reported once, by name. Named methods are subclasses that say nothing but their defaults.

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
            down to it, before momentum. At a learning rate, with lengths neither measured nor
            grafted, so are steps that would change two weights, vectors aside, by more than their
            norms: curvature vanishes where outputs saturate. None for no bound.
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

    def __init__(
        self,
        model: nn.Module,
        likelihood: LikelihoodLike = "categorical",
        *,
        structure: str | Structure = DEFAULT,
        lr: float | Tensor | Literal["isotropic"] = DEFAULT,
        damping: float | RelativeDamping | LevenbergMarquardt = DEFAULT,
        momentum: float = DEFAULT,
        weight_decay: float = DEFAULT,
        fisher: str | FisherType = DEFAULT,
        kl_clip: float | None = DEFAULT,
        refresh: Refresh = DEFAULT,
        step_rule: StepRule = DEFAULT,
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
        given = {
            "structure": structure, "lr": lr, "damping": damping, "momentum": momentum,
            "weight_decay": weight_decay, "fisher": fisher, "kl_clip": kl_clip,
            "refresh": refresh, "step_rule": step_rule,
        }  # fmt: skip
        takes_any = self.method is NaturalGradient.method
        method = self.method.with_options(type(self).__name__, takes_any, given)
        rule, damping = method.step_rule, method.damping
        measured = is_isotropic(method.lr)
        lr = 1.0 if isinstance(method.lr, str) else method.lr
        check_rate("lr", lr)
        check_range("momentum", method.momentum, below=1.0)
        check_range("weight_decay", method.weight_decay)
        if method.kl_clip is not None:
            check_range("kl_clip", method.kl_clip)
        if measured:
            chosen = step_rule is not DEFAULT and step_rule.gives("length")
            if rule.measured is not None and not chosen:  # α takes its place.
                rule = dataclasses.replace(rule, length="lr")
            rule.check_isotropic()
        if getattr(method.structure, "fused", False):
            rule.check_fused()
        self.step_rule = rule
        self.levenberg_marquardt: LevenbergMarquardt | None = (
            damping if isinstance(damping, LevenbergMarquardt) else None
        )
        if isinstance(damping, LevenbergMarquardt):
            damping = damping.initial
        self._relative_damping = damping if isinstance(damping, RelativeDamping) else None
        if isinstance(damping, RelativeDamping):
            damping = damping.share
        #: tr F/P at the last factorisation; None until it is known or where nothing depends on it.
        self._mean_eigenvalue: float | None = None
        params = read_groups(params)
        if "params" in self._arguments[1]:  # What runs out could not be copied.
            self._arguments[1]["params"] = params
        #: How far steps go, where that is measured.
        self._lengths: Lengths | None = None
        preconditioner = self.preconditioner_type(
            model, likelihood, structure=method.structure, fisher=method.fisher, damping=damping,
            refresh=method.refresh, output=output, batch_dim=batch_dim, seed=seed,
            excluded=first_order_names(unwrap(model), params), process_group=process_group,
        )  # fmt: skip
        preconditioner.observer.fisher.check_method(method)
        if self._relative_damping is not None:
            preconditioner.curvature.data_damping = self._relative_damping.data
        defaults = {
            "lr": lr, "momentum": method.momentum, "weight_decay": method.weight_decay,
            "damping": damping, "kl_clip": method.kl_clip, "preconditioned": True,
            "unit": None if measured else 1.0,  # Of lr; None until it is measured.
        }  # fmt: skip
        super().__init__(preconditioner, defaults, params, fallback)
        if rule.measured is not None:
            heaviest = max(group.get("momentum", 0.0) for group in (defaults, *self.param_groups))
            self._lengths = Lengths(rule.measured, type(self).__name__, self.method.lr, heaviest)
        self._set_damping()
        self._skipped = 0
        #: Whether the last batch had a loss or gradient that is not finite.
        self._broken = False
        self._adam_moments = AdamMoments(rule.graft_betas)
        #: Share of ``lr`` that the last line search took; 0 if nothing moved, None without one.
        self.searched_share: float | None = None
        observer = preconditioner.observer
        observer.wants_batch_fisher = self._wants_batch_fisher
        #: Whether there is no step without the rows of the batch where these are wanted.
        self._needs_batch_fisher = rule.uses_model or self.levenberg_marquardt is not None
        observer.exact_batch_fisher = self._needs_batch_fisher
        if measured:
            observer.isotropy_probe = IsotropyProbe(seed)

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
                none that makes gradients and returns the loss.
        """
        # Which subclasses extend: around this one torch calls hooks.
        loss: float | None = self._step(closure)
        return loss

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        preconditioner, observer = self.preconditioner, self.preconditioner.observer
        idle = closure is None and not self.state and not observer.seen
        if idle and only_initialises(self):
            self._initialise()
            return None
        # The loss and its gradients, of which some may turn out to have no rows.
        reevaluation = self._reevaluation(closure)
        loss, backpropagates = self._evaluated(closure)
        lost = preconditioner.audit()
        if observer.update_due and observer.warmup == 0 and not self._needs_batch_fisher:
            self._lend(preconditioner.is_blind)
        gradients = self._gradients(preconditioned=True)
        if lost and preconditioner.curvature.structure.joint:
            gradients = {}  # What is known of this batch is of other parameters together.
        rest = self._gradients(preconditioned=False)
        if self._relative_damping and self._mean_eigenvalue is None:
            self._find_damping_unit(gradients)
        grouped = self._grouped()
        self._set_damping(grouped)
        if observer.warmup > 0:
            self._warm_up([*gradients.values(), *rest.values()], loss)
            return loss
        # What the curvature, this batch's included, makes of them; from there on it is taken.
        plan = self._plan(gradients, rest, loss)
        if plan is None:
            return loss
        batch, inverts = observer.batch_fisher, preconditioner.inverts
        preconditioner.finish()
        if reevaluation is None or closure is None or not gradients:
            for update in plan.updates(grouped):
                update.apply()
        else:
            before = as_float(loss)
            self._take_compared(
                plan, list(gradients), lambda: reevaluation(closure, backpropagates) - before, batch
            )
        self._step_fallback()
        if inverts and preconditioner.curvature.shared is not None:
            self._follow_first(preconditioner.curvature.shared, grouped)
        return loss

    def _take_compared(
        self,
        plan: StepPlan,
        names: list[str],
        change: Callable[[], float],
        batch: BatchFisher | None,
    ) -> None:
        """Take a step that is held against the change of the loss."""
        preconditioner = self.preconditioner
        before = {name: preconditioner.parameters[name].clone() for name in names}
        rule, grouped = self.levenberg_marquardt, self._grouped()
        compared = ComparedStep(plan, grouped, before, change, rule, batch)
        with preconditioner.observer.paused():
            if self.step_rule.search is not None:
                self.searched_share = compared.search(self.step_rule.search)
            else:
                compared.take()

    def _follow_first(self, shared: SharedWork, grouped: PreconditionedGroups) -> None:
        """Keep processes together: those that round differently would drift apart."""
        if shared.is_divided and shared.holders > 1:
            moved = [p for group in grouped.groups for p in group["params"] if p.requires_grad]
            shared.replicas.follow_first(moved)

    def _evaluated(self, closure: Callable[[], Any] | None) -> tuple[Any, bool]:
        """Return a closure's loss, backpropagated, and whether the closure itself did that."""
        if closure is None:
            return None, True
        searches = self.step_rule.search is not None
        if searches:
            self.searched_share = None
            self.zero_grad()  # The gradient must be that of the loss the trials are compared with.
        parameters = [p for group in self.param_groups for p in group["params"]]
        compares = searches or self.levenberg_marquardt is not None
        loss, backpropagates = evaluated(closure, parameters, compares)
        if searches and backpropagates and all(p.grad is None for p in parameters):
            raise ValueError(
                "the closure must call backward(), or return the loss as a tensor with its graph: "
                "it did neither, so there is no gradient"
            )
        return loss, backpropagates

    def _plan(
        self, covered: dict[str, Tensor], rest: dict[str, Tensor], loss: float | Tensor | None
    ) -> StepPlan | None:
        """Return the step for gradients of preconditioned and of other parameters, if any."""
        grouped, preconditioner, rule = self._grouped(), self.preconditioner, self.step_rule
        has_rows = preconditioner.observer.keeps_batch_fisher
        if has_rows and self._needs_batch_fisher and not self._has_batch_fisher():
            return None
        gradients = grouped.with_penalty(covered)
        source = gradients
        state: dict[str, dict[str, Any]] = {}
        if rule.momentum_on == "gradient":
            source, state = grouped.summed(gradients)
        flags = preconditioner.zeroed_flags()
        for carefully in (False, True):
            natural, failed = preconditioner.natural_gradient(
                source, backpropagated=source is covered, carefully=carefully
            )
            natural = {n: natural[n] for n in covered}
            if not preconditioner.curvature.is_divided:
                grouped.replicas.average(natural)
            natural = preconditioner.zeroed.held(natural, covered, flags)
            if rule.graft is not None:
                natural = self._graft(natural, gradients, source, state)
            previous = grouped.previous_steps(natural) if rule.keeps_steps else {}
            directions = [natural, previous] if previous else [natural]
            measures = has_rows and rule.measured is not None
            scale = batch_scale(preconditioner.observer, covered) if measures else None
            values = measure(preconditioner, grouped, directions, gradients, source, scale)
            if self._relative_damping and preconditioner.inverts:
                values["mean_eigenvalue"] = preconditioner.mean_eigenvalue()
            checks = {**scalar_checks(rest.values(), loss), "failed": failed}
            grouped.replicas.average(checks)  # What one finds broken is broken for all.
            found = on_host({**values, **checks, **as_check(flags)})
            told = found.pop("zeroed", [])
            mean_eigenvalue = found.pop("mean_eigenvalue", math.nan)
            if not found.pop("failed"):
                break
        own = {name: found[name] for name in ("fisher", "scale", "across") if name in found}
        if rule.measured is not None and not all_finite(own):  # A fault of natgrad's own pass.
            found = {name: value for name, value in found.items() if name not in own}
        if not all_finite(found):
            self._give_up_step(grouped)
            return None
        self._broken = False
        coefficients: list[float] | None = [-1.0]
        if self._lengths is not None:
            if self._lengths.take_back(grouped, found):
                preconditioner.skip()
                preconditioner.observer.renews = not self._lengths.state.is_troubled()
                return None
            likelihood = preconditioner.observer.likelihood
            coefficients = [-self._lengths.next_length(grouped, found, likelihood)]
        elif "fisher" in found:
            coefficients = damped_model(found, grouped.dampings).minimiser()
        if coefficients is None:
            self._skip("its quadratic model predicted no decrease of the loss")
            return None
        if 0 < mean_eigenvalue < math.inf:  # A batch in which nothing counts has none.
            self._mean_eigenvalue = mean_eigenvalue
        if preconditioner.observer.isotropy_probe is not None:
            self._set_unit()
        preconditioner.zeroed.note(flags, told)
        scales = clip_scales(found, coefficients, grouped)
        return StepPlan(gradients, state, directions, coefficients, scales)

    def _give_up_step(self, grouped: PreconditionedGroups) -> None:
        """Take no step; where the batch before broke as well, not the last one taken either."""
        again, self._broken = self._broken, True
        if not again or self._lengths is None or self._lengths.state.slope is None:
            self._skip()
            return
        self._lengths.shorten_last_step(grouped, 0.0)
        self._skip(
            "its loss or gradient was NaN or infinite", "and the step before it was taken back"
        )

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

    def _has_batch_fisher(self) -> bool:
        """Return whether the Fisher matrix of the batch is there on a step that needs it.

        A batch in which no sample counts has none, so that the step is skipped.
        """
        observer = self.preconditioner.observer
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
    def _damping_unit(self) -> float:
        """What the groups' damping is multiplied by."""
        rule, known, lengths = self._relative_damping, self._mean_eigenvalue, self._lengths
        if rule is None or not known:
            return 1.0
        if lengths is None:
            return rule.unit(known, noise=1.0)
        size = sum(block.numel for block in self.preconditioner.curvature.blocks.values())
        noise = lengths.noise_to_signal(self.preconditioner.observer.likelihood)
        return rule.unit(max(known, lengths.deviance.least_trace / size), noise)

    @property
    def _units(self) -> dict[str, bool]:
        """What the learning rates and dampings of the groups are factors on."""
        measured = self.step_rule.measured is not None
        return {"measured_length": measured, "relative_damping": self._relative_damping is not None}

    def _find_damping_unit(self, gradients: dict[str, Tensor]) -> None:
        """Wait for the mean eigenvalue before the first factorisation; later ones come along.

        So does what it is at least.
        """
        preconditioner, lengths = self.preconditioner, self._lengths
        values = {"mean": preconditioner.mean_eigenvalue()}
        if lengths is not None:
            square = {"square": squared_gradient(preconditioner, gradients)}
            preconditioner.replicas.average(square)
            values.update(batch_scale(preconditioner.observer, gradients), **square)
        found = on_host(values)
        mean = found["mean"]
        self._mean_eigenvalue = mean if math.isfinite(mean) and mean > 0 else None
        if lengths is not None and all_finite(found):
            lengths.note_deviance(found)

    def _set_damping(self, grouped: PreconditionedGroups | None = None) -> None:
        """Collect each block's damping from its parameter group."""
        by_parameter: dict[str, float] = {}
        grouped = grouped or self._grouped()
        for names, damping in zip(grouped.group_names, grouped.dampings, strict=True):
            by_parameter.update(dict.fromkeys(names, damping))
        self.preconditioner.damping = {
            name: by_parameter.get(block.names[0], self.defaults["damping"])
            for name, block in self.preconditioner.curvature.blocks.items()
        }

    def _follow_model(self) -> None:
        super()._follow_model()
        self._set_damping()

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
            "is_blind": self._is_blind,
            "mean_eigenvalue": self._mean_eigenvalue,
            "lengths": self._lengths and self._lengths.state_dict(),
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
        unit = own["mean_eigenvalue"]
        lengths = self._lengths and self._lengths.with_state(own["lengths"])

        def restore() -> None:
            loaded = dict(self.state)
            rest()
            self._is_blind = own.get("is_blind", False)
            self._link_fallback()
            self._mean_eigenvalue, self._lengths = unit, lengths
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
