"""Layers in tensor parallelism: the steps of one process with whole layers."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from natgrad.distributed.shards import own_shard, whole
from tests import processes
from tests.distributed.networks import OwnNorm, batch, summed_loss, weights
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


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(width, width, bias=False) for _ in "qkvo")

    def forward(self, x: Tensor) -> Tensor:
        samples, length, _ = x.shape
        heads = (w(x).view(samples, length, -1, 2) for w in (self.wq, self.wk, self.wv))
        q, k, v = (each.transpose(1, 2) for each in heads)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(mixed.transpose(1, 2).reshape(samples, length, -1))


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.w2 = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(functional.silu(self.w1(x)) * self.w3(x))


class LanguageModel(nn.Module):
    """One whose residual stream is cut along positions, as it is in large ones."""

    def __init__(self, words: int = 12, width: int = 8) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(words, width)
        self.attention_norm, self.attention = OwnNorm(width), Attention(width)
        self.ffn_norm, self.feed_forward = nn.LayerNorm(width), FeedForward(width)
        self.norm, self.output = nn.RMSNorm(width), nn.Linear(width, words, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tok_embeddings(x)
        h = h + self.attention(self.attention_norm(h))
        h = h + self.feed_forward(self.ffn_norm(h))
        return self.output(self.norm(h))


def language_model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LanguageModel().double()


def language_model_in_pieces(mesh: Any, logits_in_pieces: bool) -> nn.Module:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    def gathered() -> Any:
        return PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))

    logits: dict[str, Any] = {"output_layouts": Replicate()}
    if logits_in_pieces:
        logits = {"use_local_output": False}
    columns = ("attention.wq", "attention.wk", "attention.wv", "feed_forward.w1", "feed_forward.w3")
    plan = {
        "tok_embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        **{name: SequenceParallel() for name in ("attention_norm", "ffn_norm", "norm")},
        **{name: gathered() for name in ("attention", "feed_forward")},
        **{name: ColwiseParallel() for name in columns},
        "attention.wo": RowwiseParallel(output_layouts=Shard(1)),
        "feed_forward.w2": RowwiseParallel(output_layouts=Shard(1)),
        "output": ColwiseParallel(input_layouts=Shard(1), **logits),
    }
    return parallelize_module(language_model(), mesh, plan)


def steps_of(name: str, world: int) -> int:
    """Return how many steps so many processes take.

    Four send what two do to others: two steps, of which the second one is of the averages of two
    batches and follows on the first, show that. Damping is adapted behind the second step.
    """
    return 3 if world == 2 or "adaptive" in name else 2


#: Name → optimizer and its options, for language models.
LANGUAGE_RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "KFAC": ("KFAC", {}),
    "KFAC, empirical": ("KFAC", {"fisher": "empirical"}),
    "EKFAC": ("EKFAC", {}),
    "SINGD": ("SINGD", {}),
    "FNGD": ("FNGD", {}),
}


def train_language_model(
    model: nn.Module,
    name: str,
    logits_in_pieces: bool = False,
    share: int | None = None,
    world: int | None = None,
) -> Tensor:
    from torch.distributed.tensor.parallel import loss_parallel

    kind, options = LANGUAGE_RUNS[name]
    optimizer = make_optimizer(getattr(natgrad, kind), model, **options)
    world = torch.distributed.get_world_size() if world is None else world
    for step in range(steps_of(name, world)):
        source = torch.Generator().manual_seed(step)
        x, y = torch.randint(12, (2, 4, 4), generator=source)
        if share is not None:
            x, y = x.chunk(2)[share], y.chunk(2)[share]
        optimizer.zero_grad()
        with loss_parallel() if logits_in_pieces else contextlib.nullcontext():
            functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        optimizer.step()
    return torch.cat([whole(p).detach().flatten() for p in model.parameters()])


def language_models(rank: int) -> dict[str, Tensor]:
    """Train language models in pieces, in four processes beside shards, too."""
    from torch.distributed.fsdp import fully_shard

    world = torch.distributed.get_world_size()
    mesh = torch.distributed.init_device_mesh("cpu", (world,))
    found = {}
    for name in LANGUAGE_RUNS if world == 2 else ("KFAC",):
        for pieces in (False, True):
            model = language_model_in_pieces(mesh, pieces)
            found[f"{name}, {pieces}"] = train_language_model(model, name, pieces)
    if world == 4:
        mesh = torch.distributed.init_device_mesh(
            "cpu", (2, 2), mesh_dim_names=("shards", "pieces")
        )
        share = mesh["shards"].get_local_rank()
        names = ("replicas", "nothing", "pieces")
        further = torch.distributed.init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=names)
        for name in ("KFAC", "EKFAC", "FNGD"):
            model = language_model_in_pieces(mesh["pieces"], False)
            for part in (model.attention, model.feed_forward, model):
                fully_shard(part, mesh=mesh["shards"])
            found[f"{name}, shards"] = train_language_model(model, name, share=share)
        for pieces in (False, True):
            model = language_model_in_pieces(further["pieces"], pieces)
            for part in (model.attention, model):
                fully_shard(part, mesh=further["replicas", "nothing"])
            way = f"KFAC, replicas of shards {pieces}"
            found[way] = train_language_model(model, "KFAC", pieces, further.get_local_rank(0))
    return found


def beside_shards(mesh: Any) -> nn.Module:
    """Return a model in pieces over one dimension of a mesh and in shards over the other."""
    from torch.distributed.fsdp import fully_shard

    model: Any = parallel(mesh["pieces"])
    for layer in (model[0], model[2], model[6], model):
        fully_shard(layer, mesh=mesh["shards"])
    return model


def train(
    model: nn.Module,
    name: str,
    averages: Any = None,
    share: int | None = None,
    world: int | None = None,
) -> Tensor:
    """Train a model.

    Args:
        model: The model.
        name: Name of the run.
        averages: Processes that gradients are averaged over by hand.
        share: Which half of the samples this process has; all by default.
        world: The number of processes whose steps are taken; by default of those there are.
    """
    kind, options = RUNS[name]
    group = {} if averages is None else {"process_group": averages}
    optimizer = make_optimizer(getattr(natgrad, kind), model, **group, **options)
    world = torch.distributed.get_world_size() if world is None else world
    for step in range(steps_of(name, world)):
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


def beside_mesh() -> nn.Module:
    """Return a layer in pieces over all processes in another order."""
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    ranks = torch.arange(torch.distributed.get_world_size()).flip(0)
    mesh = torch.distributed.DeviceMesh("cpu", ranks)
    return parallelize_module(nn.Linear(3, 8).double(), mesh, ColwiseParallel())


def together(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {name: train(parallel(), name) for name in runs()}
    if torch.distributed.get_world_size() == 4:
        found |= beside_others()
    refused = {
        "group": lambda: natgrad.KFAC(parallel(), process_group=torch.distributed.group.WORLD),
        "meshes": lambda: natgrad.KFAC(nn.Sequential(parallel(), beside_mesh())),
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


@pytest.fixture(scope="module", params=[2, 4])
def found_in_language_models(request: pytest.FixtureRequest) -> list[dict[str, Tensor]]:
    return processes.run(language_models, world=request.param)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", RUNS)
def test_layers_in_pieces_take_the_steps_of_whole_ones(
    found: list[dict[str, Any]], name: str
) -> None:
    ways = [way for way in (name, f"{name}, shards", f"{name}, by hand") if way in found[0]]
    assert len(found) == 2 or f"{name}, shards" in ways
    alone, start = train(build(), name, world=len(found)), weights(build())
    assert alone.isfinite().all() and not torch.equal(alone, start)
    for each in found:
        for way in ways:
            assert float((each[way] - alone).norm() / (alone - start).norm()) < 1e-10, way


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LANGUAGE_RUNS)
def test_language_models_cut_along_positions_take_the_steps_of_whole_ones(
    found_in_language_models: list[dict[str, Tensor]], name: str
) -> None:
    world = len(found_in_language_models)
    alone = train_language_model(language_model(), name, world=world)
    start = weights(language_model())
    assert alone.isfinite().all() and not torch.equal(alone, start)
    for each in found_in_language_models:
        ways = {way: it for way, it in each.items() if way.startswith(f"{name}, ")}
        ways = {way: it for way, it in ways.items() if way.count(",") == name.count(",") + 1}
        assert ways or world == 4
        for way, weights_then in ways.items():
            away = float((weights_then - alone).norm() / (alone - start).norm())
            assert away < 1e-10, way


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("group", "processes of the same samples, .* beside fully_shard .*: use that, or name"),
        ("wrapped", "is in tensor parallelism and in DistributedDataParallel"),
        ("meshes", "'1.weight' is spread over .* takes one mesh of one dimension: give all layers"),
    ],
)
def test_other_layouts_are_refused(found: list[dict[str, Any]], what: str, message: str) -> None:
    for each in found:
        if what != "wrapped" or len(found) == 4:
            assert re.search(message, each[what])
