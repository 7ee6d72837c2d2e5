"""The two losses that the comparison can train with, each with the likelihood behind it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

__all__ = ["OBJECTIVES", "Objective", "accuracy"]


@dataclass(frozen=True)
class Objective:
    """A loss over a batch, and what natural gradient methods need to know of it.

    Attributes:
        title: The name to print.
        likelihood: Name of the likelihood whose negative logarithm the loss is.
        function: (outputs (N, C), targets) → scalar, the mean over the N samples.
        encode: (labels (N,), classes) → targets.
    """

    title: str
    likelihood: str
    function: Callable[[Tensor, Tensor], Tensor]
    encode: Callable[[Tensor, int], Tensor]

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of a batch, a scalar."""
        return self.function(outputs, targets)


def _squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (outputs - targets).square().sum(1).mean()


def _one_hot(labels: Tensor, classes: int) -> Tensor:
    return F.one_hot(labels, classes).float()


OBJECTIVES: dict[str, Objective] = {
    "mse": Objective("half squared error, one-hot targets", "gaussian", _squared_error, _one_hot),
    "cross_entropy": Objective(
        "cross-entropy", "categorical", F.cross_entropy, lambda labels, classes: labels
    ),
}
"""The losses by name."""


def accuracy(outputs: Tensor, labels: Tensor) -> float:
    """Return the fraction of samples whose largest output (N, C) is at their label (N,)."""
    return (outputs.argmax(1) == labels).float().mean().item()
