"""What is left out of samples with ignored events, and of no others, whatever batch they are in."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from natgrad import Capture
from natgrad.fisher import estimation
from tests import dense
from tests.cases import generator, normal
from tests.methods import make_optimizer

SAMPLES, WORDS, LENGTH = 6, 7, 5

#: The second part holds all ignored events.
PARTS = (torch.tensor([0, 2, 3]), torch.tensor([1, 4, 5]))


class Tokens(nn.Module):
    """A model of tokens with a table called once for all samples, and a matrix used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 4)
        self.positions = nn.Embedding(LENGTH, 4)
        self.hidden, self.mixed = nn.Linear(4, 2), nn.Linear(2, 4)
        self.head = nn.Linear(4, WORDS)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x) + self.positions(torch.arange(LENGTH))
        return self.head(torch.relu(self.mixed(torch.relu(self.hidden(h)))))


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "tokens":
        return Tokens().double()
    layers = [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 2), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(27, 3)).double()


def data(name: str) -> tuple[Tensor, Tensor]:
    if name == "tokens":
        x, y = torch.randint(WORDS, (2, SAMPLES, LENGTH), generator=generator(1))
        y[1, 2:] = y[4, 0] = -100
        return x, y
    y = torch.randint(3, (SAMPLES,), generator=generator(2))
    y[[1, 4]] = -100
    return normal(SAMPLES, 2, 6, 6), y


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(model(x).flatten(0, -2), y.flatten(), reduction="sum")


@pytest.mark.parametrize("name", ["convolutions", "tokens"])
def test_complete_samples_have_positions_that_nothing_reaches(name):
    """Otherwise what is compared here would not depend on batches."""
    model, (x, y) = make(name), data(name)
    with Capture(model) as capture:
        output = model(x)
        gradient = torch.autograd.grad(loss_of(lambda _: output, x, y), output, retain_graph=True)
        rows = capture.pull_back(output, gradient[0].unsqueeze(0))
        silent = (rows["2" if name == "convolutions" else "hidden"].output_gradients == 0).all(-1)
    assert silent[PARTS[0]].any()


@pytest.mark.parametrize("chunk", [1, estimation.PULL_BACK_ELEMENTS])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("structure", ["kfac", "foof", "tkfac"])
@pytest.mark.parametrize("name", ["convolutions", "tokens"])
def test_matrices_are_the_same_in_batches(name, structure, fisher, chunk):
    model, (x, y) = make(name), data(name)
    for sharing in ("expand", "reduce", "split")[: 3 if structure == "kfac" else 2]:

        def matrix(batches: Any, sharing: str = sharing) -> Tensor:
            return natgrad.fisher_matrix(
                model, batches, "categorical", structure, fisher, weight_sharing=sharing
            ).to_dense()

        whole = matrix([(x, y)])
        with mock.patch.object(estimation, "PULL_BACK_ELEMENTS", chunk):
            dense.assert_same(matrix([(x[part], y[part]) for part in PARTS]), whole, 1e-11)
            dense.assert_same(matrix([(x, y)]), whole, 1e-11)


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("kind", [natgrad.KFAC, natgrad.EKFAC, natgrad.TKFAC])
@pytest.mark.parametrize("name", ["convolutions", "tokens"])
def test_steps_are_the_same_in_several_passes(name, kind, fisher):
    def train(parts: Any) -> Tensor:
        model, (x, y) = make(name), data(name)
        optimizer = make_optimizer(
            kind, model, fisher=fisher, lr=0.1, length="lr", damping=1e-2, factors=1, inverses=1,
            **({} if kind is natgrad.TKFAC else {"rows_per_unit": None}),
        )  # fmt: skip
        for _ in range(2):
            optimizer.zero_grad()
            for part in parts:
                (loss_of(model, x[part], y[part]) / (y >= 0).sum()).backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    whole = train([torch.arange(SAMPLES)])
    assert (whole - torch.cat([p.flatten() for p in make(name).parameters()])).norm() > 1e-2
    dense.assert_same(train(PARTS), whole, 1e-10)
