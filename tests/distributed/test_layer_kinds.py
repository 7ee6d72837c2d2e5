"""Layers of all kinds, in replicas and in shards: the steps of one process with all samples."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from natgrad.distributed.shards import whole
from tests import processes
from tests.distributed.networks import OwnNorm, soon, summed_loss, weights
from tests.methods import make_optimizer

pytestmark = [pytest.mark.slow, processes.shards_on_cpus]

WORDS, WIDTH, LENGTH, SAMPLES = 11, 6, 5, 8


class Positions(nn.Module):
    """A table that is called once for all samples, one of its rows in vain."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(LENGTH + 1, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x + self.table(torch.arange(LENGTH + 1))[:-1])


class Constant(nn.Module):
    """A layer whose inputs are a parameter, the same for all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(LENGTH, WIDTH))
        self.key = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x + self.key(self.query)).cumsum(1)


class Queries(nn.Module):
    """Attention whose queries are a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, LENGTH, WIDTH))
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.queries.expand(len(x), -1, -1)
        return self.attention(queries, x, x, need_weights=False)[0]


class LowRank(nn.Module):
    """What is added to a frozen layer, written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.left = nn.Parameter(torch.randn(2, WIDTH) * 0.3)
        self.right = nn.Parameter(torch.randn(WIDTH, 2) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + functional.linear(functional.linear(x, self.left), self.right)


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrices = nn.ParameterList([torch.randn(WIDTH, WIDTH) * 0.3 for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for matrix in self.matrices:
            x = torch.tanh(x @ matrix)
        return x


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrices = nn.Parameter(torch.randn(3, WIDTH, WIDTH) * 0.3)
        self.gate = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        each = torch.einsum("btd,kde->btke", x, self.matrices)
        return torch.einsum("btk,btke->bte", self.gate(x).softmax(-1), each)


class Routed(nn.Module):
    """Experts to each of which some of the positions are sent."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 4)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        share, chosen = self.gate(flat).softmax(-1).max(-1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            place = torch.where(chosen == number)[0]
            out = out.index_add(0, place, share[place, None] * expert(flat[place]))
        return torch.tanh(x + out.view_as(x))


class Stacked(nn.Module):
    """The same with the matrices of all experts in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 4)
        self.matrices = nn.Parameter(torch.randn(4, WIDTH, WIDTH) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        share, chosen = self.gate(flat).softmax(-1).max(-1)
        out = torch.zeros_like(flat)
        for number in range(4):
            place = torch.where(chosen == number)[0]
            made = functional.linear(flat[place], self.matrices[number])
            out = out.index_add(0, place, share[place, None] * made)
        return torch.tanh(x + out.view_as(x))


class PastItsCall(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer.forward(x) + functional.linear(x, self.layer.weight)


class OwnConvolution(nn.Conv1d):
    """A convolution with a forward of its own, over positions."""

    def forward(self, x: Tensor) -> Tensor:
        mixed = functional.conv1d(x.transpose(1, 2), self.weight, self.bias, padding=1)
        return functional.relu(mixed.transpose(1, 2))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((WIDTH,), 0.7))
        self.shift = nn.Parameter(torch.randn(LENGTH, WIDTH) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class States(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layer: Any = kind(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


def normed() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))


#: Name → what lies between the embedding and the output layer.
NETWORKS: dict[str, Any] = {
    "sums over samples": lambda: [Positions(), LowRank(), Constant(), normed()],
    "products": lambda: [Listed(), Experts(), PastItsCall(), Queries()],
    "forwards of their own": lambda: [OwnNorm(WIDTH), OwnConvolution(WIDTH, WIDTH, 3), Scaled()],
    "routed": lambda: [Routed(), Stacked()],
    "recurrent": lambda: [States(nn.LSTM), States(nn.GRU)],
}

#: Name → optimizer and its options.
RUNS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sampled": (natgrad.KFAC, {}),
    "sampled, EKFAC": (natgrad.EKFAC, {}),
    "sampled, SINGD": (natgrad.SINGD, {}),
    "exact": (natgrad.KFAC, {"fisher": "exact"}),
    "empirical": (natgrad.KFAC, {"fisher": "empirical"}),
}

#: How samples come: all together, in two passes, with none that counts in the last process, or with
#: one there of which some positions do not count.
WAYS = ("together", "two passes", "some ignored", "positions ignored")


def build(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inside = NETWORKS[name]()
        return nn.Sequential(
            nn.Embedding(WORDS, WIDTH), *inside, nn.Linear(WIDTH, WORDS, bias=False)
        ).double()


def joint_batch(step: int, way: str) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(step)
    x = torch.randint(WORDS, (SAMPLES, LENGTH), generator=source)
    y = torch.randint(WORDS, (SAMPLES, LENGTH), generator=source)
    if way == "some ignored":
        y[SAMPLES // 2 :] = -100
    if way == "positions ignored":
        y[-1, 2:] = -100
    return x, y


def train(model: nn.Module, run: str, way: str, rank: int | None = None) -> Tensor:
    kind, options = RUNS[run]
    optimizer = make_optimizer(kind, model, **{**soon(kind), **options})
    world = 1 if rank is None else torch.distributed.get_world_size()
    for step in range(3):
        x, y = joint_batch(step, way)
        count = int((y >= 0).sum())
        passes = 2 if way == "two passes" else 1
        optimizer.zero_grad()
        for number, (part, labels) in enumerate(
            zip(x.chunk(passes), y.chunk(passes), strict=True), start=1
        ):
            if rank is not None:
                part, labels = part.chunk(world)[rank], labels.chunk(world)[rank]
            waits = number < passes and isinstance(model, nn.parallel.DistributedDataParallel)
            if number < passes and hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(False)
            with model.no_sync() if waits else contextlib.nullcontext():
                (summed_loss(model(part), labels) * world / count).backward()
            if hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(True)
        optimizer.step()
    return torch.cat([whole(p).detach().flatten() for p in model.parameters()])


def combinations(name: str) -> list[tuple[str, str]]:
    """Return the runs of a network, and how samples come."""
    if name == "sums over samples":
        runs = [(run, WAYS[0]) for run in RUNS if run != "exact"]
        return runs + [("sampled", way) for way in WAYS[1:]]
    return [(run, WAYS[0]) for run in ("sampled", "exact", "empirical")] + [("sampled", WAYS[3])]


def together(rank: int, name: str) -> dict[tuple[str, str, str], Tensor]:
    from torch.distributed.fsdp import fully_shard

    def sharded() -> nn.Module:
        model: Any = build(name)
        fully_shard(model[1])
        return fully_shard(model)

    kinds = {
        "replicas": lambda: nn.parallel.DistributedDataParallel(build(name)),
        "shards": sharded,
    }
    return {
        (kind, *one): train(make(), *one, rank)
        for kind, make in kinds.items()
        for one in combinations(name)
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NETWORKS)
def test_layers_of_all_kinds_take_the_steps_of_one_process(name: str) -> None:
    each = processes.run(together, name)
    for one in combinations(name):
        alone, start = train(build(name), *one), weights(build(name))
        assert alone.isfinite().all() and not torch.equal(alone, start)
        for found in each:
            for kind in ("replicas", "shards"):
                away = float((found[(kind, *one)] - alone).norm() / (alone - start).norm())
                assert away < 1e-10, (kind, one)
