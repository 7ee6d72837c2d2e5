"""Samples are in the second dimension where members of an ensemble, or draws, come first."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from tests.cases import normal
from tests.dense import assert_same


class Members(nn.Module):
    """A layer of every member in one product."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(3, inputs, outputs, seed=inputs) / 2)
        self.bias = nn.Parameter(normal(3, 1, outputs, seed=outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class Ensemble(nn.Module):
    """Members first, ``(M, N, C)``, or transposed."""

    def __init__(self, members_first: bool, heads: bool) -> None:
        super().__init__()
        self.members_first, self.heads = members_first, heads
        self.first, self.last = Members(4, 5), Members(5, 2)

    def forward(self, x: Tensor):
        z = self.last(torch.tanh(self.first(x.expand(3, -1, -1))))
        z = z if self.members_first else z.transpose(0, 1)
        return (z, 2 * z) if self.heads else z


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.filterwarnings("error:natgrad")
def test_the_matrix_and_its_count_are_those_of_samples(heads):
    x, y, found = normal(6, 4), normal(6, 3, 2, seed=3), []
    for members_first in (True, False):
        model = Ensemble(members_first, heads)
        likelihood = natgrad.Gaussian(reduce_outputs="sum")
        given = {0: likelihood, 1: likelihood} if heads else likelihood
        optimizer = natgrad.ExactNGD(model, given, lr=0.0, kl_clip=None, fisher="exact")
        for _ in range(2):
            optimizer.zero_grad()
            for z in model(x) if heads else [model(x)]:
                z = z.transpose(0, 1) if members_first else z
                ((z - y).square().sum() / 12).backward(retain_graph=True)
            optimizer.step()
        assert optimizer.preconditioner.capture.sources.time_first is members_first
        found.append(optimizer.preconditioner.curvature.matrix().to_dense())
    assert_same(found[0], found[1], 1e-10)


def test_samples_that_are_mixed_there_stay_in_the_first_dimension():
    """Of one sequence, tokens are no samples, though there are as many as inputs."""

    class OneSequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()

        def forward(self, tokens: Tensor) -> Tensor:
            h = torch.tanh(self.embedding(tokens))
            h = functional.softmax(h @ h.T, -1) @ h
            return self.head(h).unsqueeze(0)

    model = OneSequence()
    optimizer = natgrad.KFAC(model, "gaussian")
    model(normal(5, 3)).square().sum().backward()
    optimizer.step()
    assert not optimizer.preconditioner.capture.sources.time_first
