"""The optimizer every natural-gradient method shares."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from natgrad.fisher import FisherType
from natgrad.likelihoods import Likelihood
from natgrad.optim.compared_step import ComparedStep
from natgrad.optim.copying import CopiedByState
from natgrad.optim.grafting import AdamMoments, Graft, grafted
from natgrad.optim.isotropic_rate import IsotropyProbe, is_isotropic
from natgrad.optim.levenberg_marquardt import LevenbergMarquardt
from natgrad.optim.line_search import LineSearch, LineSearchRule
from natgrad.optim.parameter_groups import Fallback, make_fallback, split_groups
from natgrad.optim.preconditioned_groups import PreconditionedGroups
from natgrad.optim.preconditioner import Preconditioner, gradients_are_finite
from natgrad.optim.ranges import check_range
from natgrad.optim.reevaluation import Reevaluation, as_float
from natgrad.optim.step_measures import Measures, damped_model, group_scales, measure, on_host
from natgrad.optim.step_options import MomentumOn, StepOptions, StepRule, WeightDecayMode
from natgrad.optim.step_plan import StepPlan
from natgrad.optim.summary import Summary, summarize
from natgrad.replicas import average_over_replicas

__all__ = ["NaturalGradient"]


class NaturalGradient(torch.optim.Optimizer, CopiedByState):
    r"""Natural gradient descent with any structure of the Fisher matrix.

    .. math::
        m \leftarrow \mu m + (\hat F + \lambda I)^{-1} \nabla L, \qquad
        \theta \leftarrow (1 - \eta w) \theta - \eta m

    A step whose gradient is not finite is skipped: parameters, momentum and curvature stay as they
    were. Parameters no layer kind covers are trained by a first-order fallback and reported once,
    by name.

    Args:
        model: The model to train (not its parameters: curvature comes from its layers).
        structure: Name of the structure.
        likelihood: ``"categorical"``, ``"gaussian"``, ``"bernoulli"``, ``"poisson"``, a
            :class:`natgrad.Likelihood`, or a torch loss module such as ``nn.MSELoss()``.
        lr: Learning rate η. ``"isotropic"`` takes 1/α, with α measured on the first batch (see
            :func:`natgrad.ntk.isotropy`): the rate at which a wide network fits the batch in one
            step of the squared loss. The groups' ``lr`` is then 1, in units of 1/α, so that
            schedulers work as factors.
        damping: λ, in the units of F, or a :class:`natgrad.LevenbergMarquardt` rule that adapts it;
            ``step`` then needs a closure. The λ of all groups rise and fall together.
        momentum: μ.
        weight_decay: Weight decay w.
        fisher: ``"exact"``, ``"mc"``, ``"empirical"`` or ``"improved"``.
        mc_samples: Draws per input for ``"mc"``.
        factor_interval: Steps between updates of the curvature.
        inverse_interval: Steps between factorisations.
        ema_decay: Decay of the moving average of the curvature.
        kl_clip: Bound on ``η² ΔᵀFΔ``, twice the change (Kullback-Leibler divergence) of the
            output distribution that the curvature predicts for a step; larger steps are scaled
            down to it, before momentum. None for no bound.
        norm_clip: Bound on the Euclidean norm of ηΔ over all preconditioned parameters together,
            applied in the same way, after ``kl_clip``. None for no bound.
        step_rule: ``"lr"``, or ``"quadratic_model"``: the step is η times
            ``δ = −αΔ + μδ₀``, with δ₀ the step before, where α, and with ``momentum > 0`` also μ,
            minimise the quadratic model of the loss with damping and the Fisher matrix of the
            present batch, by ``fisher``. The minimiser itself needs ``lr=1`` and ``kl_clip=None``;
            the clips bound all of ηδ. It costs the rows of every batch and one product with them,
            and the loss must be a mean over samples. (Martens & Grosse 2015, sections 6.4 and 7.)
            ``"line_search"``: the step is ``−tm``, along the direction m (momentum and clips
            included) that ``"lr"`` would take, with t searched from ``lr`` on; groups with
            different ``lr`` are shortened by one factor. ``step`` needs a closure. Momentum that
            would not descend is forgotten, and so it is where no length lowers the loss: then
            nothing moves (the fallback's parameters apart), and adaptive damping rises. Decoupled
            weight decay takes the rate found and no part in the search.
        line_search: ``"armijo"``, ``"best"`` or a :class:`natgrad.LineSearch`,
            for ``step_rule="line_search"``.
        nesterov: Whether momentum looks ahead, as in :class:`torch.optim.SGD`; without effect
            where there is none, or where the quadratic model chooses it.
        momentum_on: ``"natural_gradient"``, or ``"gradient"``: the sum of past gradients is what
            is preconditioned.
        weight_decay_mode: ``"decoupled"`` (the formula above), or ``"model"``: the loss gains
            ``½w‖θ‖²``, so its gradient ``wθ`` and its curvature ``F + wI``. Losses must be means
            over samples.
        graft: Optimizer whose length each parameter tensor's direction takes: ``"sgd"`` (the norm
            of the gradient, or of the sum of gradients with ``momentum_on="gradient"``),
            ``"adam"``, or None for the natural gradient's own.
        graft_betas: Decays of Adam's moments for ``graft="adam"``.
        curvature_warmup: Steps at the start that update curvature, every time, and move no
            preconditioned parameter; the fallback trains as usual. The intervals count from the
            first step after them.
        fallback: Optimizer of uncovered parameters, ``"adamw"`` or ``"sgd"`` (momentum 0.9).
        fallback_lr: Its learning rate; 1e-3 for AdamW and 1e-2 for SGD by default.
        params: Parameter groups with options of their own, as a list of dicts. A group says what
            it holds by ``"modules"`` (a list of modules), ``"params"`` (a name pattern such as
            ``"encoder.*"``, a list of patterns, or a list of parameters) and may set ``lr``,
            ``momentum``, ``weight_decay``, ``damping`` and ``preconditioned=False`` (train it by
            the fallback). All other parameters form the last group.
        output: Picks the tensor the likelihood looks at out of the model's output.
        seed: Seed of the sampled labels; the global random state is never used.
        fused: Let the backward pass of linear layers with fewer rows than units make their natural
            gradient itself, which saves the plain weight-gradient product (K-FAC with factored
            damping only). Their ``.grad`` then *is* the natural gradient, by the inverses of the
            last step: gradient clipping bounds that, second derivatives through these layers are
            not available, and ``kl_clip`` uses an unbiased estimate of ``⟨Δ, ∇L⟩``.
        stagger: Spread factorisations evenly over the steps of ``inverse_interval``, so that no
            single step takes much longer than the others.
        early_updates: Update and factorise also at steps 1, 2, 4, 8, … of the first interval, while
            the network changes fastest and the average holds little.
        **structure_options: Options of the structure.

    Raises:
        TypeError: If ``model`` is not a module.
        ValueError: If an argument is out of range or a group matches nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        structure: str,
        likelihood: str | Likelihood | nn.Module = "categorical",
        *,
        lr: float | Literal["isotropic"],
        damping: float | LevenbergMarquardt,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        fisher: str | FisherType = "exact",
        mc_samples: int = 1,
        factor_interval: int = 1,
        inverse_interval: int = 1,
        ema_decay: float = 0.0,
        kl_clip: float | None = None,
        norm_clip: float | None = None,
        step_rule: StepRule = "lr",
        line_search: LineSearchRule | LineSearch = "armijo",
        nesterov: bool = False,
        momentum_on: MomentumOn = "natural_gradient",
        weight_decay_mode: WeightDecayMode = "decoupled",
        graft: Graft | None = None,
        graft_betas: tuple[float, float] = (0.9, 0.999),
        curvature_warmup: int = 0,
        fallback: Fallback = "adamw",
        fallback_lr: float | None = None,
        params: Iterable[dict[str, Any]] | None = None,
        output: Callable[[Any], Tensor] | None = None,
        seed: int = 0,
        fused: bool = False,
        stagger: bool = False,
        early_updates: bool = False,
        **structure_options: Any,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"{type(self).__name__} takes the model itself, not its parameters: got "
                f"{type(model).__name__}"
            )
        measured = is_isotropic(lr)
        lr = 1.0 if isinstance(lr, str) else lr
        check_range("lr", lr)
        check_range("momentum", momentum, below=1.0)
        check_range("weight_decay", weight_decay)
        if kl_clip is not None:
            check_range("kl_clip", kl_clip)
        self.step_options = StepOptions(
            norm_clip, step_rule, nesterov, momentum_on, weight_decay_mode, graft, graft_betas,
            line_search,
        )  # fmt: skip
        if measured:
            self.step_options.check_isotropic()
        if fused:
            self.step_options.check_fused()
        if curvature_warmup < 0 or (curvature_warmup > 0 and ema_decay == 0):
            raise ValueError(
                "curvature_warmup must be 0, or positive with ema_decay > 0 (without an average "
                f"curvature forgets the warm-up), got {curvature_warmup} with "
                f"ema_decay={ema_decay:g}"
            )
        self.levenberg_marquardt = damping if isinstance(damping, LevenbergMarquardt) else None
        if isinstance(damping, LevenbergMarquardt):
            damping = damping.initial
        self._adam_moments = AdamMoments(graft_betas)
        self.preconditioner = Preconditioner(
            model,
            structure,
            likelihood,
            fisher=fisher,
            mc_samples=mc_samples,
            damping=damping,
            factor_interval=factor_interval,
            inverse_interval=inverse_interval,
            ema_decay=ema_decay,
            output=output,
            seed=seed,
            fused=fused,
            stagger=stagger,
            early_updates=early_updates,
            **structure_options,
        )
        self.model = self.preconditioner.model
        self._names = {p: n for n, p in self.preconditioner.parameters.items()}
        if fallback not in ("adamw", "sgd"):
            raise ValueError(f"fallback must be 'adamw' or 'sgd', got {fallback!r}")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "damping": damping,
            "kl_clip": kl_clip,
            "preconditioned": True,
            # What lr is multiplied by; None until it is measured.
            "unit": None if measured else 1.0,
        }
        covered = self.preconditioner.capture.uncovered
        groups, first_order = split_groups(self.model, defaults, covered, params)
        if any(isinstance(group.get("damping"), LevenbergMarquardt) for group in groups):
            raise ValueError(
                "the damping of a parameter group must be a number: LevenbergMarquardt, given as "
                "the optimizer's damping, adapts that of all groups together"
            )
        self._fallback: torch.optim.Optimizer | None = None
        if first_order:
            self._fallback = make_fallback(fallback, fallback_lr, first_order)
            groups += self._fallback.param_groups
        super().__init__(groups, defaults)
        self._link_fallback()
        self.preconditioner.unfuse(self._first_order_names)
        self._set_damping()
        self._skipped = 0
        #: Share of ``lr`` that the last line search took; 0 if nothing moved, None without one.
        self.searched_share: float | None = None
        self.preconditioner.warmup = curvature_warmup
        if self.step_options.uses_model:
            self.preconditioner.batch_fisher_interval = 1
        elif self.levenberg_marquardt is not None:
            self.preconditioner.batch_fisher_interval = self.levenberg_marquardt.interval
        if measured:
            self.preconditioner.isotropy_probe = IsotropyProbe(seed)
        if covered:
            reasons = "; ".join(f"{name} ({why})" for name, why in covered.items())
            warnings.warn(
                f"{type(self).__name__} trains these parameters by {fallback}: {reasons}",
                stacklevel=3,
            )

    # Convenience routes to the curvature.

    def loss(
        self, criterion: Callable[[Tensor, Tensor], Tensor], output: Tensor, target: Tensor
    ) -> Tensor:
        """Return ``criterion(output, target)`` and let curvature see the true target.

        The plain loop needs this only where targets cannot be read off the loss gradient: label
        smoothing together with class weights.
        """
        return self.preconditioner.loss(criterion, output, target)

    def update_fisher(self, output: Tensor, target: Tensor | None = None) -> None:
        """Update curvature from ``output`` now, before ``loss.backward()``.

        The plain loop needs this only where the hooks cannot see the model's output.
        """
        self.preconditioner.update_fisher(output, target)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset all gradients; a backward pass that no step followed leaves curvature too."""
        super().zero_grad(set_to_none)
        self.preconditioner.discard()

    # The step.

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step.

        Args:
            closure: Evaluates the model, backpropagates and returns the loss. Adaptive damping
                evaluates it a second time on steps that adapt, a line search once per length
                tried: with the same random numbers, and without a trace in buffers and gradients.
                For a line search it may also return the loss with its graph and leave ``backward``
                to this method, which saves the backward passes of all trials.

        Returns:
            The closure's loss, or None.

        Raises:
            ValueError: If damping is adaptive or lengths are searched, and there is no closure, or
                none that makes gradients.
        """
        reevaluation = self._reevaluation(closure)
        searches = self.step_options.searches
        loss: float | None = None
        backpropagates = True
        if closure is not None and searches:
            loss, backpropagates = self._backpropagated(closure)
        elif closure is not None:
            with torch.enable_grad():
                loss = closure()
        present = {
            self._names[p]: p.grad
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
        }
        self._set_damping()
        covered = {n: g for n, g in present.items() if n not in self._first_order_names}
        rest = [g for n, g in present.items() if n in self._first_order_names]
        if self.preconditioner.warmup > 0:
            self._warm_up([*covered.values(), *rest], loss)
            return loss
        plan = self._plan(covered, rest, loss)
        if plan is None:
            return loss
        batch = self.preconditioner.batch_fisher
        self.preconditioner.finish()
        if reevaluation is None or closure is None or loss is None or not covered:
            self._carry_out(plan)
        else:
            start = {n: self.preconditioner.parameters[n].clone() for n in covered}
            before = as_float(loss)
            step = ComparedStep(
                plan,
                self._grouped(),
                start,
                lambda: reevaluation(closure, backpropagates) - before,
                self.levenberg_marquardt,
                batch,
            )
            with self.preconditioner.paused():
                if searches:
                    self.searched_share = step.search(self.step_options.search)
                else:
                    step.take()
        if self._fallback is not None:
            self._fallback.step()
        return loss

    def _backpropagated(self, closure: Callable[[], Any]) -> tuple[Any, bool]:
        """Return a closure's loss, backpropagated, and whether the closure itself did that."""
        self.searched_share = None
        self.zero_grad()  # The gradient must be that of the loss the trials are compared with.
        with torch.enable_grad():
            loss = closure()
            if any(p.grad is not None for group in self.param_groups for p in group["params"]):
                return loss, True
            if not (isinstance(loss, Tensor) and loss.requires_grad):
                raise ValueError(
                    "the closure must call backward(), or return the loss as a tensor with its "
                    "graph: it did neither, so there is no gradient"
                )
            loss.backward()
        return loss.detach(), False

    def _plan(
        self, covered: dict[str, Tensor], rest: list[Tensor], loss: float | None
    ) -> StepPlan | None:
        """Return the step to take; None if it is skipped.

        Args:
            covered: Parameter name → gradient of the preconditioned parameters.
            rest: All other gradients.
            loss: The closure's loss.
        """
        grouped = self._grouped()
        gradients = grouped.with_penalty(covered)
        source = gradients
        state: dict[str, dict[str, Any]] = {}
        if self.step_options.momentum_on == "gradient":
            source, state = grouped.summed(gradients)
        natural = self.preconditioner.natural_gradient(source, backpropagated=source is covered)
        natural = {n: natural[n] for n in covered}
        average_over_replicas(natural)
        if self.step_options.graft is not None:
            natural = self._graft(natural, gradients, source, state)
        directions = self._directions(natural)
        extra = self._measures(directions, gradients, source)
        if extra is None:
            self._skip("no sample of its batch counts")
            return None
        measures = self._check(natural, source, rest, loss, extra)
        if measures is None:
            self._skip()
            return None
        coefficients: list[float] | None = [-1.0]
        if "fisher" in measures:
            coefficients = damped_model(measures, grouped.dampings).minimiser()
        if coefficients is None:
            self._skip("its quadratic model predicted no decrease of the loss")
            return None
        if self.preconditioner.isotropy_probe is not None:
            self._set_unit()
        scales = group_scales(measures, coefficients, grouped)
        return StepPlan(gradients, state, directions, coefficients, scales)

    def _carry_out(self, plan: StepPlan) -> None:
        """Move the preconditioned parameters."""
        for update in plan.updates(self._grouped()):
            update.apply()

    def _preconditioned_groups(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["preconditioned"]]

    def _grouped(self) -> PreconditionedGroups:
        return PreconditionedGroups(
            self._preconditioned_groups(),
            self._names,
            self.preconditioner.parameters,
            self.state,
            self.step_options,
        )

    def _warm_up(self, gradients: list[Tensor], loss: float | None) -> None:
        """Update the curvature and let the fallback alone train."""
        self.preconditioner.update_curvature()
        if not (gradients_are_finite(gradients) and _is_finite(loss)):
            self._skip()
            return
        self.preconditioner.finish()
        if self._fallback is not None:
            self._fallback.step()

    # What is preconditioned.

    def _graft(
        self,
        natural: dict[str, Tensor],
        gradients: dict[str, Tensor],
        source: dict[str, Tensor],
        state: dict[str, dict[str, Any]],
    ) -> dict[str, Tensor]:
        """Return natural gradients of grafted length; Adam's moments go to ``state``."""
        if self.step_options.graft == "sgd":
            return grafted(natural, source)
        lengths = {}
        for name, gradient in gradients.items():
            old = self.state.get(self.preconditioner.parameters[name], {})
            moments = self._adam_moments.following(old, gradient)
            state.setdefault(name, {}).update(moments)
            lengths[name] = self._adam_moments.direction(moments)
        return grafted(natural, lengths)

    # How far to go.

    def _directions(self, natural: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Return Δ and, where the quadratic model chooses momentum, the last step."""
        if not self.step_options.uses_model:
            return [natural]
        previous = self._grouped().previous_steps(natural)
        return [natural, previous] if previous else [natural]

    def _measures(
        self,
        directions: list[dict[str, Tensor]],
        gradients: dict[str, Tensor],
        source: dict[str, Tensor],
    ) -> dict[str, Tensor] | None:
        """Return what the step size depends on, on the device; None for a batch without weight."""
        return measure(self.preconditioner, self._grouped(), directions, gradients, source)

    def _check(
        self,
        natural: dict[str, Tensor],
        gradients: dict[str, Tensor],
        rest: list[Tensor],
        loss: float | Tensor | None,
        measures: dict[str, Tensor] | None = None,
    ) -> Measures | None:
        """Bring measures to the host, or return None if anything about the step is not finite.

        One inner product passes over gradients and natural gradients alike; it is the only place
        where a step waits for the device.
        """
        values = measures
        if not values:
            inner = torch.as_tensor(0.0)
            if natural:
                inner = self.preconditioner.inner_product(natural, gradients)
            values = {"inner": inner}
        found = on_host(values)
        return found if gradients_are_finite(rest) and _is_finite(loss) else None

    def _set_unit(self) -> None:
        """Measure α and take 1/α as the unit of the learning rates."""
        measured = self.preconditioner.measure_isotropy()
        alpha, deviation = measured if measured is not None else (float("nan"), 0.0)
        value = {"alpha": torch.tensor(alpha, dtype=torch.float64)}
        average_over_replicas(value)
        alpha = float(value["alpha"])
        if not 0 < alpha < float("inf"):
            self.preconditioner.skip()
            raise ValueError(
                f"lr='isotropic' found α = {alpha:.3g} on the first batch, which gives no learning "
                "rate: give lr as a number (natgrad.ntk.isotropy(model, x, structure) tells more)"
            )
        if deviation > 0.5:
            warnings.warn(
                f"the coefficients of {self.preconditioner.structure.structure!r} deviate by about "
                f"{100 * deviation:.0f} % from α times the identity, so lr = 1/α = {1 / alpha:.3g} "
                "is not backed by theory: natgrad.ntk.isotropy(model, x, structure) tells which "
                "layer breaks the condition",
                stacklevel=3,
            )
        self.preconditioner.isotropy_probe = None
        for group in self.param_groups:
            if group["preconditioned"]:
                group["unit"] = 1.0 / alpha

    # Steps that are held against the loss.

    def _reevaluation(self, closure: Callable[[], float] | None) -> Reevaluation | None:
        """Return how to evaluate the closure again, on steps that do so."""
        rule, searches = self.levenberg_marquardt, self.step_options.searches
        if rule is None and not searches:
            return None
        if closure is None:
            chosen = "step_rule='line_search'" if searches else "damping by LevenbergMarquardt"
            raise ValueError(
                f"{chosen} compares losses before and after a step, so step() needs a closure that "
                "evaluates the model, backpropagates and returns the loss (which a GradScaler does "
                "not pass on)"
            )
        steps, warmup = self.preconditioner.steps, self.preconditioner.warmup
        due = searches or (rule is not None and (steps + 1) % rule.interval == 0)
        return Reevaluation(self.model) if due and warmup == 0 else None

    def _skip(self, reason: str = "its loss or gradient was NaN or infinite") -> None:
        self.preconditioner.skip()
        self._skipped += 1
        if self._skipped == 1:
            warnings.warn(
                f"{type(self).__name__} skipped a step because {reason}; parameters and state are "
                "unchanged",
                stacklevel=3,
            )

    def _set_damping(self) -> None:
        """Collect each block's damping from its parameter group."""
        by_parameter: dict[str, float] = {}
        grouped = self._grouped()
        for names, damping in zip(grouped.group_names, grouped.dampings, strict=True):
            by_parameter.update(dict.fromkeys(names, damping))
        blocks = self.preconditioner.structure.blocks
        self.preconditioner.damping = {
            name: by_parameter.get(block.names[0], self.defaults["damping"])
            for name, block in blocks.items()
        }

    # State.

    def _link_fallback(self) -> None:
        """Let the fallback work on this optimizer's groups and state."""
        groups = [g for g in self.param_groups if not g["preconditioned"]]
        self._first_order_names = {self._names[p] for g in groups for p in g["params"]}
        if self._fallback is not None:
            self._fallback.param_groups = groups
            self._fallback.state = self.state

    def state_dict(self) -> dict[str, Any]:
        """Return momentum, groups, curvature and random state, as tensors and plain values.

        It loads with ``torch.load(..., weights_only=True)``, and a resumed run continues exactly
        as an uninterrupted one.
        """
        return {**super().state_dict(), "natgrad": self.preconditioner.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ValueError: If it comes from another structure, model or library.
        """
        if "natgrad" not in state_dict:
            raise ValueError(
                "this state dict has no natgrad curvature: it was not saved by a natgrad optimizer"
            )
        plain = {key: value for key, value in state_dict.items() if key != "natgrad"}
        super().load_state_dict(plain)
        self.preconditioner.load_state_dict(state_dict["natgrad"])
        self._link_fallback()
        self._set_damping()
        pending = any(g["unit"] is None for g in self.param_groups if g["preconditioned"])
        self.preconditioner.isotropy_probe = IsotropyProbe() if pending else None

    def summary(self, samples: int = 128) -> Summary:
        """Return, layer by layer, what is preconditioned, its factors, memory and cost.

        Args:
            samples: Batch size the costs are stated for.
        """
        return summarize(self.preconditioner, samples)


def _is_finite(loss: float | Tensor | None) -> bool:
    return loss is None or math.isfinite(as_float(loss))
