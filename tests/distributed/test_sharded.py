"""Models in shards of FSDP2: the steps of one process with whole parameters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import natgrad
from tests import processes
from tests.distributed.networks import SAMPLES, batch, make, soon, summed_loss, weights
from tests.methods import make_optimizer

pytestmark = processes.shards_on_cpus


class Narrow(nn.Module):
    """A network with weights of one row, whose shards are empty in all processes but one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 1), nn.Tanh(), nn.Linear(1, 7), nn.Tanh())
        self.norm, self.head = nn.LayerNorm(7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(x)))


class Checkpointed(nn.Module):
    """A network whose middle is computed again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        h = torch.tanh(checkpoint(self.middle, h, use_reentrant=False))
        return self.last(h)


class Mixing(nn.Module):
    """A network that mixes samples of the first process, or of all, from its sixth pass on."""

    def __init__(self, mixing: int) -> None:
        super().__init__()
        self.first, self.branch, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.mixing, self.calls = mixing, 0

    def forward(self, x: Tensor) -> Tensor:
        own = SAMPLES // 2
        h, rank = torch.tanh(self.first(x)), 0
        if len(x) == own:
            rank = torch.distributed.get_rank()
        parts = list(h.split(own))
        self.calls += 1
        for number, part in enumerate(parts):
            if self.calls > 5 and number + rank < self.mixing:
                parts[number] = part + 0.5 * part.roll(1, 0)
        h = torch.cat(parts)
        return self.last(h + (self.calls > 6) * torch.tanh(self.branch(h)))


OWN = {
    "narrow": Narrow,
    "checkpointed": Checkpointed,
    "mixing": lambda: Mixing(2),
    "mixing in one": lambda: Mixing(1),
}


def build(network: str) -> nn.Module:
    if network not in OWN:
        return make(network)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return OWN[network]().double()


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        optimizer: Name of the class.
        options: Its options; those of `soon` besides.
        network: Name of the network.
        passes: Backward passes per step, of which the last one alone reduces gradients.
        reshards: Whether parameters are sharded again after the forward pass.
        closure: Whether steps take a closure.
        clips: Bound on the norm of the gradient.
        steps: Steps.
    """

    optimizer: str
    options: dict[str, Any] = field(default_factory=dict)
    network: str = "mlp"
    passes: int = 1
    reshards: bool = True
    closure: bool = False
    clips: float | None = None
    steps: int = 3

    def model(self, sharded: bool) -> nn.Module:
        model = build(self.network)
        if not sharded:
            return model
        from torch.distributed.fsdp import fully_shard

        mesh = torch.distributed.init_device_mesh("cpu", (2,))
        apart = ("tokens", "head", "layers", "norms")  # A tied embedding stays with its head.
        for name, child in list(model.named_children()):
            if name not in apart and any(True for _ in child.parameters()):
                fully_shard(child, mesh=mesh, reshard_after_forward=self.reshards)
        fully_shard(model, mesh=mesh, reshard_after_forward=self.reshards)
        return model

    def train(self, rank: int | None = None) -> tuple[nn.Module, Any]:
        model: Any = self.model(rank is not None)
        preconditioner = None
        if self.optimizer == "Preconditioner":
            preconditioner = make_optimizer(natgrad.Preconditioner, model, **self.options)
            optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        else:
            kind = getattr(natgrad, self.optimizer)
            optimizer = make_optimizer(kind, model, **(soon(kind) | self.options))
        for step in range(self.steps):
            data = batch("mlp" if self.network in OWN else self.network, step)
            halves = [[half.chunk(self.passes) for half in each.chunk(2)] for each in data]
            if rank is None:
                own = [[torch.cat(each) for each in zip(*one, strict=True)] for one in halves]
            else:
                own = [list(one[rank]) for one in halves]
            divisor = data[1].numel() / (1 if rank is None else 2)

            def closure(own: Any = own, divisor: float = divisor) -> Tensor:
                optimizer.zero_grad()
                total = torch.zeros((), dtype=torch.float64)
                for number, (x, y) in enumerate(zip(*own, strict=True)):
                    if rank is not None:
                        model.set_requires_gradient_sync(number + 1 == len(own[0]))
                    loss = summed_loss(model(x), y) / divisor
                    loss.backward()
                    total = total + loss.detach()
                return total

            if self.closure:
                optimizer.step(closure)
                continue
            closure()
            if self.clips is not None:
                nn.utils.clip_grad_norm_(model.parameters(), self.clips)
            if preconditioner is not None:
                preconditioner.step()
            optimizer.step()
        return model, optimizer


