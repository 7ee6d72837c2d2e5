"""Dense Gaussian algebra of Laplace's approximation, step by step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from natgrad import fisher_matrix
from tests.cases import normal

#: Layers of :func:`network`, with the number of their parameters.
LAYERS = {"0": 20, "2": 12}


def network(outputs: int = 2, seed: int = 0) -> nn.Sequential:
    """Return a network of two layers in float64."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, outputs)).double()


def data(kind: str, samples: int = 6) -> tuple[Tensor, Tensor]:
    """Return inputs and targets of a likelihood."""
    x = normal(samples, 3)
    if kind == "gaussian":
        return x, normal(samples, 2, seed=1)
    return x, torch.arange(samples) % 2


@dataclass(frozen=True)
class Dense:
    """The posterior of a model with a Gaussian prior, by its definition.

    Attributes:
        model: The model.
        x: Inputs.
        y: Targets.
        kind: ``"gaussian"`` or ``"categorical"``.
        structure: Structure of F.
        temperature: T.
        mean: Prior mean, (P,).
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    kind: str
    structure: str = "full"
    temperature: float = 1.0
    mean: Tensor | float = 0.0

    @property
    def theta(self) -> Tensor:
        return nn.utils.parameters_to_vector(self.model.parameters()).detach()

    def deltas(self, delta: Any) -> Tensor:
        """Return δ of every parameter."""
        if isinstance(delta, Mapping):
            ones = {n: torch.ones(size).double() for n, size in LAYERS.items()}
            return torch.cat([ones[name] * delta[name] for name in LAYERS])
        return torch.ones(len(self.theta)).double() * delta

    @cached_property
    def fisher(self) -> Tensor:
        return fisher_matrix(self.model, (self.x, self.y), self.kind, self.structure).to_dense()

    def precision(self, delta: Any, variance: Any = 1.0) -> Tensor:
        """Return ``N F/T + diag(δ)``; F of unit noise is divided by the variance."""
        precision = len(self.x) * self.fisher / variance / self.temperature
        return precision + torch.diag(self.deltas(delta))

    def evidence(self, delta: Any, variance: Any = 1.0) -> Tensor:
        """Return ``log p(D)`` as far as it depends on prior and noise."""
        z = self.model(self.x).detach()
        if self.kind == "gaussian":
            variance = torch.as_tensor(variance).double()
            fit = -(z - self.y).square().sum() / (2 * variance) - z.numel() / 2 * variance.log()
        else:
            fit = -nn.functional.cross_entropy(z, self.y, reduction="sum")
        deltas, deviation = self.deltas(delta), self.theta - self.mean
        prior = deltas.log().sum() - (deltas * deviation.square()).sum()
        logdet = torch.logdet(self.precision(delta, variance))
        return fit / self.temperature + 0.5 * (prior - logdet)
