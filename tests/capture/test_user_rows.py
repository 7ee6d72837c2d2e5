"""Rows that the user's own backward pass leaves: right, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from tests import dense
from tests.cases import normal
from tests.fisher.test_situations import rows_of
from tests.situations import Calls

pytestmark = pytest.mark.filterwarnings("ignore:natgrad")

Program = Callable[..., Tensor]


def network(function: Program) -> Calls:
    torch.manual_seed(0)
    parts = {"layer": nn.Linear(3, 4), "branch": nn.Linear(4, 4), "head": nn.Linear(4, 2)}
    return Calls(function, **parts).double()


def step(optimizer: natgrad.ExactNGD, model: nn.Module, *inputs: Any) -> None:
    optimizer.zero_grad()
    (0.5 * model(*inputs).square().sum() / len(inputs[0])).backward()
    optimizer.step()


def mixed(m: Any, x: Tensor, state: int) -> Tensor:
    h = torch.tanh(m.layer(x))
    return m.head(torch.tanh(m.branch(0.7 * h + 0.3 * h[[1, 2, 3, 0]] if state else h)))


def test_samples_that_are_mixed_later_are_refused():
    model = network(mixed)
    optimizer = natgrad.ExactNGD(model, "gaussian", fisher="empirical", lr=0.0)
    for _ in range(4):
        step(optimizer, model, normal(4, 3), 0)
    with pytest.warns(UserWarning, match=r"trains these parameters by adamw: .*coupled"):
        step(optimizer, model, normal(4, 3), 1)
    assert set(optimizer.preconditioner.untrusted) == {"layer.bias", "layer.weight"}


def mixed_tokens(m: Any, x: Tensor) -> Tensor:
    h = torch.tanh(m.layer(x))
    return m.head(torch.tanh(m.branch(h + h.roll(1, 0))))


def test_samples_that_are_mixed_are_refused_where_their_dimension_is_told():
    model = network(mixed_tokens)
    optimizer = natgrad.ExactNGD(model, "gaussian", fisher="empirical", lr=0.0, batch_dim=0)
    with pytest.warns(UserWarning, match=r"trains these parameters by adamw: .*coupled"):
        step(optimizer, model, normal(4, 2, 3))
    assert set(optimizer.preconditioner.untrusted) == {"layer.bias", "layer.weight"}
    step(optimizer, model, normal(4, 2, 3))
    checks = optimizer.preconditioner.capture.sources.checks
    step(optimizer, model, normal(4, 2, 3))
    assert optimizer.preconditioner.capture.sources.checks == checks


def gated(m: Any, x: Tensor, state: int) -> Tensor:
    h = torch.tanh(m.layer(x))
    return m.head(h + state * torch.tanh(m.branch(h)) @ m.branch.weight)


def test_layers_that_gradients_first_reach_later_are_checked_then():
    model = network(gated)
    optimizer = natgrad.ExactNGD(model, "gaussian", fisher="empirical", lr=0.0)
    for _ in range(5):
        step(optimizer, model, normal(4, 3), 0)
    with pytest.warns(UserWarning, match=r"trains these parameters by adamw: .*outside the calls"):
        step(optimizer, model, normal(4, 3), 1)
    assert set(optimizer.preconditioner.untrusted) == {"branch.bias", "branch.weight"}


def two_views(m: Any, x: Tensor) -> Tensor:
    left, right = torch.tanh(m.layer(torch.cat([x, torch.cos(x)]))).chunk(2)
    return m.head(functional.linear(left * right, m.branch.weight @ m.branch.weight))


@pytest.mark.filterwarnings("ignore:NaturalGradient")
def test_what_is_known_of_a_pass_holds_though_some_of_it_is_refused():
    model, x = network(two_views), normal(4, 3)
    method = {"structure": "block_diagonal", "fisher": "empirical", "lr": 0.0, "damping": 0.1}
    optimizer = natgrad.NaturalGradient(model, "gaussian", **method)
    z, jacobian = rows_of(model, (x,), 0)
    step(optimizer, model, x)
    assert set(optimizer.preconditioner.untrusted) == {"branch.bias", "branch.weight"}
    rows = torch.einsum("nc,ncp->np", z, jacobian)[:, :16]
    matrix = optimizer.preconditioner.curvature.matrix()
    dense.assert_same(matrix.to_dense()[:16, :16], rows.T @ rows / 4, 1e-10)


@pytest.mark.filterwarnings("ignore:NaturalGradient")
def test_the_rest_of_a_layer_keeps_its_rows_where_a_part_is_refused():
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(functional.linear(m.inner(x)[0], m.inner.weight_ih_l0).mean(1))

    torch.manual_seed(0)
    model, x = (
        Calls(forward, inner=nn.RNN(3, 3, batch_first=True), head=nn.Linear(3, 2)).double(),
        normal(4, 2, 3),
    )
    method = {"structure": "block_diagonal", "fisher": "empirical", "lr": 0.0, "damping": 0.1}
    optimizer = natgrad.NaturalGradient(model, "gaussian", **method)
    z, jacobian = rows_of(model, (x,), 0)
    step(optimizer, model, x)
    refused = {"inner.weight_ih_l0", "inner.bias_ih_l0"}
    assert set(optimizer.preconditioner.untrusted) == refused
    rows = torch.einsum("nc,ncp->np", z, jacobian)
    own = [9, 10, 11, 12, 13, 14, 15, 16, 17, 21, 22, 23]  # After weight_ih, and after bias_ih.
    found = optimizer.preconditioner.curvature.operator("inner.weight_hh_l0").to_dense()
    dense.assert_same(found, rows[:, own].T @ rows[:, own] / 4, 1e-10)
