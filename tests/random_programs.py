"""Small random programs: a network, its inputs and what is done with them, by number."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

#: What one step does with the network's modules and a tensor ``(N, T, d)``.
Step = Callable[[Tensor], Tensor]


@dataclass
class Program:
    """A network and how it is trained.

    Attributes:
        model: The network, in float64.
        batches: Inputs of every forward pass.
        batch_dim: Where the output holds the samples.
        likelihood: ``"gaussian"`` or ``"categorical"``.
        targets: Targets of every pass, laid out as the output.
        together: Whether all passes' losses are summed before one backward pass.
        text: What it is made of.
    """

    model: nn.Module
    batches: list[Any]
    batch_dim: int
    likelihood: str
    targets: list[Tensor]
    together: bool
    text: str


class OwnLinear(nn.Module):
    """A linear map written by somebody else."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_out, d_in) / d_in**0.5)
        self.bias = nn.Parameter(torch.randn(d_out) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


class OwnNorm(nn.Module):
    """A norm on tokens, however they come."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + torch.randn(d) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 0.1).rsqrt() * self.weight


class Gate(nn.Module):
    """Parameters used in no known way."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.power, self.shift = nn.Parameter(torch.rand(d) + 0.5), nn.Parameter(torch.randn(d))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x * self.power) + self.shift * torch.cos(x)


class Network(nn.Module):
    """Steps on ``(N, T, d)``, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList()
        self.loose = nn.ParameterList()
        self.steps: list[Step] = []

    def keep(self, module: nn.Module) -> nn.Module:
        self.parts.append(module)
        return module

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


def make_program(number: int) -> Program:
    """Return the program of a number; the same number makes the same program."""
    torch.manual_seed(number)
    rng = random.Random(number)
    net, names = Network(), []
    samples, time, width = rng.randint(1, 4), rng.randint(1, 3), rng.randint(1, 3)
    tokens, vocabulary = rng.random() < 0.3, rng.randint(2, 4)
    d = width
    if tokens:
        _embed(net, rng, names, vocabulary, d)
    for _ in range(rng.randint(1, 4)):
        d = _step(net, rng, names, samples, time, d)
        if rng.random() < 0.5:
            net.steps.append(torch.tanh)
    outputs = rng.randint(2, 3)
    head = net.keep(nn.Linear(d, outputs))
    net.steps.append(head)
    ending = rng.choice(["pooled", "time_second", "time_first", "flat", "last"])
    if time == 1 and ending in ("time_second", "time_first"):
        ending = "pooled"
    names.append(ending)
    net.steps.append({
        "pooled": lambda x: x.mean(1),
        "last": lambda x: x[:, -1],
        "time_second": lambda x: x,
        "time_first": lambda x: x.transpose(0, 1),
        "flat": lambda x: x.reshape(-1, x.shape[-1]),
    }[ending])  # fmt: skip
    net = net.double()
    passes = rng.choice([1, 1, 2, 3])
    batches: list[Tensor] = []
    for _ in range(passes):
        if tokens:
            batches.append(torch.randint(0, vocabulary, (samples, time)))
        else:
            batches.append(torch.randn(samples, time, width).double())
    likelihood = rng.choice(["gaussian", "categorical"])
    with torch.no_grad():
        shape = net(batches[0]).shape
    targets = [_target(rng, likelihood, shape) for _ in batches]
    if rng.random() < 0.3:  # Freeze some.
        own = list(net.named_parameters())
        for name, parameter in rng.sample(own, rng.randint(0, len(own) - 1)):
            parameter.requires_grad_(False)
            names.append(f"frozen {name}")
    text = f"{number}: N={samples} T={time} d={width} x{passes} {likelihood} {names}"
    return Program(
        net, batches, int(ending == "time_first"), likelihood, targets, rng.random() < 0.5, text
    )


def _target(rng: random.Random, likelihood: str, shape: torch.Size) -> Tensor:
    if likelihood == "gaussian":
        return torch.randn(shape).double()
    labels = torch.randint(0, shape[-1], shape[:-1])
    if rng.random() < 0.3:
        ignored = torch.rand(shape[:-1]) < 0.3
        if not ignored.all():
            labels[ignored] = -100
    return labels


def _embed(net: Network, rng: random.Random, names: list[str], size: int, d: int) -> None:
    table = net.keep(nn.Embedding(size, d))
    names.append("embedding")
    net.steps.append(table)
    if rng.random() < 0.3:
        names.append("functional tying")
        projection = net.keep(nn.Linear(d, d))
        net.steps.append(
            lambda x: functional.linear(projection(x), table.weight)[..., :1].expand_as(x) + x
        )


def _step(
    net: Network, rng: random.Random, names: list[str], samples: int, time: int, d: int
) -> int:
    """Add a random step from ``(N, T, d)`` to ``(N, T, d')`` and return d'."""
    out = rng.randint(1, 3)
    kind = rng.choice([
        "linear", "own linear", "own norm", "layer norm", "gate", "attention", "lstm", "gru",
        "conv", "functional", "list", "forward", "weight norm", "views", "interleaved", "mixed",
        "reused", "flat tokens", "routed", "table of positions", "time first",
    ])  # fmt: skip
    names.append(kind)
    add, keep = net.steps.append, net.keep
    if kind in ("linear", "own linear"):
        add(keep((nn.Linear if kind == "linear" else OwnLinear)(d, out)))
        return out
    if kind in ("own norm", "layer norm", "gate"):
        add(keep({"own norm": OwnNorm, "layer norm": nn.LayerNorm, "gate": Gate}[kind](d)))
        return d
    if kind == "attention":
        first = rng.random() < 0.5
        layer = keep(nn.MultiheadAttention(d, 1, batch_first=first))
        if first:
            add(lambda x: layer(x, torch.sin(x), x)[0])
        else:
            add(lambda x: _swapped(lambda y: layer(y, torch.sin(y), y)[0], x))
        return d
    if kind in ("lstm", "gru"):
        first = rng.random() < 0.5
        recurrent = keep((nn.LSTM if kind == "lstm" else nn.GRU)(d, out, batch_first=first))
        add(
            (lambda x: recurrent(x)[0])
            if first
            else (lambda x: _swapped(lambda y: recurrent(y)[0], x))
        )
        return out
    if kind == "conv":
        convolution = keep(nn.Conv1d(d, out, 3, padding=1))
        add(lambda x: convolution(x.transpose(1, 2)).transpose(1, 2))
        return out
    layer = keep(nn.Linear(d, out)) if kind not in ("list", "table of positions") else nn.Identity()
    if kind == "functional":
        add(lambda x: functional.linear(x, layer.weight, layer.bias))
    elif kind == "list":
        net.loose.append(nn.Parameter(torch.randn(d, out)))
        weight = len(net.loose) - 1
        add(lambda x: x @ net.loose[weight])
    elif kind == "forward":
        add(lambda x: layer.forward(x))
    elif kind == "weight norm":
        add(parametrizations.weight_norm(layer))
    elif kind == "views":
        add(lambda x: _product(*layer(torch.cat([x, torch.cos(x)])).chunk(2)))
    elif kind == "interleaved":
        add(
            lambda x: (
                layer(torch.repeat_interleave(x, 2, 0) * _ramp(2, x)).unflatten(0, (-1, 2)).sum(1)
            )
        )
    elif kind == "mixed":
        mixing = torch.eye(samples).double() + 0.3 * torch.randn(samples, samples).double()
        add(lambda x: torch.einsum("nm,mtd->ntd", mixing, layer(x)))
    elif kind == "reused":
        add(lambda x: layer(x) + layer(torch.sin(x)))
    elif kind == "flat tokens":
        add(lambda x: layer(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:2], -1))
    elif kind == "routed":
        add(lambda x: _routed(layer, x))
    elif kind == "table of positions":
        positions = keep(nn.Embedding(time, d))
        add(lambda x: x + positions(torch.arange(time)))
        return d
    elif kind == "time first":
        add(lambda x: _swapped(layer, x))
    return out


def _swapped(function: Step, x: Tensor) -> Tensor:
    return function(x.transpose(0, 1)).transpose(0, 1)


def _product(left: Tensor, right: Tensor) -> Tensor:
    return left * torch.tanh(right)


def _ramp(size: int, x: Tensor) -> Tensor:
    return (1 + torch.arange(len(x) * size) % size).to(x).reshape(-1, 1, 1)


def _routed(layer: nn.Module, x: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    (chosen,) = torch.where(flat[:, 0] > 0)
    result = layer(flat[chosen]) * torch.sigmoid(flat[chosen, :1])
    empty = result.new_zeros(len(flat), result.shape[1])
    return empty.index_add(0, chosen, result).reshape(*x.shape[:2], -1)
