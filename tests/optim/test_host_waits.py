"""A step waits for the device once: whatever reads a tensor on the host is counted."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import natgrad
from tests.cases import generator, normal
from tests.methods import make_optimizer

READS = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "nonzero", "cpu")


@pytest.fixture
def reads(monkeypatch):
    """Record the method of every read."""
    found: list[str] = []
    for name in READS:
        real = getattr(torch.Tensor, name)

        def counted(self, *args, name=name, real=real):
            found.append(name)
            return real(self, *args)

        monkeypatch.setattr(torch.Tensor, name, counted)
    return found


@pytest.mark.parametrize(
    ("optimizer_type", "options"),
    [
        (natgrad.KFAC, {}),
        (natgrad.KFAC, {"momentum": 0.9, "weight_decay": 0.1}),
        (natgrad.KFAC, {"length": "quadratic_model", "momentum": 0.9}),
        (natgrad.KFAC, {"lr": 1.5, "norm_clip": 1.0, "graft": "adam"}),
        (natgrad.EKFAC, {}),
        (natgrad.TKFAC, {}),
        (natgrad.TEKFAC, {}),
        (natgrad.SINGD, {}),
        (natgrad.UnitWiseNGD, {}),
        (natgrad.DiagonalNGD, {}),
        (natgrad.ExactNGD, {}),
        (natgrad.BlockDiagonalNGD, {}),
    ],
)
def test_a_step_waits_once(optimizer_type, options, reads):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    optimizer = make_optimizer(optimizer_type, model, **options)
    for seed in range(6):  # Steps that factorise among them, and steps that do not.
        y = torch.randint(0, 3, (12,), generator=generator(seed))
        optimizer.zero_grad()
        functional.cross_entropy(model(normal(12, 6, seed=seed)), y).backward()
        reads.clear()
        optimizer.step()
        # The first step compares the gradients with what its rows explain, and waits for that, and
        # for the unit of relative damping.
        relative = isinstance(optimizer_type.method.damping, natgrad.RelativeDamping)
        first = ["tolist", "tolist"] if relative else ["tolist"]
        assert reads == (first if seed == 0 else []) + ["tolist"], (seed, reads)


class Gated(nn.Module):
    """A network with branches behind gates that stay shut."""

    def __init__(self, branches: int) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.branches = nn.ModuleList([nn.Linear(8, 8) for _ in range(branches)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.layer(x))
        for branch in self.branches:
            h = h + 0.0 * torch.tanh(branch(h))
        return self.head(h)


def test_layers_without_gradients_are_waited_for_once(reads):
    found = []
    for branches in (0, 1, 3):
        torch.manual_seed(0)
        model = Gated(branches).double()
        optimizer = natgrad.ExactNGD(model)
        for seed in range(4):  # At the fourth pass nothing is looked at besides.
            y = torch.randint(0, 3, (12,), generator=generator(seed))
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(normal(12, 6, seed=seed)), y)
            reads.clear()
            loss.backward()
            last = len(reads)
            optimizer.step()
        found.append(last)
    assert found == [found[0], found[0] + 1, found[0] + 1]
