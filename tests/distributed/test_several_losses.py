"""Losses with backward passes of their own in several processes: the step is that of their sum."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests import processes
from tests.cases import normal
from tests.optim.test_several_backward_passes import (
    METHODS,
    Way,
    asked_for,
    gradients_of_samples,
    looked_at_after,
    looked_at_before,
    one_by_one,
    together,
)

#: What each of two processes does; the last one leaves the number of passes to each.
WAYS: dict[str, tuple[Way, Way]] = {
    "one_by_one": (one_by_one, one_by_one),
    "asked_for": (asked_for, asked_for),
    "looked_at_before": (looked_at_before, looked_at_before),
    "looked_at_after": (looked_at_after, looked_at_after),
    "probed": (one_by_one, one_by_one),
    "differing": (one_by_one, together),
}
#: One of each way to look at passes; others differ in what they sum up of them.
OBSERVING = ("kfac", "isotropic", "exact_ngd", "fngd")


def halves(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """Return the losses of two halves of a batch, of which one may have no labels."""
    out, middle = model(x), len(x) // 2
    parts = (slice(None, middle), slice(middle, None))
    return [
        functional.cross_entropy(out[part], y[part], reduction="sum") / len(x) for part in parts
    ]


def train(name: str, way: Way, rank: int, probes: bool = False) -> Tensor:
    """Train as one of two processes; return the weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    optimizer = METHODS[name](model, "categorical", process_group=torch.distributed.group.WORLD)
    for step in range(3):
        optimizer.zero_grad()
        if probes:
            gradients_of_samples(model, "before")
        for number in range(2):
            x, y = normal(12, 4, seed=100 * rank + 10 * step + number), torch.arange(12) % 3
            if step == 1 and rank == 1:
                y[:6] = -100
            way(halves(model, x, y), list(model.parameters()))
        if probes:
            gradients_of_samples(model, "after")
        for p in model.parameters():
            torch.distributed.all_reduce(p.grad)
            p.grad /= 2
        optimizer.step()
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def replica(rank: int) -> dict[tuple[str, str], Tensor]:
    warnings.simplefilter("ignore")
    ways = {"together": (together, together), **WAYS}
    # A rate of 1/α saturates units, whose zeros are then left out by those processes alone that
    # heard of samples without a label with their first loss.
    return {
        (name, way): train(name, both[rank], rank, probes=way == "probed")
        for name in METHODS
        for way, both in ways.items()
        if (name in OBSERVING or way in ("together", "one_by_one", "differing"))
        and (name, way) != ("isotropic", "differing")
    }


@pytest.mark.slow
def test_the_step_is_that_of_the_sum() -> None:
    found = processes.run(replica)
    for (name, way), weights in found[0].items():
        assert torch.equal(weights, found[1][name, way]), (name, way)
        expected = found[0][name, "together"]
        torch.testing.assert_close(weights, expected, msg=lambda m: f"{name}, {way}: {m}")  # noqa: B023
