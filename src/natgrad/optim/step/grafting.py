"""Directions that take the length of another optimizer's, tensor by tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def grafted(directions: dict[str, Tensor], lengths: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return directions scaled, tensor by tensor, to the Euclidean norms of others.

    Args:
        directions: Parameter name → direction; one that is zero stays zero.
        lengths: Parameter name → tensor whose norm is taken.

    Source: Agarwal et al., Disentangling adaptive gradient methods from learning rates (2020).
    """
    result = {}
    for name, direction in directions.items():
        norm = torch.linalg.vector_norm(direction)
        wanted = torch.linalg.vector_norm(lengths[name].to(direction.dtype))
        result[name] = direction * torch.where(norm == 0, norm, wanted / norm)
    return result


class AdamMoments:
    """The step of Adam, for its length only.

    Args:
        betas: Decays of the first and second moment.
        eps: Added to the root of the second moment.

    Source: Kingma & Ba, Adam: a method for stochastic optimization (2015).
    """

    def __init__(self, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        self.betas: tuple[float, float] = betas
        self.eps: float = eps

    def following(self, state: dict[str, Any], gradient: Tensor) -> dict[str, Any]:
        """Return ``graft_steps``, ``graft_mean`` and ``graft_square`` after one more gradient.

        Nothing is changed in place; a state without them counts as the start.
        """
        (beta1, beta2), old = self.betas, {**self.initial(gradient), **state}
        return {
            "graft_steps": old["graft_steps"] + 1,
            "graft_mean": torch.lerp(old["graft_mean"], gradient, 1.0 - beta1),
            "graft_square": torch.lerp(old["graft_square"], gradient.square(), 1.0 - beta2),
        }

    def initial(self, like: Tensor) -> dict[str, Any]:
        """Return the moments before the first gradient, in the form of a tensor."""
        mean, square = torch.zeros_like(like), torch.zeros_like(like)
        return {"graft_steps": 0, "graft_mean": mean, "graft_square": square}

    def direction(self, moments: dict[str, Any]) -> Tensor:
        """Return ``m̂ / (√v̂ + ε)`` with bias-corrected moments."""
        (beta1, beta2), steps = self.betas, moments["graft_steps"]
        mean = moments["graft_mean"] / (1.0 - beta1**steps)
        square = moments["graft_square"] / (1.0 - beta2**steps)
        direction: Tensor = mean / (square.sqrt() + self.eps)
        return direction
