"""Exact Gauss-Newton with line search and adaptive damping."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.curvature.base import inner_product
from natgrad.likelihoods import Likelihood
from natgrad.optim.compared_step import averaged
from natgrad.optim.levenberg_marquardt import LevenbergMarquardt, by_reduction_ratio
from natgrad.optim.line_search import LineSearch
from natgrad.optim.natural_gradient import NaturalGradient
from natgrad.optim.reevaluation import Reevaluation, as_float
from natgrad.optim.step_plan import GroupUpdate
from natgrad.replicas import average_over_replicas

__all__ = ["EGN"]

#: Options of the base class that have no meaning beside the line search.
REFUSED = (
    "weight_decay", "weight_decay_mode", "params", "kl_clip", "norm_clip", "step_rule",
    "nesterov", "momentum_on", "graft", "graft_betas", "curvature_warmup",
)  # fmt: skip


class EGN(NaturalGradient):
    r"""Exact Gauss-Newton steps of a mini-batch or full batch, in sample space.

    The direction ``d = (JᵀΛJ/N + λI)⁻¹∇L`` is the damped natural gradient of
    :class:`natgrad.ExactNGD`: for exponential families the Gauss-Newton matrix is the Fisher
    matrix, and the Duncan-Guttman identity is the push-through that turns ``P × P`` into
    ``N·C × N·C``. What comes on top is the choice of the step:

    * momentum of the direction, ``m ← βm + (1 − β)d`` with bias correction, dropped where it would
      not descend;
    * a backtracking line search along it from ``lr`` on, to a decrease of at least
      ``armijo · step · ⟨m, ∇L⟩``; if none is found, nothing moves;
    * damping by the reduction ratio ϱ of the actual to the predicted decrease (Levenberg and
      Marquardt): halved where ϱ > ¾, doubled where ϱ < ¼ or the line search failed.

    ``step`` takes a closure that evaluates the model on the batch and returns the loss; unlike
    those of other optimizers it must **not** call ``backward``, as the line search evaluates it
    several times.

    Args:
        model: The model to train.
        likelihood: A name, a :class:`natgrad.Likelihood`, or a torch loss module.
        lr: First step length tried.
        damping: λ to begin with, in the units of F.
        momentum: β.
        adaptive_damping: Whether λ follows the reduction ratio.
        damping_range: Least and largest λ.
        line_search: Whether to search; otherwise the step is ``lr``. A
            :class:`natgrad.LineSearch` stands for the three options below.
        backtracking: Factor between step lengths tried.
        armijo: Share of the linear decrease that is asked for.
        max_trials: Step lengths tried.
        **options: Further arguments of :class:`~natgrad.optim.NaturalGradient`.

    Raises:
        ValueError: If an argument is out of range.

    Source: Korbit et al., Exact Gauss-Newton optimization for training deep neural networks (2024).

    Example:
        >>> optimizer = natgrad.EGN(model, "categorical")
        >>> for x, y in loader:
        ...     loss = optimizer.step(lambda: F.cross_entropy(model(x), y))
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood | nn.Module = "categorical",
        *,
        lr: float = 1.0,
        damping: float = 1e-2,
        momentum: float = 0.0,
        adaptive_damping: bool = True,
        damping_range: tuple[float, float] = (1e-8, 1e3),
        line_search: bool | LineSearch = True,
        backtracking: float = 0.5,
        armijo: float = 1e-4,
        max_trials: int = 10,
        **options: Any,
    ) -> None:
        if not 0 < damping_range[0] <= damping_range[1] < math.inf:
            raise ValueError(f"damping_range must hold 0 < least <= largest, got {damping_range}")
        search = LineSearch("armijo", backtracking, armijo, max_trials)
        if isinstance(line_search, LineSearch):
            search, line_search = line_search, True
        if isinstance(damping, LevenbergMarquardt):
            raise ValueError(
                "EGN adapts its damping itself: give a number and adaptive_damping=True with "
                "damping_range"
            )
        refused = {*REFUSED} & set(options)
        if refused or isinstance(lr, str):
            what = f"{sorted(refused)[0]!r}" if refused else "lr='isotropic'"
            raise ValueError(
                f"EGN does not take {what}: its line search goes along one direction for all "
                "parameters, with the loss as the only measure (add penalties to the loss)"
            )
        super().__init__(
            model, "full", likelihood, lr=lr, damping=damping, momentum=momentum, kl_clip=None,
            **options,
        )  # fmt: skip
        if self._fallback is not None:
            raise ValueError(
                "EGN searches along one direction for all parameters, so that none may be left to "
                f"a first-order fallback, as {sorted(self._first_order_names)}: freeze them, or "
                "use ExactNGD"
            )
        self.adaptive_damping, self.damping_range = adaptive_damping, damping_range
        self.line_search, self.search = line_search, search

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Evaluates the model and returns the loss, without ``backward``. Its trials see
                the random numbers of the first evaluation and leave no trace.

        Returns:
            The loss before the step, a float.

        Raises:
            ValueError: If there is no closure, or what it returns cannot be differentiated.
        """
        if closure is None:
            raise ValueError("EGN.step() needs a closure that returns the loss without backward()")
        self.zero_grad()
        reevaluation = Reevaluation(self.model)
        with torch.enable_grad():
            loss = closure()
            if not (isinstance(loss, Tensor) and loss.requires_grad):
                raise ValueError(
                    "the closure of EGN must return the loss as a tensor with its graph, and not "
                    "call backward() itself"
                )
            loss.backward()
        before = as_float(loss)
        with torch.no_grad():
            self._take(before, lambda: reevaluation(closure, backpropagates=False))
        return before

    def _take(self, before: float, evaluate: Callable[[], float]) -> None:
        gradients = {self._names[p]: p.grad for p in self._parameters() if p.grad is not None}
        self._set_damping()
        natural = self.preconditioner.natural_gradient(gradients)
        natural = {name: natural[name] for name in gradients}
        average_over_replicas(natural)
        if self._check(natural, gradients, [], before) is None:
            self._skip()
            return
        direction = self._with_momentum(natural, gradients)
        inner = inner_product(direction, gradients)
        quadratic = self.preconditioner.structure.quadratic(direction, inner)
        measured = {"slope": inner, "curvature": quadratic}
        average_over_replicas(measured)
        slope, curvature = float(measured["slope"]), float(measured["curvature"])
        self.preconditioner.finish()
        length, change = self._search(direction, slope, lambda: evaluate() - before)
        if self.adaptive_damping:
            predicted = length * slope - 0.5 * length**2 * curvature
            self._adapt(change, -predicted)

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"]]

    def _with_momentum(
        self, natural: dict[str, Tensor], gradients: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        beta = self.param_groups[0]["momentum"]
        if beta == 0:
            return natural
        result = {}
        for parameter in self._parameters():
            name = self._names[parameter]
            if name not in natural:
                continue
            state = self.state[parameter]
            count = state.get("momentum_steps", 0) + 1
            buffer = state.get("momentum_buffer", torch.zeros_like(natural[name]))
            state["momentum_buffer"] = beta * buffer + (1.0 - beta) * natural[name]
            state["momentum_steps"] = count
            result[name] = state["momentum_buffer"] / (1.0 - beta**count)
        if float(inner_product(result, gradients)) > 0:
            return result
        for parameter in self._parameters():
            self.state[parameter].pop("momentum_buffer", None)
            self.state[parameter].pop("momentum_steps", None)
        return natural

    def _search(
        self, direction: dict[str, Tensor], slope: float, change: Callable[[], float]
    ) -> tuple[float, float]:
        """Move along the direction; return how far, and how the loss has changed."""
        moved = {self._names[p]: p for p in self._parameters() if self._names[p] in direction}
        start = {name: p.clone() for name, p in moved.items()}
        steps = [direction[name].to(p.dtype) for name, p in moved.items()]
        lr, device = self.param_groups[0]["lr"], steps[0].device
        update = GroupUpdate(list(moved), list(moved.values()), steps, lr)

        def changed() -> float:
            return averaged(change(), device)

        with self.preconditioner.paused():
            if self.line_search:
                share, after = self.search.search(
                    lambda share: update.move(start, share), changed, 0.0, lr * slope, 1.0
                )
                return share * lr, after
            update.move(start, 1.0)
            after = changed()
        if math.isfinite(after):
            return lr, after
        update.move(start, 0.0)
        return 0.0, 0.0

    def _adapt(self, actual: float, predicted: float) -> None:
        least, largest = self.damping_range
        for group in self.param_groups:
            damping = by_reduction_ratio(group["damping"], actual, predicted, 0.5)
            group["damping"] = min(largest, max(least, damping))
