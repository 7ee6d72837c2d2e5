"""Fisher matrices and posteriors of data of which several processes have a share each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from tests import dense, processes
from tests.distributed.networks import batch, make

Batches = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Look:
    """What is looked at.

    Attributes:
        structure: Structure of the matrix.
        options: Further arguments of ``fisher_matrix``.
        network: Name of the network.
        shares: Of every joint batch, how many samples each process has; None: no batch any more.
        ignored: How many of the last labels of a joint batch do not count.
        likelihood: What the outputs mean.
    """

    structure: str = "kfac"
    options: dict[str, Any] = field(default_factory=dict)
    network: str = "mlp"
    shares: tuple[tuple[int, int | None], ...] = ((8, 8), (5, 11))
    ignored: int = 0
    likelihood: str = "categorical"

    def joint(self) -> Batches:
        found = []
        for step in range(len(self.shares)):
            x, y = batch(self.network, step)
            y = y.clone()
            y[len(y) - self.ignored :] = -100
            found.append((x, y))
        return found

    def share(self, rank: int) -> Batches:
        return [
            (x.split([n or 0 for n in sizes])[rank], y.split([n or 0 for n in sizes])[rank])
            for (x, y), sizes in zip(self.joint(), self.shares, strict=True)
            if sizes[rank] is not None
        ]

    def matrix(self, model: nn.Module, data: Batches, **options: Any) -> natgrad.FisherMatrix:
        options = {**self.options, **options}
        pairs = data if self.likelihood == "categorical" else [(x, None) for x, _ in data]
        return natgrad.fisher_matrix(model, pairs, self.likelihood, self.structure, **options)


STRUCTURES = (
    "full", "block_diagonal", "block_tridiagonal", "unit_wise", "diagonal", "kfac", "ekfac",
    "tkfac", "tekfac", "kpsvd", "two_level",
)  # fmt: skip
LOOKS: dict[str, Look] = {
    **{name: Look(name) for name in STRUCTURES},
    **{f"{n}, transformer": Look(n, network="transformer") for n in ("kfac", "ekfac", "unit_wise")},
    "sampled": Look("kfac", {"fisher": "mc", "seed": 4}),
    **{
        f"sampled, {name}": Look(
            "kfac", {"fisher": "mc"}, shares=((8, 8), (0, 16)), likelihood=name
        )
        for name in ("poisson", "gaussian", "bernoulli")
    },
    "sampled tokens": Look("ekfac", {"fisher": "mc"}, "transformer"),
    "normalised tokens": Look("kfac", {"fisher": "improved"}, "transformer", ((0, 16), (7, 9))),
    "empirical": Look("full", {"fisher": "empirical"}),
    "ignored in one process": Look("kfac", ignored=3),
    "tokens ignored": Look("kfac", network="transformer", ignored=2),
    "no samples": Look("kfac", {"fisher": "mc"}, shares=((0, 16), (5, 11))),
    "fewer batches": Look("full", {"fisher": "mc"}, shares=((8, 8), (16, None), (16, None))),
    "no batches": Look("tkfac", shares=((16, None), (16, None))),
}


def looking(rank: int) -> dict[str, Any]:
    world = torch.distributed.group.WORLD
    found: dict[str, Any] = {
        name: look.matrix(make(look.network), look.share(rank), process_group=world).to_dense()
        for name, look in LOOKS.items()
    }
    look = LOOKS["kfac"]
    found["wrapped"] = look.matrix(
        nn.parallel.DistributedDataParallel(make("mlp")), look.share(rank)
    ).to_dense()
    found["alone"] = look.matrix(make("mlp"), look.share(rank)).to_dense()
    return found


@pytest.fixture(scope="module")
def looked() -> list[dict[str, Any]]:
    return processes.run(looking)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOKS)
def test_the_matrix_is_that_of_the_data_of_all(looked: list[dict[str, Any]], name: str) -> None:
    look = LOOKS[name]
    expected = look.matrix(make(look.network), look.joint()).to_dense()
    assert float(expected.norm()) > 0
    for found in looked:
        dense.assert_same(found[name], expected, 1e-10)


@pytest.mark.slow
def test_nobody_else_is_asked_without_a_group(looked: list[dict[str, Any]]) -> None:
    look = LOOKS["kfac"]
    joint = look.matrix(make("mlp"), look.joint()).to_dense()
    for rank, found in enumerate(looked):
        dense.assert_same(found["wrapped"], joint, 1e-10)
        dense.assert_same(found["alone"], look.matrix(make("mlp"), look.share(rank)).to_dense())


# -- what one process leaves out -------------------------------------------------------------------


class Switched(nn.Module):
    """A network of which each sample takes one of two branches, and one branch has a bad sample."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(3, 4)
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        right = x[:, 0] > 0
        h = x.new_zeros(len(x), 4)
        if bool((~right).any()):
            h = h + self.left(x) * (~right).unsqueeze(1)
        if bool(right.any()):
            h = h + self.right(x) * right.unsqueeze(1)
        return self.last(torch.tanh(h))


def switched() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return Switched().double()


