"""Data as users have them: empty batches, masked targets, samplers, and what is no pair."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import natgrad
from natgrad.tools import influence
from tests import dense
from tests.cases import normal

X, Y = normal(7, 4), torch.arange(7) % 3
DATA = TensorDataset(X, Y)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


class Bucketed(Sampler[int]):
    """An order of a user's own, anew every time."""

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(len(DATA)).tolist())

    def __len__(self) -> int:
        return len(DATA)


class Buckets(BatchSampler):
    """Batches in an order of a user's own."""

    def __iter__(self) -> Iterator[list[int]]:
        batches = list(super().__iter__())
        return iter([batches[i] for i in torch.randperm(len(batches)).tolist()])


SHUFFLED = {
    "shuffle": lambda: DataLoader(DATA, 3, shuffle=True),
    "subset": lambda: DataLoader(DATA, 3, sampler=SubsetRandomSampler(range(7))),
    "weighted": lambda: DataLoader(DATA, 3, sampler=WeightedRandomSampler([1.0] * 7, 7)),
    "batches": lambda: DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 3, False)),
    "own": lambda: DataLoader(DATA, 3, sampler=Bucketed()),
    "own batches": lambda: DataLoader(DATA, batch_sampler=Buckets(range(7), 1, False)),
}
FIXED = {
    "loader": lambda: DataLoader(DATA, 3),
    "subset": lambda: DataLoader(DATA, 3, sampler=range(7)),
    "batches": lambda: DataLoader(DATA, batch_sampler=[[0, 1, 2], [3, 4], [5, 6]]),
    "list": lambda: [(X[:3], Y[:3]), (X[3:], Y[3:])],
    "empty": lambda: [(X[:0], Y[:0]), (X[:3], Y[:3]), (X[:0], Y[:0]), (X[3:], Y[3:])],
}


@pytest.mark.parametrize("name", list(SHUFFLED))
def test_results_by_sample_refuse_data_in_random_order(name):
    model = network()
    with pytest.raises(ValueError, match="train is a data loader that shuffles"):
        influence(model, SHUFFLED[name](), (X, Y))
    with pytest.raises(ValueError, match="data is a data loader that shuffles"):
        natgrad.jacobian_matrix(model, SHUFFLED[name]())
    whole = natgrad.fisher_matrix(model, (X, Y), structure="full").to_dense()
    if name != "weighted":  # Which draws some of them twice.
        found = natgrad.fisher_matrix(model, SHUFFLED[name](), structure="full")
        dense.assert_same(found.to_dense(), whole)


@pytest.mark.parametrize("name", list(FIXED))
def test_everything_takes_data_in_a_fixed_order_and_empty_batches(name):
    model, data = network(), FIXED[name]()
    dense.assert_same(influence(model, data, (X, Y)), influence(model, (X, Y), (X, Y)), 1e-8)
    vector = normal(43, 1)[:, 0]
    for make in (natgrad.hessian_matrix, natgrad.gauss_newton_matrix, natgrad.jacobian_matrix):
        dense.assert_same(make(model, data) @ vector, make(model, (X, Y)) @ vector)
    for parameters in ("all", "last_layer"):
        one, other = (
            natgrad.Laplace(model, some, structure="full", parameters=parameters)
            for some in (data, (X, Y))
        )
        assert one.count == 7
        dense.assert_same(one.covariance.to_dense(), other.covariance.to_dense())
        assert one.log_likelihood == pytest.approx(other.log_likelihood, rel=1e-12)
        one, other = (
            natgrad.VariationalLaplace(model, some, inducing=X, parameters=parameters)
            for some in (data, (X, Y))
        )
        bound = other.log_marginal_likelihood()
        assert one.log_marginal_likelihood() == pytest.approx(bound, rel=1e-10)
    assert natgrad.VariationalLaplace(model, data, inducing=3).count == 7


@pytest.mark.parametrize("data", [(X, torch.full_like(Y, -100)), [(X[:0], Y[:0])]])
@pytest.mark.parametrize("structure", ["full", "kfac", "ekfac", "diagonal"])
def test_data_without_a_target_that_counts_are_refused(data, structure):
    model = network()
    with pytest.raises(ValueError, match="no target of the data counts"):
        natgrad.fisher_matrix(model, data, structure=structure)
    with pytest.raises(ValueError, match="no target of the data counts"):
        natgrad.Laplace(model, data, structure=structure)
    with pytest.raises(ValueError, match="no target of the data counts|no batches"):
        natgrad.VariationalLaplace(model, data, inducing=X)
    with pytest.raises(ValueError, match="no target of the data counts"):
        natgrad.hessian_matrix(model, data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DATA, "TensorDataset, which yields samples: pass torch.utils.data.DataLoader"),
        (torch.utils.data.Subset(DATA, range(4)), "Subset, which yields samples"),
        ((X, Y.tolist()), "got list: pass torch.as_tensor"),
        ((X, Y.numpy()), "got ndarray: pass torch.as_tensor"),
        (DataLoader(TensorDataset(X, Y, Y), 3), "of type list of 3: bring batches to pairs first"),
        ([{"x": X, "y": Y}], "of type dict: bring batches to pairs first"),
        (X, "of type Tensor: bring batches to pairs first"),
    ],
)
def test_what_is_no_pair_is_refused_with_what_to_do(data: Any, message: str):
    model = network()
    for use in (natgrad.fisher_matrix, natgrad.hessian_matrix, natgrad.Laplace):
        with pytest.raises(ValueError, match=message):
            use(model, data)


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "foof", "tkfac", "full"])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_weights_that_are_made_of_others_see_a_batch_of_one_among_others(structure, fisher):
    """Their rows have no place for samples, and those of one sample were taken for a sum."""
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 5))
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(5, 3)).double()
    expected = natgrad.fisher_matrix(model, (X, Y), structure=structure, fisher=fisher).to_dense()
    for cuts in ((0, 4, 5, 7), (0, 6, 7), (0, 1, 7), tuple(range(8))):
        batches = [(X[a:b], Y[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
        found = natgrad.fisher_matrix(model, batches, structure=structure, fisher=fisher)
        dense.assert_same(found.to_dense(), expected)
