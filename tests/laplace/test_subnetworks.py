"""Posteriors of some parameters alone, all others certain."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from natgrad import Laplace, fisher_matrix
from tests import dense
from tests.cases import normal
from tests.laplace.gaussians import data, network

CHOICES = {
    "a module": (["2"], slice(20, 32)),
    "parameters": (["0.bias", "2.weight"], slice(15, 30)),
    "both": (["0.weight", "2"], None),
}


@pytest.mark.parametrize("structure", ["full", "block_diagonal", "kfac", "diagonal"])
@pytest.mark.parametrize("names, entries", CHOICES.values(), ids=CHOICES)
def test_named_parameters_alone_are_uncertain(structure, names, entries):
    model, (x, y), new = network(), data("gaussian"), normal(4, 3, seed=5)
    index = torch.arange(32)
    index = torch.cat([index[:15], index[20:]]) if entries is None else index[entries]
    posterior = Laplace(model, (x, y), "gaussian", structure, parameters=names, prior_precision=0.7)
    assert posterior.matrix.shape[0] == len(index)
    assert all(p.requires_grad for p in model.parameters())
    if structure == "kfac":  # Factors of a part of a layer are its own.
        fisher = posterior.matrix.to_dense()
    else:
        fisher = fisher_matrix(model, (x, y), "gaussian", structure).to_dense()[index][:, index]
    dense.assert_same(posterior.matrix.to_dense(), fisher)
    precision = 6 * fisher + 0.7 * torch.eye(len(index)).double()
    _, jacobian = dense.jacobian(model, new)
    rows = jacobian[:, :, index]
    _, covariance = posterior.functional_variance(new)
    dense.assert_same(covariance, rows @ torch.linalg.inv(precision) @ rows.mT, 1e-8)
    theta = nn.utils.parameters_to_vector(model.parameters()).detach()[index]
    fit = -0.5 * (model(x) - y).square().sum().detach()
    prior = len(index) * math.log(0.7) - 0.7 * theta.square().sum()
    expected = fit + 0.5 * (prior - torch.logdet(precision))
    assert posterior.log_marginal_likelihood() == pytest.approx(float(expected), rel=1e-9)


def test_unknown_names_are_refused():
    model, (x, y) = network(), data("gaussian")
    for names, message in ((["3"], "'3'"), ([], "at least one"), ("first", "last_layer")):
        with pytest.raises(ValueError, match=message):
            Laplace(model, (x, y), "gaussian", parameters=names)
