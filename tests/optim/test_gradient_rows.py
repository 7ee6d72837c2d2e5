"""Preconditioning the rows of the present gradient in place of the gradient itself."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from natgrad.operators import KroneckerOperator
from natgrad.optim.preconditioner import Preconditioner


class Branch(nn.Module):
    """A residual branch that begins at zero, as behind a normalisation whose weight does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.gate = nn.Linear(40, 40), nn.Linear(40, 40)
        self.head = nn.Linear(40, 3)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.gate(torch.tanh(self.inner(x))))


def train(penalty: float = 0.0, factor: float = 1.0) -> tuple[list[str], list[list[str]]]:
    """Take three steps; return what was done again, and which layers' rows each step took."""
    torch.manual_seed(0)
    model = Branch().double()
    optimizer = natgrad.KFAC(model, fisher="exact")
    x, y = torch.randn(4, 40).double(), torch.tensor([0, 1, 2, 1])
    repeated: list[str] = []
    taken: list[list[str]] = []
    repair, multiply = Preconditioner._repair, KroneckerOperator.multiply_rows

    def repaired(self: Preconditioner) -> None:
        repeated.append(f"step {len(taken)}")
        repair(self)

    def multiplied(self: KroneckerOperator, *rows: Any) -> Any:
        taken[-1].append(self.layout.names[0])
        return multiply(self, *rows)

    for step in range(3):
        taken.append([])
        loss = functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        (loss + penalty * model.inner.weight.square().sum()).backward()
        gradient = model.inner.weight.grad
        assert gradient is not None and (step or penalty or not gradient.any())
        gradient.mul_(factor)
        model.inner.bias.grad.mul_(factor)
        before = model.inner.weight.detach().clone()
        with (
            mock.patch.object(Preconditioner, "_repair", repaired),
            mock.patch.object(KroneckerOperator, "multiply_rows", multiplied),
        ):
            optimizer.step()
        moved = not torch.equal(before, model.inner.weight)
        assert moved == bool(gradient.any())
    return repeated, taken


@pytest.mark.parametrize("factor", [1.0, 0.5, 0.0])
def test_rows_that_sum_to_zero_are_the_gradient(factor):
    """Nothing is done twice, and layers whose gradient begins at zero keep the cheaper way."""
    repeated, taken = train(factor=factor)
    assert not repeated
    assert all("inner.weight" in layers and "gate.weight" in layers for layers in taken)


def test_other_terms_of_the_loss_are_not_lost_where_rows_sum_to_zero():
    repeated, taken = train(penalty=1e-3)
    assert repeated == ["step 1"]
    assert "inner.weight" in taken[0] and not taken[1] and not taken[2]


@pytest.mark.parametrize("seed", range(3))
def test_rows_that_cancel_are_the_gradient_but_for_rounding(seed):
    """Inputs are far from zero, and a batch norm makes the gradients δ of a batch sum to zero."""
    torch.manual_seed(seed)
    inner, head = nn.Linear(400, 64), nn.Linear(64, 3)
    model = nn.Sequential(inner, nn.BatchNorm1d(64), nn.Tanh(), head)
    optimizer = natgrad.KFAC(model)
    x, y = 300.0 + torch.randn(16, 400), torch.randint(0, 3, (16,))
    for _ in range(2):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        with mock.patch.object(Preconditioner, "_repair") as repair:
            optimizer.step()
        assert not repair.called
