"""Gradients in shards become whole where a layer's natural gradient is made, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import Shard

import natgrad
from natgrad.distributed.shards import at_owners, from_owners
from tests import processes
from tests.cases import normal
from tests.distributed.counting import Held, Received
from tests.distributed.networks import batch, make, summed_loss, weights
from tests.methods import make_optimizer

pytestmark = [pytest.mark.slow, processes.shards_on_cpus]

WORLD = 4
DEPTH, WIDTH = 8, 64

#: Name → network, whether its shards have replicas, along which dimension it is cut, and options.
RUNS: dict[str, tuple[str, bool, int, dict[str, Any]]] = {
    "shards": ("transformer", False, 0, {}),
    "replicas of shards": ("transformer", True, 0, {"sharing": "memory"}),
    "columns": ("mlp", False, 1, {}),
    "half keep each layer": ("transformer", False, 0, {"sharing": 0.5}),
    "plain steps": ("mlp", True, 0, {"length": "lr", "lr": 0.05, "momentum": 0.9, "damping": 0.1}),
}


def sharded(model: nn.Module, replicated: bool = False, dim: int = 0) -> Any:
    from torch.distributed.fsdp import fully_shard

    shape, names = ((2, 2), ("replicas", "shards")) if replicated else ((WORLD,), ("shards",))
    mesh = torch.distributed.init_device_mesh("cpu", shape, mesh_dim_names=names)

    def placed(p: nn.Parameter) -> Shard:
        return Shard(dim if p.dim() > dim and p.shape[dim] % WORLD == 0 else 0)

    if isinstance(model, nn.Sequential):
        for layer in (one for one in model if any(True for _ in one.parameters())):
            fully_shard(layer, mesh=mesh, shard_placement_fn=placed)
    fully_shard(model, mesh=mesh, shard_placement_fn=placed)
    return model


def train(name: str, rank: int | None) -> Tensor:
    network, replicated, dim, options = RUNS[name]
    model = make(network)
    if rank is not None:
        model = sharded(model, replicated, dim)
    optimizer = make_optimizer(natgrad.KFAC, model, **options)
    for step in range(3):
        x, y = batch(network, step)
        divisor = y.numel()
        if rank is not None:
            x, y, divisor = x.chunk(WORLD)[rank], y.chunk(WORLD)[rank], divisor / WORLD
        optimizer.zero_grad()
        (summed_loss(model(x), y) / divisor).backward()
        optimizer.step()
    parameters: list[Any] = list(model.parameters())
    return torch.cat([natgrad.distributed.shards.whole(p).detach().flatten() for p in parameters])


def deep() -> nn.Module:
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH))).double()


def counting(rank: int, sharing: str) -> dict[str, Any]:
    """Take steps that update nothing; count what the last one receives and holds."""
    model = sharded(deep())
    optimizer = make_optimizer(
        natgrad.KFAC, model, likelihood="gaussian", lr=0.1, length="lr", factors=10, inverses=10,
        early=False, sharing=sharing,
    )  # fmt: skip
    for step in range(3):
        x = normal(8, WIDTH, seed=10 * step + rank)
        optimizer.zero_grad()
        (model(x) - x.sin()).square().mean().backward()
        if step < 2:
            optimizer.step()
    with Held() as held, Received() as received:
        held.most = 8 * DEPTH * WIDTH**2
        optimizer.step()
    return {"received": received.sizes, "held": held.most}


def handing_over(rank: int) -> bool:
    """Hand over tensors of several types that are cut, or not, and take them back."""
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    group, mesh = torch.distributed.group.WORLD, init_device_mesh("cpu", (WORLD,))
    wholes = {
        "rows": normal(7, 3, seed=1), "columns": normal(2, 9, seed=2).float(),
        "one": normal(1, 2, seed=3), "none": normal(0, 4, seed=4), "apart": normal(3, seed=5),
    }  # fmt: skip
    cut: dict[str, Any] = {
        name: distribute_tensor(value, mesh, [Shard(int(name == "columns"))])
        for name, value in wholes.items()
        if name != "apart"
    }
    cut["apart"] = wholes["apart"]
    owners = {"rows": 2, "columns": 0, "one": 2, "none": 1, "apart": 3}
    found = at_owners(cut, owners, group)
    assert found.keys() == {name for name, owner in owners.items() if owner == rank}
    assert all(torch.equal(value, wholes[name]) for name, value in found.items())
    doubled = {name: 2 * value for name, value in found.items()}
    back: dict[str, Any] = from_owners(doubled, cut, owners, group)
    for name, value in wholes.items():
        got = back[name] if name == "apart" else back[name].full_tensor()
        assert torch.equal(got, 2 * value) and got.dtype == value.dtype
    return True


def together(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {name: train(name, rank) for name in RUNS}
    found |= {sharing: counting(rank, sharing) for sharing in ("inverses", "memory")}
    found["handed over"] = handing_over(rank)
    return found


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return processes.run(together, world=WORLD)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", RUNS)
def test_four_processes_take_the_steps_of_one(found: list[dict[str, Any]], name: str) -> None:
    alone, start = train(name, None), weights(make(RUNS[name][0]))
    for each in found:
        assert float((each[name] - alone).norm() / (alone - start).norm()) < 1e-10


@pytest.mark.parametrize("sharing", ["inverses", "memory"])
def test_each_gradient_is_gathered_once(found: list[dict[str, Any]], sharing: str) -> None:
    """By its owner, which has two layers of eight; and shards of all come back."""
    parameters = 8 * DEPTH * WIDTH**2
    for each in found:
        assert each[sharing]["received"] == {"alltoall_base_": 2 * parameters / WORLD}
        # Gathered by all they and their natural gradients took 2.25, with the same counter.
        assert each[sharing]["held"] < 1.3 * parameters


def test_what_is_handed_over_comes_back(found: list[dict[str, Any]]) -> None:
    assert all(each["handed over"] for each in found)
