"""Small networks, their data, and the shares of it that processes have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.cases import generator

#: Samples of a joint batch.
SAMPLES = 16


class Transformer(nn.Module):
    """A language model of one layer, whose embedding is tied to its output."""

    def __init__(self, vocabulary: int = 11, width: int = 8, length: int = 6) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(3)])
        self.mixing = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.positions(torch.arange(x.shape[1]).expand(x.shape))
        q, k, v = self.mixing(self.norms[0](h)).chunk(3, -1)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        future = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
        h = h + self.projection(scores.masked_fill(future, -1e9).softmax(-1) @ v)
        h = h + self.down(functional.gelu(self.up(self.norms[1](h))))
        return self.head(self.norms[2](h))


class OwnNorm(nn.Module):
    """An RMS norm as people write it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


def make(network: str) -> nn.Module:
    """Return a network in float64, always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if network == "mlp":
            layers = [nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)]
            return nn.Sequential(*layers).double()
        if network == "broad":  # Of whose sums the triangles are kept.
            return nn.Sequential(nn.Linear(300, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        if network == "convolution":
            layers = [
                nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, stride=2, padding=1),
                nn.Tanh(), nn.Flatten(), nn.Linear(36, 3),
            ]  # fmt: skip
            return nn.Sequential(*layers).double()
        return Transformer().double()


def batch(network: str, step: int) -> tuple[Tensor, Tensor]:
    """Return the inputs and labels of a joint batch."""
    source = generator(100 + step)
    if network == "transformer":
        tokens = torch.randint(0, 11, (SAMPLES, 7), generator=source)
        return tokens[:, :-1], tokens[:, 1:]
    shape = {"mlp": (5,), "broad": (300,)}.get(network, (2, 6, 6))
    x = torch.randn(SAMPLES, *shape, generator=source, dtype=torch.float64)
    return x, torch.randint(0, 3, (SAMPLES,), generator=source)


def summed_loss(output: Tensor, y: Tensor) -> Tensor:
    """Return the cross-entropy of all labels that count."""
    return functional.cross_entropy(output.flatten(0, -2), y.flatten(), reduction="sum")


def weights(model: nn.Module) -> Tensor:
    """Return all parameters as one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def soon(kind: Any) -> dict[str, Any]:
    """Return options with which what an optimizer seldom does is done at every other step.

    Three steps have then seen all: with and without an update, and averages of two batches.
    """
    if not hasattr(kind, "method") or not kind.method.refresh.early:
        return {}
    return {"factors": min(2, kind.method.refresh.factors), "inverses": 2, "early": False}
