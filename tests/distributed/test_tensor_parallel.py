"""Linear layers in tensor parallelism: the steps of one process with whole layers."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import natgrad
from natgrad.distributed.shards import own_shard, whole
from tests import processes
from tests.distributed.networks import batch, summed_loss, weights
from tests.methods import make_optimizer

pytestmark = [pytest.mark.slow, processes.shards_on_cpus]

#: Name → optimizer and its options.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "KFAC": ("KFAC", {}),
    "KFAC, exact": ("KFAC", {"fisher": "exact"}),
    "KFAC, empirical": ("KFAC", {"fisher": "empirical"}),
    "KFAC, plain": (
        "KFAC", {"length": "lr", "lr": 0.05, "momentum": 0.9, "damping": 0.1, "weight_decay": 0.1},
    ),
    "KFAC, adaptive damping": (
        "KFAC",
        {"damping": natgrad.LevenbergMarquardt(interval=2), "weight_decay": 0.1,
         "weight_decay_mode": "model"},
    ),
    "KFAC, a layer of AdamW": ("KFAC", {"params": [{"params": "2.*", "preconditioned": False}]}),
    "KFAC, fused": ("KFAC", {"fused": True}),
    "KFAC, about means": ("KFAC", {"max_factor_size": 5}),
    "KFAC, isotropic": ("KFAC", {"lr": "isotropic", "damping": 0.1}),
    "EKFAC": ("EKFAC", {}),
    "FNGD": ("FNGD", {}),
    "ExactNGD": ("ExactNGD", {}),
}  # fmt: skip


def build() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 12),
                  nn.Tanh(), nn.Linear(12, 3)]  # fmt: skip
        return nn.Sequential(*layers).double()


def parallel(mesh: Any = None, **styles: Any) -> nn.Module:
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    if mesh is None:
        mesh = torch.distributed.init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel(), "4": ColwiseParallel(),
            "6": RowwiseParallel()}  # fmt: skip
    return parallelize_module(build(), mesh, {**plan, **styles})


def beside_shards(mesh: Any) -> nn.Module:
    """Return a model in pieces over one dimension of a mesh and in shards over the other."""
    from torch.distributed.fsdp import fully_shard

    model: Any = parallel(mesh["pieces"])
    for layer in (model[0], model[2], model[6], model):
        fully_shard(layer, mesh=mesh["shards"])
    return model


def train(model: nn.Module, name: str, averages: Any = None, share: int | None = None) -> Tensor:
    """Train a model.

    Args:
        model: The model.
        name: Name of the run.
        averages: Processes that gradients are averaged over by hand.
        share: Which half of the samples this process has; all by default.
    """
    kind, options = RUNS[name]
    group = {} if averages is None else {"process_group": averages}
    optimizer = make_optimizer(getattr(natgrad, kind), model, **group, **options)
    for step in range(3):
        x, y = batch("mlp", step)
        if share is not None:
            x, y = ((x[:5], y[:5]), (x[5:], y[5:]))[share]
        samples = len(batch("mlp", step)[1]) / (1 if share is None else 2)

        def closure(x: Tensor = x, y: Tensor = y, samples: float = samples) -> Tensor:
            optimizer.zero_grad()
            loss = summed_loss(model(x), y) / samples
            loss.backward()
            for p in model.parameters() if averages is not None else ():
                torch.distributed.all_reduce(own_shard(p.grad), group=averages)
                p.grad /= 2
            return loss.detach()

        if "adaptive" in name:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    return torch.cat([whole(p).detach().flatten() for p in model.parameters()])


def runs(world: int | None = None) -> list[str]:
    """Return what so many processes do; four of them some of it."""
    world = torch.distributed.get_world_size() if world is None else world
    return list(RUNS) if world == 2 else ["KFAC", "KFAC, plain", "EKFAC"]


#: What is trained with gradients that are averaged by hand.
BY_HAND = ("KFAC", "KFAC, plain", "KFAC, adaptive damping")


def beside_others() -> dict[str, Any]:
    """Train with two shares of the samples, each with two pieces of the layers."""
    mesh = torch.distributed.init_device_mesh("cpu", (2, 2), mesh_dim_names=("shards", "pieces"))
    share, group = mesh["shards"].get_local_rank(), mesh["shards"].get_group()
    found: dict[str, Any] = {}
    for name in RUNS:
        found[f"{name}, shards"] = train(beside_shards(mesh), name, share=share)
    for name in BY_HAND:
        found[f"{name}, by hand"] = train(parallel(mesh["pieces"]), name, group, share)
    try:
        pieces = parallel(mesh["pieces"])
        natgrad.KFAC(nn.parallel.DistributedDataParallel(pieces, device_mesh=mesh["shards"]))
    except ValueError as error:
        found["wrapped"] = str(error)
    return found


def together(rank: int) -> dict[str, Any]:
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
    )

    found: dict[str, Any] = {name: train(parallel(), name) for name in runs()}
    if torch.distributed.get_world_size() == 4:
        found |= beside_others()
    apart = {
        "2": RowwiseParallel(output_layouts=Shard(0)), "4": ColwiseParallel(input_layouts=Shard(0)),
    }  # fmt: skip
    refused = {
        "module": lambda: natgrad.KFAC(parallel(**{"3": SequenceParallel()})),
        "group": lambda: natgrad.KFAC(parallel(), process_group=torch.distributed.group.WORLD),
        "outputs": lambda: train(parallel(**apart), "KFAC"),
    }
    for name, attempt in refused.items():
        try:
            attempt()
        except ValueError as error:
            found[name] = str(error)
    return found


@pytest.fixture(scope="module", params=[2, 4])
def found(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return processes.run(together, world=request.param)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", RUNS)
def test_layers_in_pieces_take_the_steps_of_whole_ones(
    found: list[dict[str, Any]], name: str
) -> None:
    ways = [way for way in (name, f"{name}, shards", f"{name}, by hand") if way in found[0]]
    assert len(found) == 2 or f"{name}, shards" in ways
    alone, start = train(build(), name), weights(build())
    assert alone.isfinite().all() and not torch.equal(alone, start)
    for each in found:
        for way in ways:
            assert float((each[way] - alone).norm() / (alone - start).norm()) < 1e-10, way


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("module", "'3.weight' of a LayerNorm .* takes linear layers .*: leave other modules out"),
        ("group", "processes of the same samples, .* beside fully_shard .*: use that, or name"),
        ("wrapped", "is in tensor parallelism and in DistributedDataParallel"),
        ("outputs", r"of Linear\(.* are spread .* by another dimension .*: leave output_layouts"),
    ],
)
def test_other_layouts_are_refused(found: list[dict[str, Any]], what: str, message: str) -> None:
    for each in found:
        if what != "wrapped" or len(found) == 4:
            assert re.search(message, each[what])
