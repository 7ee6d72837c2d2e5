"""Posteriors of some parameters alone, all others certain."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from natgrad import Laplace, fisher_matrix
from natgrad.curvature import STRUCTURES
from natgrad.laplace import largest_entries
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


def masked_covariance(posterior: Laplace, index: torch.Tensor, delta: torch.Tensor):
    """Return ``E (N F_SS/T + diag(δ_S))⁻¹ Eᵀ`` and the precision of the entries alone."""
    fisher = posterior.matrix.to_dense()
    scale = posterior.count / posterior.temperature
    precision = scale * fisher[index][:, index] + torch.diag(delta[index])
    covariance = torch.zeros_like(fisher)
    covariance[index.unsqueeze(1), index] = torch.linalg.inv(precision)
    return covariance, precision


@pytest.mark.parametrize(
    "structure, per_layer",
    [
        *((name, False) for name in sorted(set(STRUCTURES) - {"singd"})),
        *((name, True) for name in ("full", "block_tridiagonal", "kfac")),
    ],
)
def test_single_entries_alone_are_uncertain(structure, per_layer):
    model, (x, y), new = network(), data("gaussian"), normal(4, 3, seed=5)
    scores = {name: normal(*p.shape, seed=i) for i, (name, p) in enumerate(
        model.named_parameters()
    )}  # fmt: skip
    masks = largest_entries(scores, 11)
    assert sum(int(mask.sum()) for mask in masks.values()) == 11
    flat = torch.cat([scores[name].flatten() for name in masks])
    index = torch.cat([masks[name].flatten() for name in masks]).nonzero()[:, 0]
    assert flat[index].min() > torch.cat([flat, flat.new_tensor([-9.0])]).sort().values[-12]
    delta = {"0": 0.4, "2": 3.0} if per_layer else 0.7
    posterior = Laplace(model, (x, y), "gaussian", structure, parameters=masks, temperature=0.5)
    posterior.prior_precision = delta
    names = posterior.matrix.parameter_names
    assert set(names) == set(masks)
    parameters = dict(model.named_parameters())
    of = [delta[name[0]] if per_layer else delta for name in names]
    deltas = torch.cat([
        torch.full((parameters[name].numel(),), value, dtype=torch.float64)
        for name, value in zip(names, of, strict=True)
    ])  # fmt: skip
    sigma, precision = masked_covariance(posterior, index, deltas)
    dense.assert_same(posterior.covariance.to_dense(), sigma, 1e-8)
    _, rows = dense.jacobian(model, new)
    places = {name: place for name, place in zip(
        parameters, torch.arange(32).split([p.numel() for p in parameters.values()]), strict=True
    )}  # fmt: skip
    rows = rows[:, :, torch.cat([places[name] for name in names])]
    dense.assert_same(posterior.functional_variance(new)[1], rows @ sigma @ rows.mT, 1e-8)
    theta = torch.cat([parameters[name].detach().flatten() for name in names])
    fit = -0.5 * float((model(x) - y).square().sum().detach()) / 0.5
    prior = (deltas[index].log() - deltas[index] * theta[index].square()).sum()
    expected = fit + 0.5 * float(prior - torch.logdet(precision))
    assert posterior.log_marginal_likelihood() == pytest.approx(expected, rel=1e-9)
    samples = posterior.sample(3, torch.Generator().manual_seed(0))
    certain = torch.ones(len(theta), dtype=torch.bool)
    certain[index] = False
    assert torch.equal(samples[:, certain], theta[certain].expand(3, -1))
    noise = torch.randn(
        3, len(theta), generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    values, vectors = torch.linalg.eigh(torch.linalg.inv(precision))
    root = vectors @ torch.diag(values.sqrt()) @ vectors.T
    dense.assert_same(samples[:, index], theta[index] + noise[:, index] @ root, 1e-8)
    restored = Laplace(model, None, "gaussian", structure)
    restored.load_state_dict(posterior.state_dict())
    assert restored.log_marginal_likelihood() == posterior.log_marginal_likelihood()


def test_wrong_masks_are_refused():
    model, (x, y) = network(), data("gaussian")
    whole = torch.ones(5, 3, dtype=torch.bool)
    for masks, message in (
        ({"0.weight": whole[:2]}, r"shape \(2, 3\)"),
        ({"1.weight": whole}, "none"),
        ({"0.weight": whole.double()}, "type bool"),
        ({"0.weight": ~whole}, "true somewhere"),
        ({}, "at least one"),
    ):
        with pytest.raises(ValueError, match=message):
            Laplace(model, (x, y), "gaussian", parameters=masks)
    with pytest.raises(ValueError, match="at most"):
        largest_entries({"a": torch.ones(3)}, 4)


def test_scores_that_are_none_are_refused():
    with pytest.raises(ValueError, match="at most that of all entries, 0"):
        largest_entries({}, 1)
    with pytest.raises(ValueError, match="NaN"):
        largest_entries({"a": torch.tensor([1.0, float("nan")])}, 1)
