"""Optimizers in processes that know of others: whom they wait for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from natgrad.distributed.replicas import Replicas
from tests import processes
from tests.optim.every_optimizer import KINDS, make_model, weights

NAMES = [name for name, kind in KINDS.items() if kind.takes != "residuals"]


def trained(name: str, model: nn.Module) -> nn.Module:
    """Take two steps with an optimizer of a name; return the model."""
    optimizer = KINDS[name].make(model)
    for _ in range(2):
        KINDS[name].step(optimizer, model)
    return model


def alone(rank: int) -> dict[str, Tensor]:
    """Train on the first process only, with every optimizer."""
    found = {}
    if rank == 0:
        for name in NAMES:
            model = make_model()
            found[name] = weights(trained(name, model))
        natgrad.fisher_matrix(model, (torch.zeros(2, 5).double(), torch.zeros(2, 3).double()))
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_process_group_is_no_replica():
    found = processes.run(alone)[0]
    for name in NAMES:
        expected = weights(trained(name, make_model()))
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-12)


def together(rank: int) -> dict[str, Tensor]:
    """Train replicas on data of their own, told of in three ways."""
    result = {}
    for way in ("wrapped", "wrapped later", "named"):
        model = make_model()
        wrapped = nn.parallel.DistributedDataParallel(model) if way == "wrapped" else model
        options = {"process_group": torch.distributed.group.WORLD} if way == "named" else {}
        optimizer = natgrad.KFAC(wrapped, "gaussian", **options)
        if way == "wrapped later":
            wrapped = nn.parallel.DistributedDataParallel(model)
        for step in range(3):
            generator = torch.Generator().manual_seed(10 * step + rank)
            x = torch.randn(6, 5, generator=generator, dtype=torch.float64)
            optimizer.zero_grad()
            wrapped(x).square().sum(1).mean().backward()
            if way == "named":
                for p in model.parameters():
                    torch.distributed.all_reduce(p.grad)
                    p.grad.div_(2)
            optimizer.step()
        result[way] = weights(model)
    return result


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_replicas_stay_equal_however_they_are_told_of():
    first, second = processes.run(together)
    for way, found in first.items():
        assert torch.equal(found, second[way])
        torch.testing.assert_close(found, first["wrapped"], rtol=1e-9, atol=1e-12)


def uneven(rank: int) -> dict[str, Tensor]:
    """Train replicas on batches of other sizes, and one in which nothing counts."""
    result = {}
    for method in (natgrad.KFAC, natgrad.EKFAC, natgrad.SINGD):
        model = make_model()
        wrapped = nn.parallel.DistributedDataParallel(model)
        optimizer = method(wrapped)
        for step in range(8):
            generator = torch.Generator().manual_seed(10 * step + rank)
            x = torch.randn(3 + 4 * rank, 5, generator=generator, dtype=torch.float64)
            y = torch.randint(0, 3, (len(x),), generator=generator)
            if rank == step - 2:
                y[:] = -100
            optimizer.zero_grad()
            functional.cross_entropy(wrapped(x), y, reduction="sum").div(5).backward()
            optimizer.step()
        result[method.__name__] = weights(model)
    return result


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_replicas_stay_equal_whatever_each_has_seen():
    first, second = processes.run(uneven)
    for name, found in first.items():
        assert found.isfinite().all() and torch.equal(found, second[name]), name


def test_one_process_waits_for_nobody():
    model = make_model()
    assert Replicas.of(model).group is None
    assert natgrad.KFAC(model, "gaussian").preconditioner.replicas == Replicas()
    value = {"x": torch.ones(2)}
    Replicas().average(value)
    assert torch.equal(value["x"], torch.ones(2))


def refused(rank: int) -> tuple[dict[str, str], Tensor]:
    """Try what needs whole parameters on a sharded model."""
    from torch.distributed.fsdp import fully_shard

    said: dict[str, str] = {}
    points = torch.zeros(2, 5).double()
    for name in ("ResidualNGD", "ImplicitSGD"):
        model = make_model()
        fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (2,)))
        try:
            if name == "ResidualNGD":
                natgrad.ResidualNGD(model, natgrad.Residual(lambda u, x: u(x), points))
            else:
                KINDS[name].make(model)
            said[name] = "nothing"
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
    model = make_model()
    fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (2,)))
    parameters: list[Any] = list(trained("Padam", model).parameters())
    return said, torch.cat([p.full_tensor().detach().flatten() for p in parameters])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@processes.shards_on_cpus
def test_what_needs_whole_parameters_refuses_shards():
    said, found = processes.run(refused)[0]
    # Padam works entry by entry, so that shards do.
    expected = weights(trained("Padam", make_model()))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    for name, sentence in said.items():
        assert "is sharded, as by fully_shard (FSDP2)" in sentence, (name, sentence)
        assert sentence.startswith("ValueError: ")
