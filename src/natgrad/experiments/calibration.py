"""The learning rate that the quadratic model of the loss asks for."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from natgrad.experiments.objectives import Objective
from natgrad.likelihoods import as_likelihood

__all__ = ["measured_learning_rate"]


def measured_learning_rate(
    model: nn.Module,
    build: Callable[[nn.Module], torch.optim.Optimizer],
    objective: Objective,
    inputs: Tensor,
    targets: Tensor,
) -> float:
    """Return η = ⟨g, d⟩ / ⟨d, F d⟩ for the gradient g and an optimizer's first direction d.

    It minimises the quadratic model L(θ) − η⟨g, d⟩ + ½η²⟨d, F d⟩, with the exact Fisher matrix F of
    the batch, which costs one Jacobian-vector product. Where the isotropic condition
    J d = α·(outputs − targets) holds, this is the theory's 1/α.

    Args:
        model: The network; left as it is.
        build: Builds the optimizer on a copy of the model, with learning rate 1 and no momentum.
        objective: The loss.
        inputs: (N, ...) batch.
        targets: The batch's targets, encoded for the objective.

    Returns:
        The learning rate; NaN if the direction is not one of descent or not finite.
    """
    copied = copy.deepcopy(model)
    optimizer = build(copied)
    optimizer.zero_grad()
    objective(copied(inputs), targets).backward()
    before = {name: value.detach().clone() for name, value in copied.named_parameters()}
    gradients = {
        name: torch.zeros_like(value) if value.grad is None else value.grad.detach().clone()
        for name, value in copied.named_parameters()
    }
    optimizer.step()
    direction = {name: before[name] - value.detach() for name, value in copied.named_parameters()}
    slope = sum((gradients[name] * direction[name]).sum().item() for name in direction)

    plain = copy.deepcopy(model)  # without the optimizer's hooks

    def outputs_at(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(plain, parameters, (inputs,))

    outputs, change = torch.func.jvp(outputs_at, (before,), (direction,))  # type: ignore[misc]
    root = as_likelihood(objective.likelihood).output_hessian_root(outputs.detach())
    curvature = (root.transpose(-1, -2) @ change.view(len(inputs), 1, -1, 1)).square().sum()
    curvature = (curvature / len(inputs)).item()
    rate = slope / curvature if curvature > 0 else float("nan")
    return rate if 0 < rate < float("inf") else float("nan")
