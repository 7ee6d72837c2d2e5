"""The linearised Laplace approximation against dense Gaussian algebra."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from natgrad import Categorical, Gaussian, Laplace, Poisson, fisher_matrix, ntk
from tests import dense
from tests.cases import CASES, normal

STRUCTURES = ["full", "block_diagonal", "kfac", "unit_wise", "diagonal"]


def regression(outputs: int = 2) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, outputs)).double()
    return model, normal(6, 3), normal(6, outputs, seed=1)


def posterior_covariance(model, x, y, likelihood, structure, delta) -> torch.Tensor:
    fisher = fisher_matrix(model, (x, y), likelihood, structure).to_dense()
    return torch.linalg.inv(len(x) * fisher + delta * torch.eye(len(fisher)).double())


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("likelihood", ["gaussian", "categorical"])
def test_covariance_of_the_outputs_is_the_dense_one(structure, likelihood):
    model, x, y = regression()
    if likelihood == "categorical":
        y = torch.tensor([0, 1, 1, 0, 1, 0])
    posterior = Laplace(model, (x, y), likelihood, structure, prior_precision=0.7)
    assert posterior.count == 6
    sigma = posterior_covariance(model, x, y, likelihood, structure, 0.7)
    new = normal(20, 3, seed=5)  # more than one chunk
    z, jac = dense.jacobian(model, new)
    expected = jac @ sigma @ jac.mT
    mean, covariance = posterior.functional_variance(new)
    dense.assert_same(mean, z)
    dense.assert_same(covariance, expected, 1e-8)


def test_full_posterior_is_gaussian_process_regression_with_the_tangent_kernel():
    model, x, y = regression(1)
    delta, noise = 0.5, 0.3
    posterior = Laplace(model, (x, y), Gaussian(noise), "full", prior_precision=delta)
    new = normal(4, 3, seed=5)
    k = ntk.empirical_kernel(model, x) / delta
    cross = ntk.empirical_kernel(model, new, x) / delta
    own = ntk.empirical_kernel(model, new) / delta
    reduced = torch.linalg.solve(k + noise * torch.eye(6).double(), cross.T)
    expected = (own - cross @ reduced).diagonal()
    mean, variance = posterior.predict(new)
    dense.assert_same(variance[:, 0], expected + noise, 1e-8)
    dense.assert_same(mean, model(new).detach())


@pytest.mark.parametrize("structure", STRUCTURES)
def test_evidence_is_the_dense_one_and_its_maximum_is_found(structure):
    model, x, y = regression()
    posterior = Laplace(model, (x, y), "gaussian", structure)
    fisher = fisher_matrix(model, (x, y), "gaussian", structure).to_dense()
    theta = nn.utils.parameters_to_vector(model.parameters()).detach()
    size = len(theta)

    def evidence(delta: float) -> float:
        fit = -0.5 * float((model(x) - y).square().sum())
        logdet = float(torch.logdet(6 * fisher + delta * torch.eye(size).double()))
        prior = size * math.log(delta) - delta * float(theta @ theta)
        return fit + 0.5 * (prior - logdet)

    for delta in (0.1, 1.0, 30.0):
        found = posterior.log_marginal_likelihood(delta)
        assert found == pytest.approx(evidence(delta), rel=1e-7)
    best = posterior.optimize_prior_precision()
    assert posterior.prior_precision == best
    assert all(evidence(best) >= evidence(best * factor) for factor in (0.9, 1.1))


def test_last_layer_alone():
    model, x, y = regression()
    posterior = Laplace(model, (x, y), "gaussian", "full", parameters="last_layer")
    assert posterior.matrix.parameter_names == ("2.weight", "2.bias")
    assert all(p.requires_grad for p in model.parameters())
    hidden = torch.tanh(model[0](x)).detach()
    features = torch.cat([hidden, torch.ones(6, 1).double()], 1)
    sigma = torch.linalg.inv(features.T @ features + torch.eye(6).double())
    new = normal(3, 3, seed=5)
    again = torch.cat([torch.tanh(model[0](new)).detach(), torch.ones(3, 1).double()], 1)
    variance = (again @ sigma @ again.T).diagonal()
    _, covariance = posterior.functional_variance(new)
    dense.assert_same(covariance, variance[:, None, None] * torch.eye(2).double(), 1e-8)


def test_batches_masks_and_other_layers():
    """A loader gives what one batch gives; ignored targets do not count."""
    model, x, _ = regression(3)
    y = torch.tensor([0, 1, -100, 2, 1, -100])
    whole = Laplace(model, (x, y), Categorical(), "kfac")
    parts = Laplace(model, [(x[:4], y[:4]), (x[4:], y[4:])], Categorical(), "kfac")
    assert whole.count == parts.count == 4
    assert parts.log_likelihood == pytest.approx(whole.log_likelihood)
    dense.assert_same(parts.predict(x), whole.predict(x), 1e-8)
    case = CASES["conv2d"]()
    target = case.target("categorical")
    posterior = Laplace(case.model, (case.x, target), "categorical", "kfac")
    probabilities = posterior.predict(case.x)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(len(case.x)).double())
    # Uncertainty draws probabilities together.
    plain = torch.softmax(case.model(case.x).detach(), 1)
    assert (probabilities.max(1).values <= plain.max(1).values + 1e-12).all()


def test_probit_of_a_bernoulli_output():
    model, x, _ = regression(1)
    y = torch.tensor([0.0, 1, 1, 0, 1, 0]).double().unsqueeze(1)
    posterior = Laplace(model, (x, y), "bernoulli", "full", prior_precision=2.0)
    mean, covariance = posterior.functional_variance(x)
    expected = torch.sigmoid(mean[:, 0] / (1 + math.pi / 8 * covariance[:, 0, 0]).sqrt())
    dense.assert_same(posterior.predict(x)[:, 0], expected)


def test_wrong_input():
    model, x, y = regression()
    with pytest.raises(ValueError, match="prior_precision"):
        Laplace(model, (x, y), "gaussian", prior_precision=0.0)
    with pytest.raises(ValueError, match="last_layer"):
        Laplace(model, (x, y), "gaussian", parameters="first")
    with pytest.raises(ValueError, match="re-iterable"):
        Laplace(model, iter([(x, y)]), "gaussian")
    with pytest.raises(ValueError, match="targets"):
        Laplace(model, [(x, None)], "gaussian")
    counts = torch.ones(6, 2).double()
    with pytest.raises(TypeError, match="functional_variance"):
        Laplace(model, (x, counts), Poisson(), "diagonal").predict(x)
