"""Tables that are looked up once for all samples, as position embeddings are."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from tests import dense
from tests.cases import normal

INDICES = {
    "one row": lambda t: torch.arange(t).unsqueeze(0),
    "flat": lambda t: torch.arange(t),
    "pairs": lambda t: (torch.arange(t)[:, None] - torch.arange(t)).abs(),
}


class WithPositions(nn.Module):
    """A table of positions (or of pairs of them) is added to tokens before they are mixed."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.table = nn.Embedding(7, 3)
        self.first, self.head = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        positions = self.table(INDICES[self.how](x.shape[1]))
        if self.how == "pairs":
            mixed = torch.einsum("nti,sti->nsi", x, positions)
        else:
            mixed = x + positions
        return self.head(torch.tanh(self.first(mixed)).mean(1))


def make(how: str) -> WithPositions:
    torch.manual_seed(0)
    return WithPositions(how).double()


@pytest.mark.parametrize("how", list(INDICES))
@pytest.mark.parametrize("samples", [1, 2, 3, 4, 5, 8])
def test_rows_are_those_of_single_samples(how, samples):
    """Four positions: with 1, 2 and 4 samples the shape does not tell that they are shared."""
    model, x = make(how), normal(samples, 4, 3)
    with natgrad.Capture(model) as capture:
        out = model(x)
        vectors = normal(2, *out.shape, seed=3)
        rows = capture.pull_back(out, vectors).to_dense()
    jacobian = dense.jacobian(model, x)[1]
    dense.assert_same(rows, dense.rows(jacobian, vectors).flatten(0, 1), 1e-10)


@pytest.mark.parametrize("structure", ["full", "block_diagonal", "diagonal", "unit_wise"])
@pytest.mark.parametrize("how", list(INDICES))
@pytest.mark.parametrize("samples", [2, 3, 4, 8])
def test_exact_fisher_matrices(how, samples, structure):
    model, x = make(how), normal(samples, 4, 3)
    y = torch.arange(samples) % 3
    found = natgrad.fisher_matrix(model, (x, y), structure=structure, fisher="exact")
    exact = dense.fisher(model, x, y, dense.categorical(), "exact")
    dense.assert_same(found.trace(), exact.trace(), 1e-10)
    dense.assert_same(found.diagonal(), exact.diagonal(), 1e-10)
    if structure == "full":
        dense.assert_same(found.to_dense(), exact, 1e-10)


@pytest.mark.parametrize("structure", ["diagonal", "kfac", "ekfac"])
@pytest.mark.parametrize("samples", [3, 4])
def test_sampled_labels_are_right_on_average(structure, samples):
    """The sum over samples of independent rows with mean zero has the right second moment."""
    model, x = make("flat"), normal(samples, 4, 3)
    exact = natgrad.fisher_matrix(model, (x, None), structure=structure, fisher="exact")
    drawn = natgrad.fisher_matrix(
        model, (x, None), structure=structure, fisher=natgrad.MonteCarloFisher(4000)
    )
    size = model.table.weight.numel()
    expected, found = exact.to_dense()[:size, :size], drawn.to_dense()[:size, :size]
    assert (found - expected).norm() < 0.06 * expected.norm()


@pytest.mark.parametrize("how", list(INDICES))
@pytest.mark.parametrize("structure", ["full", "kfac", "diagonal"])
def test_training_takes_steps(structure, how):
    model = make(how)
    x, y = normal(5, 4, 3), torch.tensor([0, 1, 2, 0, 1])
    options: dict[str, Any] = {"damping": 0.1, "lr": 0.2}
    optimizer_type = {
        "full": natgrad.ExactNGD, "kfac": natgrad.KFAC, "diagonal": natgrad.DiagonalNGD
    }[structure]  # fmt: skip
    optimizer = optimizer_type(model, **options)
    first = functional.cross_entropy(model(x), y).item()
    for _ in range(10):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert functional.cross_entropy(model(x), y).item() < first


def test_true_labels_leave_the_table_out_and_say_so():
    model = make("one row")
    twin = copy.deepcopy(model)
    x, y = normal(3, 4, 3), torch.tensor([0, 1, 2])
    optimizer = natgrad.KFAC(model, fisher="empirical", lr=0.1)
    with pytest.warns(UserWarning, match="table.weight .the samples of a batch are coupled"):
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(12):
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    for before, after in zip(twin.parameters(), model.parameters(), strict=True):
        assert after.isfinite().all() and not torch.equal(before, after)


class Tied(nn.Module):
    """A table tied to the output layer, and a bias that a module and its layer both own."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(5, 3), nn.Linear(3, 5)
        self.head.weight = self.table.weight
        self.bias = self.head.bias
        self.reads = True

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.table(tokens) if self.reads else torch.ones(*tokens.shape, 3).double()
        return self.head(torch.tanh(h)).mean(1)


@pytest.mark.parametrize("structure", ["full", "kfac", "ekfac", "diagonal"])
def test_shared_parameters_of_which_one_use_is_not_reached(structure):
    torch.manual_seed(0)
    model = Tied().double()
    tokens, y = torch.tensor([[0, 1, 2], [3, 4, 4], [1, 1, 0]]), torch.tensor([0, 3, 2])
    for reads in (True, False, True):
        model.reads = reads
        exact = dense.fisher(model, tokens, y, dense.categorical(), "exact")
        found = natgrad.fisher_matrix(model, (tokens, y), structure=structure, fisher="exact")
        if structure in ("full", "diagonal"):
            dense.assert_same(found.diagonal(), exact.diagonal(), 1e-10)
        optimizer = natgrad.KFAC(model, lr=0.1) if structure == "kfac" else None
        if optimizer is not None:
            functional.cross_entropy(model(tokens), y).backward()
            optimizer.step()
            assert all(p.isfinite().all() for p in model.parameters())
