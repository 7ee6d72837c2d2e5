"""The learning rate that the quadratic model of the loss asks for."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from natgrad.experiments.objectives import Objective
from natgrad.quality import update_quality

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
    optimizer.step()
    direction = {name: before[name] - value.detach() for name, value in copied.named_parameters()}
    try:
        quality = update_quality(model, (inputs, targets), direction, objective.likelihood)
    except ValueError:  # Not finite, or no step at all.
        return float("nan")
    rate = quality.best_step
    return rate if 0 < rate < float("inf") else float("nan")
