"""Partially adaptive momentum: between SGD with momentum and AMSGrad."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor

from natgrad.arguments import check_parameters, check_range, check_rate
from natgrad.optim.step.reevaluation import evaluated


class Padam(torch.optim.Optimizer):
    r"""Adam with a partial power p of its second moment, a first-order relative.

    .. math::
        m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad
        v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
        \hat v \leftarrow \max(\hat v, v), \quad
        \theta \leftarrow (1 - \eta w) \theta - \eta \frac{m}{\hat v^p + \epsilon}

    ``p = ½`` is AMSGrad without bias correction, ``p → 0`` is SGD with an averaged gradient.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate η.
        betas: Decays ``(β₁, β₂)`` of the moments.
        partial: p, in [0, ½].
        eps: ε.
        weight_decay: Decoupled weight decay w.
        maximize: Climb instead of descending.

    Raises:
        ValueError: If an argument is out of range.

    Source: Chen et al., Closing the generalization gap of adaptive gradient methods in training
    deep neural networks (2018).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.1,
        betas: tuple[float, float] = (0.9, 0.999),
        partial: float = 0.125,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        maximize: bool = False,
    ) -> None:
        check_rate("lr", lr)
        for index, beta in enumerate(betas):
            check_range(f"betas[{index}]", beta, below=1.0)
        check_range("eps", eps)
        check_range("weight_decay", weight_decay)
        if not 0 <= partial <= 0.5:
            raise ValueError(f"partial must be in [0, 0.5], got {partial}")
        defaults = {
            "lr": lr,
            "betas": betas,
            "partial": partial,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, a pickle or a state dict, also one that knew no ``maximize``."""
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("maximize", False)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch.optim.

        Raises:
            ValueError: If an option is out of range or a parameter is complex.
        """
        super().add_param_group(param_group)
        check_rate("lr", param_group["lr"])
        names = param_group.get("param_names", range(len(param_group["params"])))
        pairs = zip(names, param_group["params"], strict=True)
        check_parameters({n: p for n, p in pairs if not hasattr(p, "device_mesh")})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step.

        Args:
            closure: Evaluates the model, backpropagates and returns the loss; or it returns the
                loss with its graph.

        Returns:
            The closure's loss, or None.
        """
        loss: float | None = None
        if closure is not None:
            loss, _ = evaluated(closure, [p for g in self.param_groups for p in g["params"]])
        for group in self.param_groups:
            self._update(group)
        return loss

    def _update(self, group: dict[str, Any]) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        if not parameters:
            return
        names = ("momentum", "second_moment", "largest_second_moment")
        states: dict[str, list[Tensor]] = {name: [] for name in names}
        for p in parameters:
            state = self.state[p]
            if not state:
                state.update({name: torch.zeros_like(p) for name in names})
            for name in names:
                states[name].append(state[name])
        gradients: list[Any] = [p.grad.to_dense() for p in parameters]
        if group["maximize"]:
            gradients = list(torch._foreach_neg(gradients))
        (beta1, beta2), lr = group["betas"], float(group["lr"])
        momentum, second, largest = (states[name] for name in names)
        torch._foreach_lerp_(momentum, gradients, 1.0 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1.0 - beta2)
        torch._foreach_maximum_(largest, second)
        denominators = torch._foreach_pow(largest, group["partial"])
        torch._foreach_add_(denominators, group["eps"])
        if group["weight_decay"] > 0:
            torch._foreach_mul_(parameters, 1.0 - lr * group["weight_decay"])
        torch._foreach_addcdiv_(parameters, momentum, denominators, -lr)
