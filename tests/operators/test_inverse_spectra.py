"""Diagonals and spectra of inverses that are kept by their rows, without a dense matrix."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import natgrad
from natgrad import Laplace, fisher_matrix
from natgrad.operators import DiagonalOperator, Operator
from natgrad.solvers import TruncatedEigh
from natgrad.tools import prune
from tests import dense
from tests.cases import normal


def network(inputs: int = 20) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 5), nn.Tanh(), nn.Linear(5, 2)).double()


@pytest.fixture
def never_dense(monkeypatch):
    def refuse(self):
        raise AssertionError("a dense matrix was formed")

    def begin():
        monkeypatch.setattr(Operator, "to_dense", refuse)

    return begin


@pytest.mark.parametrize("structure", ["full", "block_diagonal", "unit_wise"])
@pytest.mark.parametrize("weight", ["one batch", "two batches"])
@pytest.mark.parametrize("damping", [1.0, 1e-2, 1e-6, 0.0])
def test_inverses_by_rows(structure, weight, damping, never_dense):
    x = normal(6, 20)
    data = (x, None) if weight == "one batch" else [(x[:2], None), (x[2:], None)]
    matrix = fisher_matrix(network(), data, "gaussian", structure)
    inverse = matrix.inverse(damping)
    expected = inverse.to_dense()
    values = torch.linalg.eigvalsh(expected)
    never_dense()
    dense.assert_same(inverse.diagonal(), expected.diagonal(), 1e-8)
    dense.assert_same(inverse.eigenvalues().sort().values, values, 1e-8)
    dense.assert_same(inverse.trace(), expected.trace(), 1e-8)
    dense.assert_same(inverse.frobenius_norm(), torch.linalg.norm(expected), 1e-8)


@pytest.mark.parametrize("structure", ["full", "block_diagonal"])
def test_roots_and_truncated_inverses_by_rows(structure, never_dense):
    matrix = fisher_matrix(network(), (normal(6, 20), None), "gaussian", structure)
    made = [matrix.inverse_root(0.1), matrix.inverse(0.1, TruncatedEigh(1e-2))]
    expected = [one.to_dense() for one in made]
    never_dense()
    for one, other in zip(made, expected, strict=True):
        dense.assert_same(one.diagonal(), other.diagonal(), 1e-9)
        dense.assert_same(one.eigenvalues().sort().values, torch.linalg.eigvalsh(other), 1e-9)


@pytest.mark.parametrize("structure", ["full", "block_diagonal", "unit_wise"])
def test_variances_of_weights_and_pruning_need_no_dense_matrix(structure, never_dense):
    model, x, y = network(), normal(6, 20), normal(6, 2)
    posterior = Laplace(model, (x, y), "gaussian", structure, prior_precision=0.5)
    size = posterior.matrix.shape[0]
    precision = 6 * posterior.matrix.to_dense() + 0.5 * torch.eye(size).double()
    never_dense()
    variances = torch.linalg.inv(precision).diagonal()
    dense.assert_same(posterior.covariance.diagonal(), variances, 1e-9)
    prune(copy.deepcopy(model), posterior.matrix, 0.3)


def test_single_precision_loses_no_more_than_its_matrix():
    """λ far below the matrix, where 1/λ minus nearly as much is left of single precision."""
    model, x = network(3), normal(20, 3)
    exact = fisher_matrix(model, (x, None), "gaussian", "full").inverse(1e-4).diagonal()
    found = fisher_matrix(model.float(), (x.float(), None), "gaussian", "full")
    dense.assert_same(found.inverse(1e-4).diagonal().double(), exact, 1e-3)


@pytest.mark.parametrize("structure", ["full", "block_diagonal"])
def test_solutions_with_gradients_damped_elsewhere_are_those_of_the_matrix(structure):
    model, x, y = network(), normal(6, 20), torch.arange(6) % 2
    fisher = natgrad.ImprovedFisher(damping_on="gram")
    matrix = fisher_matrix(model, (x, y), "categorical", structure, fisher)
    damped = matrix.to_dense() + 0.1 * torch.eye(matrix.shape[0]).double()
    vector = normal(matrix.shape[0], 1)[:, 0]
    dense.assert_same(matrix.solve(vector, 0.1), torch.linalg.solve(damped, vector), 1e-9)
    inverse = matrix.inverse(0.1)
    dense.assert_same(inverse.diagonal(), torch.linalg.inv(damped).diagonal(), 1e-9)
    dense.assert_same(inverse.trace(), torch.linalg.inv(damped).trace(), 1e-9)


def test_sums_of_diagonals_are_diagonals():
    data = [(normal(6, 20, seed=seed), None) for seed in range(2)]
    first, second = (fisher_matrix(network(), one, "gaussian", "diagonal") for one in data)
    total = first + 2.0 * second
    assert all(isinstance(one, DiagonalOperator) for one in total.parts.values())
    expected = first.diagonal() + 2.0 * second.diagonal()
    dense.assert_same(total.inverse(0.1).diagonal(), 1.0 / (expected + 0.1))
    dense.assert_same(total.logdet(0.1), (expected + 0.1).log().sum())


def test_what_does_not_fit_memory_says_what_to_do(monkeypatch):
    matrix = fisher_matrix(nn.Linear(20000, 1), (torch.randn(3, 20000), None), "gaussian", "full")
    monkeypatch.setattr("os.sysconf", lambda name: 1)
    with pytest.raises(ValueError, match="entry by entry needs .* estimate_diagonal"):
        matrix.inverse(0.1).to_dense()
    with pytest.raises(ValueError, match="a sum of matrices, .* solver='conjugate_gradient'"):
        (matrix + matrix).eigenvalues()
