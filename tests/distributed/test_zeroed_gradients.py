"""Entries of gradients that are set to zero stay where they are in all processes."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import natgrad
from tests import processes
from tests.cases import normal


def mask() -> Tensor:
    kept = torch.ones(6, 4, dtype=torch.float64)
    kept[:2] = 0
    kept[3, ::2] = 0
    return kept


def train(rank: int) -> tuple[Tensor, Tensor]:
    """Return how the masked weights have changed, and all weights."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    replicas = nn.parallel.DistributedDataParallel(model)
    before = model[0].weight.detach().clone()
    optimizer = natgrad.KFAC(replicas)
    for step in range(4):
        optimizer.zero_grad()
        x, y = normal(12, 4, seed=10 * step + rank), torch.arange(12) % 3
        if rank == 1:
            x[:, 1] = 0.0  # What no gradient comes from, in one process.
        F.cross_entropy(replicas(x), y).backward()
        model[0].weight.grad *= mask()
        optimizer.step()
    moved = model[0].weight.detach() - before
    return moved, nn.utils.parameters_to_vector(model.parameters()).detach()


def test_masked_weights_stay_and_replicas_are_alike():
    (moved, first), (_, second) = processes.run(train)
    assert not moved[mask() == 0].any()
    assert moved[mask() == 1].any()
    assert torch.equal(first, second)
