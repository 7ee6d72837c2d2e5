"""Capture and optimizers under DistributedDataParallel, on two gloo processes."""

import tempfile
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import distributed, nn

import natgrad

WORLD = 2


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def make_data():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, 3, (12,), generator=generator)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", WORLD)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    try:
        model = make_model()
        wrapped = nn.parallel.DistributedDataParallel(model)
        inputs, targets = (part.chunk(WORLD)[rank] for part in make_data())

        # Pulling back inside the backward pass leaves DDP's averaged gradients right.
        optimizer = natgrad.KFAC(wrapped, fisher="exact", factor_interval=1, inverse_interval=1)
        nn.functional.cross_entropy(wrapped(inputs), targets).backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(wrapped(inputs), targets).backward()
            optimizer.step()
        parameters = [p.detach().clone() for p in model.parameters()]
        matrix = natgrad.fisher_matrix(wrapped, (inputs, targets), structure="full")
        result = {"gradients": gradients, "parameters": parameters, "fisher": matrix.to_dense()}
        torch.save(result, f"{folder}/{rank}.pt")
    finally:
        distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results():
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (folder,), nprocs=WORLD)
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(WORLD)]


def test_averaged_gradients_are_those_of_the_joint_batch(results):
    model = make_model()
    inputs, targets = make_data()
    nn.functional.cross_entropy(model(inputs), targets).backward()
    for rank in range(WORLD):
        for found, p in zip(results[rank]["gradients"], model.parameters(), strict=True):
            torch.testing.assert_close(found, p.grad, rtol=1e-12, atol=1e-14)


def test_replicas_stay_equal_and_move(results):
    start = list(make_model().parameters())
    for first, second, before in zip(
        results[0]["parameters"], results[1]["parameters"], start, strict=True
    ):
        assert torch.equal(first, second)
        assert not torch.equal(first, before)


def test_each_replica_sees_the_fisher_of_its_own_samples(results):
    model = make_model()
    with torch.no_grad():
        for p, value in zip(model.parameters(), results[0]["parameters"], strict=True):
            p.copy_(value)
    for rank in range(WORLD):
        inputs, targets = (part.chunk(WORLD)[rank] for part in make_data())
        expected = natgrad.fisher_matrix(model, (inputs, targets), structure="full").to_dense()
        torch.testing.assert_close(results[rank]["fisher"], expected, rtol=1e-12, atol=1e-14)
