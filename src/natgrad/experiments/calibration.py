"""The learning rate that the quadratic model of the loss asks for."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from natgrad.experiments.objectives import Objective
from natgrad.quality import update_quality


def step_of(
    model: nn.Module,
    build: Callable[[nn.Module], torch.optim.Optimizer],
    loss: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
) -> dict[str, Tensor]:
    """Return what the first step of an optimizer on a copy subtracts from each parameter."""
    trained = copy.deepcopy(model)
    optimizer = build(trained)
    optimizer.zero_grad()
    loss(trained(inputs), targets).backward()
    optimizer.step()
    new = dict(trained.named_parameters())
    return {name: (old - new[name]).detach() for name, old in model.named_parameters()}


def measured_learning_rate(
    model: nn.Module,
    build: Callable[[nn.Module], torch.optim.Optimizer],
    objective: Objective,
    inputs: Tensor,
    targets: Tensor,
) -> float:
    """Return η = ⟨g, d⟩ / ⟨d, F d⟩ for the gradient g and an optimizer's first direction d.

    It minimises the quadratic model L(θ) − η⟨g, d⟩ + ½η²⟨d, F d⟩, with the exact Fisher matrix F of
    the batch, which costs one Jacobian-vector product. Where the isotropic condition J d =
    α·(outputs − targets) holds, this is the theory's 1/α. `build` makes the optimizer, with
    learning rate 1 and no momentum. NaN stands for a direction that is not one of descent or not
    finite.
    """
    direction = step_of(model, build, objective, inputs, targets)
    try:
        quality = update_quality(model, (inputs, targets), direction, objective.likelihood)
    except ValueError:  # Not finite, or no step at all.
        return float("nan")
    rate = quality.best_step
    return rate if 0 < rate < float("inf") else float("nan")
