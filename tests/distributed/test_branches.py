"""Layers that only the samples of one process reach."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import natgrad
from natgrad.curvature import as_structure
from tests import processes
from tests.cases import Routed, normal

STRUCTURES = ("block_diagonal", "diagonal", "unit_wise", "kfac", "ekfac", "tkfac", "kpsvd")
SAMPLES = (4, 7)


def network() -> Routed:
    torch.manual_seed(0)
    return Routed().double()


def batch(rank: int) -> tuple[Tensor, Tensor]:
    sign, count = (1, -1)[rank], SAMPLES[rank]
    return sign * normal(count, 3, seed=count).abs(), normal(count, 2)


def matrices(rank: int, world: int) -> dict[str, Tensor]:
    """Return the Fisher matrix after a step of every structure."""
    found = {}
    x, y = batch(rank)
    for structure in STRUCTURES:
        model = nn.parallel.DistributedDataParallel(network(), find_unused_parameters=True)
        optimizer = natgrad.NaturalGradient(
            model, "gaussian", structure=as_structure(structure), fisher="exact", lr=0.0
        )
        loss = nn.functional.mse_loss(model(x), y, reduction="sum") / sum(SAMPLES)
        (world * loss).backward()
        optimizer.step()
        found[structure] = optimizer.preconditioner.curvature.matrix().to_dense()
    return found


@pytest.mark.filterwarnings("ignore")
def test_branches_are_averaged_over_the_samples_of_all_processes() -> None:
    for found in processes.run(matrices, 2, world=2):
        for structure in STRUCTURES:
            expected = natgrad.fisher_matrix(
                network(), [batch(0), batch(1)], "gaussian", as_structure(structure), "exact"
            ).to_dense()
            torch.testing.assert_close(found[structure], expected, rtol=1e-10, atol=1e-12)
            assert expected.diagonal().min() > 0
