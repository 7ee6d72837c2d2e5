"""Implicit (proximal) stochastic gradient descent, a rival on stiff problems."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from natgrad.arguments import (
    check_choice,
    check_integer,
    check_parameters,
    check_range,
    check_rate,
)
from natgrad.distributed import Replicas
from natgrad.optim.checkpoints import only_initialises
from natgrad.optim.step.reevaluation import RandomState, evaluated


class ImplicitSGD(torch.optim.Optimizer):
    r"""Gradient descent with the gradient of the point it arrives at.

    .. math:: \theta^+ = \theta - \eta \nabla L(\theta^+), \qquad \theta^+ = \arg\min_\phi
              L(\phi) + \tfrac{1}{2\eta} \|\phi - \theta\|^2

    On a quadratic loss with Hessian H the step is ``(I + ηH)⁻¹θ``: stable for every η, where plain
    gradient descent needs ``η < 2/λ_max``. The inner problem is solved by an ordinary optimizer of
    :mod:`torch.optim`; one Gauss-Newton step on it would be the natural gradient with damping
    ``λ = 1/η``.

    The closure is evaluated several times per step, always on the same batch and with the same
    random numbers (dropout masks). A step that ends at a loss that is not finite is taken back.
    Where a schedule has brought lr to 0, parameters stay as they are.

    Args:
        params: Parameters or parameter groups, with rates of their own.
        lr: η.
        inner: ``"lbfgs"``, or ``"adam"`` or ``"gradient"`` for losses that are not smooth.
        inner_steps: Most iterations on the inner problem.
        tolerance: The inner problem counts as solved where the largest entry of its gradient
            ``∇L(φ) + (φ − θ)/η`` is at most ``tolerance`` times that of ``∇L(θ)``.
        inner_lr: Rate of the inner optimizer; 1 for L-BFGS, which searches for its own, and 1e-3
            by default for the others. ``"gradient"`` takes ``η / (1 + η/inner_lr)``.
        history: Pairs that L-BFGS keeps.
        process_group: Processes that train replicas of a model, as in DistributedDataParallel,
            which must evaluate the closure equally often; None for no others.

    Attributes:
        converged: Whether the last inner problem was solved. The first that is not is warned of.

    Raises:
        ValueError: If an argument is out of range.

    Source: Li et al., Implicit stochastic gradient descent for training physics-informed neural
    networks (2023); as an algorithm it is the proximal point method.

    Example:
        >>> optimizer = natgrad.ImplicitSGD(model.parameters(), lr=1.0)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = residual_loss(model)
        ...     loss.backward()
        ...     return loss
        >>> loss = optimizer.step(closure)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1.0,
        inner: Literal["lbfgs", "adam", "gradient"] = "lbfgs",
        inner_steps: int = 20,
        tolerance: float = 1e-6,
        inner_lr: float | None = None,
        history: int = 20,
        process_group: Any = None,
    ) -> None:
        check_rate("lr", lr)
        if not float(lr) > 0:
            raise ValueError(f"lr must be a finite number > 0, got {lr}")
        check_choice("inner", inner, "lbfgs", "adam", "gradient")
        check_integer("inner_steps", inner_steps)
        check_integer("history", history)
        check_range("tolerance", tolerance)
        if inner_lr is not None and not 0 < inner_lr < math.inf:
            raise ValueError(f"inner_lr must be a finite number > 0, got {inner_lr}")
        super().__init__(params, {"lr": lr})
        self.inner = inner
        self.inner_steps: int = inner_steps
        self.tolerance: float = tolerance
        usual_lr = 1.0 if inner == "lbfgs" else 1e-3
        self.inner_lr: float = usual_lr if inner_lr is None else inner_lr
        self.history: int = history
        self.replicas: Replicas = Replicas(process_group)
        self.converged: bool = True
        self._warned = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch.optim.

        Raises:
            ValueError: If the rate is out of range or a parameter is complex or sharded.
        """
        super().add_param_group(param_group)
        check_rate("lr", param_group["lr"])
        names = param_group.get("param_names", range(len(param_group["params"])))
        check_parameters({n: p for n, p in zip(names, param_group["params"], strict=True)})

    def step(self, closure: Callable[[], Any] | None = None) -> float:  # type: ignore[override]
        """Take one step.

        Args:
            closure: Evaluates the loss, backpropagates and returns it; or it returns the loss with
                its graph.

        Returns:
            The loss before the step.

        Raises:
            ValueError: If there is no closure, or none that returns the loss.
        """
        if closure is None and only_initialises(self):
            self._count(0)
            return math.nan
        if closure is None:
            raise ValueError(
                "ImplicitSGD.step() needs a closure that clears gradients, evaluates the loss, "
                "calls backward() and returns it"
            )
        every = [(p, float(group["lr"])) for group in self.param_groups for p in group["params"]]
        parameters = [p for p, rate in every if rate]
        rates = [rate for _, rate in every if rate]
        start = [p.detach().clone() for p in parameters]
        losses: list[float] = []
        fresh = False  # Whether the gradients are those of the present parameters.
        random = RandomState(p for p, _ in every)

        def evaluate() -> float:
            """Return the inner objective; its gradients are left in ``.grad``."""
            nonlocal fresh
            if fresh:
                fresh = False
                return losses[-1]  # The first value is asked for twice, and nothing moved yet.
            for p, _ in every:  # So that the closure's own can be told.
                p.grad = None
            random.restore()
            loss, _ = evaluated(closure, [p for p, _ in every], needs_loss=True)
            losses.append(self._mean(float(loss.detach() if isinstance(loss, Tensor) else loss)))
            distance = 0.0
            with torch.no_grad():
                for p, old, rate in zip(parameters, start, rates, strict=True):
                    moved = p - old
                    distance += float(moved.square().sum()) / (2 * rate)
                    gradient = None if p.grad is None else p.grad.to_dense()
                    p.grad = (
                        moved / rate if gradient is None else gradient.add_(moved, alpha=1 / rate)
                    )
            return losses[-1] + distance

        evaluate()
        self._count(1)
        if not parameters:
            self.converged = True
            return losses[0]
        fresh, after = True, RandomState(parameters)
        limit = self.tolerance * _largest_gradient(parameters)
        optimizer = self._inner_optimizer(parameters, min(rates), limit)
        for _ in range(1 if self.inner == "lbfgs" else self.inner_steps):
            optimizer.step(evaluate)
            if _largest_gradient(parameters) <= limit:
                break
        evaluate()  # At the end of a line search gradients are those of the last point tried.
        after.restore()
        self._judge(parameters, start, losses[-1], limit)
        return losses[0]

    def _mean(self, loss: float) -> float:
        """Return the mean of the losses of all processes, so that they decide the same."""
        if self.replicas.are_alone:
            return loss
        device = self.param_groups[0]["params"][0].device
        value = {"loss": torch.tensor(loss, dtype=torch.float64, device=device)}
        self.replicas.average(value)
        return float(value["loss"])

    def _count(self, steps: int) -> None:
        """Count steps: distributed checkpoints want some state of every parameter."""
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["step"] = self.state[p].get("step", 0) + steps

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle the options, too, which torch.optim leaves out."""
        options = ("inner", "inner_steps", "tolerance", "inner_lr", "history", "converged")
        own = {name: getattr(self, name) for name in (*options, "_warned")}
        return {**super().__getstate__(), **own, "replicas": Replicas()}

    def _inner_optimizer(
        self, parameters: list[Tensor], rate: float, limit: float
    ) -> torch.optim.Optimizer:
        if self.inner == "lbfgs":
            return torch.optim.LBFGS(
                parameters, lr=self.inner_lr, max_iter=self.inner_steps,
                max_eval=2 * self.inner_steps + 5, history_size=self.history,
                tolerance_grad=limit, tolerance_change=0.0,
                line_search_fn="strong_wolfe",
            )  # fmt: skip
        if self.inner == "adam":
            return torch.optim.Adam(parameters, self.inner_lr)
        # The proximal term alone has curvature 1/η, the loss is trusted to have 1/inner_lr.
        return torch.optim.SGD(parameters, rate / (1 + rate / self.inner_lr))

    @torch.no_grad()
    def _judge(
        self, parameters: list[Tensor], start: list[Tensor], loss: float, limit: float
    ) -> None:
        """Take back what is not finite; report what is not solved, once."""
        finite = math.isfinite(loss) and all(bool(p.isfinite().all()) for p in parameters)
        self.converged = finite and _largest_gradient(parameters) <= limit
        if not finite:
            for p, old in zip(parameters, start, strict=True):
                p.copy_(old)
        if self.converged or self._warned:
            return
        self._warned = True
        what = "did not converge" if finite else "diverged, so the step was taken back"
        warnings.warn(
            f"the inner problem of ImplicitSGD {what} within {self.inner_steps} iterations: raise "
            "inner_steps, lower lr, or accept steps that are only partly implicit",
            stacklevel=3,
        )


def _largest_gradient(parameters: list[Tensor]) -> float:
    """Return the largest entry of all gradients."""
    gradients = [p.grad for p in parameters if p.grad is not None and p.numel()]
    return max((float(gradient.abs().max()) for gradient in gradients), default=0.0)