METHODS = (
    "KFAC", "EKFAC", "TKFAC", "TEKFAC", "KPSVD", "TwoLevelKFAC", "SINGD", "FNGD", "ExactNGD",
    "BlockDiagonalNGD", "BlockTridiagonalNGD", "UnitWiseNGD", "DiagonalNGD", "ThermodynamicNGD",
)  # fmt: skip
GENTLE = {"damping": 0.1}
RUNS: dict[str, Run] = {
    **{name: Run(name) for name in METHODS},
    **{f"{n}, transformer": Run(n, network="transformer") for n in ("KFAC", "EKFAC", "FNGD")},
    **{f"{n}, narrow": Run(n, GENTLE, "narrow") for n in ("KFAC", "EKFAC", "UnitWiseNGD", "SINGD")},
    "KFAC, convolution": Run("KFAC", network="convolution"),
    "KFAC, checkpointed": Run("KFAC", network="checkpointed"),
    **{
        f"{name}, {network}": Run(name, {"fisher": "exact"}, network, steps=8)
        for name in ("ExactNGD", "BlockDiagonalNGD")
        for network in ("mixing", "mixing in one")
    },
    "KFAC, whole between passes": Run("KFAC", network="transformer", reshards=False),
    "KFAC, two passes": Run("KFAC", passes=2),
    "EKFAC, two passes": Run("EKFAC", network="transformer", passes=2),
    "KFAC, empirical": Run("KFAC", {"fisher": "empirical"}),
    "KFAC, clipped": Run("KFAC", clips=0.1),
    "KFAC, decay": Run("KFAC", {"weight_decay": 0.1}),
    "KFAC, decay in the model": Run("KFAC", {"weight_decay": 0.1, "weight_decay_mode": "model"}),
    "KFAC, plain": Run("KFAC", {"length": "lr", "lr": 0.05, "momentum": 0.9, **GENTLE}),
    "KFAC, graft": Run("KFAC", {"length": "lr", "lr": 0.05, "graft": "adam", **GENTLE}),
    "KFAC, quadratic model": Run("KFAC", {"length": "quadratic_model", "lr": 1.0, **GENTLE}),
    "KFAC, sharing memory": Run("KFAC", {"sharing": "memory"}, "transformer"),
    "EKFAC, sharing memory": Run("EKFAC", {"sharing": "memory"}),
    "KFAC, fused": Run("KFAC", {"fused": True}),
    "KFAC, about means": Run("KFAC", {"max_factor_size": 5}),
    "KFAC, adaptive damping": Run(
        "KFAC", {"damping": natgrad.LevenbergMarquardt(interval=2)}, closure=True, steps=4
    ),
    "KFAC, a layer of AdamW": Run("KFAC", {"params": [{"params": "2.*", "preconditioned": False}]}),
    "ExactNGD, line search": Run("ExactNGD", {"length": natgrad.LineSearch()}, closure=True),
    "EGN": Run("EGN", closure=True),
    "Preconditioner": Run("Preconditioner", {"fisher": "exact", "damping": 1e-2}),
}  # fmt: skip


def full(model: nn.Module) -> Tensor:
    parameters: list[Any] = list(model.parameters())
    return torch.cat([p.full_tensor().detach().flatten() for p in parameters])


def half_precision() -> Tensor:
    """Train with parameters in bfloat16 where they are used, and in float32 where they are kept."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model: Any = make("mlp").float()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    for layer in (model[0], model[2], model[4]):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = natgrad.KFAC(model)
    losses = []
    x, y = (each.chunk(2)[torch.distributed.get_rank()] for each in batch("mlp", 0))
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x.float()).float(), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def sharded(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, run in RUNS.items():
        model, optimizer = run.train(rank)
        found[name] = full(model)
        if name == "KFAC":
            found["state"] = {
                type(value).__name__
                for entries in optimizer.state.values()
                for key, value in entries.items()
                if key == "previous_step"
            }
    found["half"] = half_precision()
    return found


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return processes.run(sharded)[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", RUNS)
def test_shards_take_the_steps_of_whole_parameters(found: dict[str, Any], name: str) -> None:
    run = RUNS[name]
    alone, start = weights(run.train()[0]), weights(build(run.network))
    assert alone.isfinite().all() and not torch.equal(alone, start)
    assert float((found[name] - alone).norm() / (alone - start).norm()) < 1e-10


@pytest.mark.slow
def test_steps_are_kept_in_shards(found: dict[str, Any]) -> None:
    assert found["state"] == {"DTensor"}


@pytest.mark.slow
def test_parameters_in_half_precision_train(found: dict[str, Any]) -> None:
    losses = found["half"]
    assert losses.isfinite().all() and losses[-1] < 0.3 * losses[0]
    assert SAMPLES == 16