def branches(bad: bool) -> Batches:
    """Return one joint batch; the first process has samples of the left branch alone."""
    x = torch.linspace(-1.2, 1.1, 24, dtype=torch.float64).reshape(8, 3).clone()
    second = x.flip(0).clone()
    if bad:
        second[-1] = torch.nan  # Of the second process.
    return [(x, torch.arange(8) % 2), (second, torch.arange(8) % 2)]


def halves(data: Batches, rank: int) -> Batches:
    return [(x.chunk(2)[rank], y.chunk(2)[rank]) for x, y in data]


def branching(rank: int) -> dict[bool, Tensor]:
    world = torch.distributed.group.WORLD
    return {
        bad: natgrad.fisher_matrix(
            switched(),
            halves(branches(bad), rank),
            structure="block_diagonal",
            process_group=world,
        ).to_dense()
        for bad in (False, True)
    }


@pytest.mark.slow
def test_layers_that_one_process_does_not_reach_or_that_overflow_there() -> None:
    found = processes.run(branching)
    for bad in (False, True):
        expected = natgrad.fisher_matrix(
            switched(), branches(bad), structure="block_diagonal"
        ).to_dense()
        for one in found:
            dense.assert_same(one[bad], expected, 1e-10)


# -- shards ----------------------------------------------------------------------------------------


def sharded(network: str, reshards: bool) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    model: Any = make(network)
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    for layer in (model[0], model[2], model[4]):
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshards)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshards)
    return model


def in_shards(rank: int) -> dict[str, Any]:
    look, found = LOOKS["kfac"], {}
    for reshards in (True, False):
        model = sharded("mlp", reshards)
        found["kfac", reshards] = look.matrix(model, look.share(rank)).to_dense()
        found["full", reshards] = LOOKS["full"].matrix(model, look.share(rank)).to_dense()
        sizes = [p.numel() for p in model.parameters()]
        local = [p.to_local().numel() for p in model.parameters()]  # type: ignore[attr-defined]
        found["shards", reshards] = sum(local) < sum(sizes)
        with torch.no_grad():
            model(look.share(rank)[0][0])  # Leaves some parameters whole.
        found["again", reshards] = look.matrix(model, look.share(rank)).to_dense()
        # And training goes on as if nothing had been looked at.
        optimizer = natgrad.KFAC(model, lr=0.1)
        x, y = look.share(rank)[0]
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        parameters: Any = list(model.parameters())
        found["trained", reshards] = torch.cat([p.full_tensor().flatten() for p in parameters])
    try:
        LOOKS["fewer batches"].matrix(model, LOOKS["fewer batches"].share(rank))
    except ValueError as error:
        found["said"] = str(error)
    return found


@pytest.mark.slow
@processes.shards_on_cpus
def test_shards_are_whole_for_the_matrix() -> None:
    each = processes.run(in_shards)
    joint = LOOKS["kfac"].joint()
    model = make("mlp")
    optimizer = natgrad.KFAC(model, lr=0.1)
    functional.cross_entropy(model(joint[0][0]), joint[0][1]).backward()
    optimizer.step()
    trained = torch.cat([p.detach().flatten() for p in model.parameters()])
    for found in each:
        for reshards in (True, False):
            for name in ("kfac", "full"):
                expected = LOOKS[name].matrix(make("mlp"), joint).to_dense()
                dense.assert_same(found[name, reshards], expected, 1e-10)
            assert torch.equal(found["again", reshards], found["kfac", reshards])
            assert found["shards", reshards]
            dense.assert_same(found["trained", reshards], trained, 1e-10)
        assert "different numbers of batches" in found["said"]


# -- posteriors ------------------------------------------------------------------------------------


def described(model: nn.Module, data: Batches, **options: Any) -> dict[str, Any]:
    posterior = natgrad.Laplace(model, data, **options)
    found: dict[str, Any] = {
        "count": torch.tensor(posterior.count, dtype=torch.float64),
        "evidence": torch.tensor(posterior.log_marginal_likelihood(0.3), dtype=torch.float64),
        "precision": torch.tensor(posterior.optimize_prior_precision(), dtype=torch.float64),
    }
    x = batch("mlp", 9)[0]
    found["mean"], found["covariance"] = posterior.functional_variance(x)
    found["sample"] = posterior.sample(2, torch.Generator().manual_seed(1))
    return found


POSTERIORS: dict[str, dict[str, Any]] = {
    "kfac": {"structure": "kfac"},
    "full": {"structure": "full"},
    "last layer": {"structure": "full", "parameters": "last_layer"},
}
PLACES = {
    "group": "ignored in one process",
    "shards": "ignored in one process",
    "no batches": "no batches",
}


def posteriors(rank: int) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for name, options in POSTERIORS.items():
        for place, look in PLACES.items():
            shards = place == "shards"
            group = None if shards else torch.distributed.group.WORLD
            model = sharded("mlp", True) if shards else make("mlp")
            data = LOOKS[look].share(rank)
            found[name, place] = described(model, data, process_group=group, **options)
    return found


@pytest.mark.slow
@processes.shards_on_cpus
def test_posteriors_are_those_of_the_data_of_all() -> None:
    each = processes.run(posteriors)
    for name, options in POSTERIORS.items():
        for place, look in PLACES.items():
            expected = described(make("mlp"), LOOKS[look].joint(), **options)
            for found in each:
                for key, value in expected.items():
                    dense.assert_same(found[name, place][key], value, 1e-9)
