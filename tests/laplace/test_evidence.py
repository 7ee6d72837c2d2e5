"""The evidence with a temperature, a prior of its own mean and noise, against dense algebra."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from natgrad import Gaussian, Laplace, VariationalLaplace
from tests import dense
from tests.cases import normal
from tests.laplace.gaussians import LAYERS, Dense, data, network

STRUCTURES = ["full", "block_diagonal", "unit_wise", "kfac", "ekfac", "diagonal"]
DELTAS = (0.7, {"0": 0.2, "2": 3.0})


def named(flat: Tensor, model: torch.nn.Module) -> dict[str, Tensor]:
    """Return a flat vector as tensors by parameter name."""
    parameters = dict(model.named_parameters())
    pieces = flat.split([p.numel() for p in parameters.values()])
    return {n: v.view_as(p) for (n, p), v in zip(parameters.items(), pieces, strict=True)}


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kind", ["gaussian", "categorical"])
@pytest.mark.parametrize("delta", DELTAS, ids=["one", "layers"])
def test_evidence_and_predictions_are_the_dense_ones(structure, kind, delta):
    """Of both kinds of prior precision at once, and once more with other values."""
    model, (x, y), mean = network(), data(kind), 0.3 * normal(32, seed=4)
    reference = Dense(model, x, y, kind, structure, temperature=0.4, mean=mean)
    posterior = Laplace(
        model, (x, y), kind, structure, prior_precision=1.0, temperature=0.4,
        prior_mean=named(mean, model),
    )  # fmt: skip
    new = normal(20, 3, seed=5)
    z, jacobian = dense.jacobian(model, new)
    posterior.prior_precision = delta
    assert posterior.prior_precision == delta
    expected = float(reference.evidence(delta))
    assert posterior.log_marginal_likelihood() == pytest.approx(expected, rel=1e-9)
    sigma = torch.linalg.inv(reference.precision(delta))
    found, covariance = posterior.functional_variance(new)
    dense.assert_same(found, z)
    dense.assert_same(covariance, jacobian @ sigma @ jacobian.mT, 1e-8)
    dense.assert_same(posterior.covariance.diagonal(), sigma.diagonal(), 1e-8)
    rows = jacobian.flatten(0, 1)
    _, together = posterior.functional_variance(new, joint=True)
    dense.assert_same(together, rows @ sigma @ rows.T, 1e-8)
    # Set later it is the same.
    later = Laplace(model, (x, y), kind, structure, prior_precision=delta)
    later.log_marginal_likelihood()
    later.temperature, later.prior_mean = 0.4, named(mean, model)
    assert later.log_marginal_likelihood() == posterior.log_marginal_likelihood()
    dense.assert_same(later.functional_variance(new)[1], covariance, 1e-12)
    if structure != "unit_wise":
        noise = torch.randn(50, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        values, vectors = torch.linalg.eigh(sigma)
        root = vectors @ torch.diag(values.sqrt()) @ vectors.T
        samples = posterior.sample(50, torch.Generator().manual_seed(2))
        dense.assert_same(samples, reference.theta + noise @ root, 1e-8)


@pytest.mark.parametrize("structure", ["full", "unit_wise", "kfac"])
@pytest.mark.parametrize("per_layer", [False, True])
def test_evidence_is_differentiable_in_prior_and_noise(structure, per_layer):
    model, (x, y) = network(), data("gaussian")
    reference = Dense(model, x, y, "gaussian", structure, temperature=2.0)
    posterior = Laplace(model, (x, y), Gaussian(0.5), structure, temperature=2.0)

    def variables() -> tuple[dict[str, Tensor] | Tensor, list[Tensor]]:
        noise = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        leaves = [torch.tensor(v).double().requires_grad_() for v in (0.4, 2.0)]
        delta = dict(zip(LAYERS, leaves, strict=True)) if per_layer else leaves[0]
        return delta, [*(leaves if per_layer else leaves[:1]), noise]

    (delta, leaves), (same, others) = variables(), variables()
    expected, found = (
        reference.evidence(delta, leaves[-1]), posterior.log_marginal_likelihood(same, others[-1])
    )  # fmt: skip
    dense.assert_same(found.detach(), expected.detach(), 1e-9)
    wanted = torch.autograd.grad(expected, leaves)
    for one, other in zip(torch.autograd.grad(found, others), wanted, strict=True):
        dense.assert_same(one, other, 1e-8)
    assert isinstance(posterior.log_marginal_likelihood(0.4, 0.3), float)


@pytest.mark.parametrize("structure", ["full", "kfac", "diagonal"])
@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("per_layer", [False, True])
def test_the_best_prior_and_noise_are_stationary_points_of_the_dense_evidence(
    structure, noise, per_layer
):
    model, (x, y) = network(), data("gaussian", 40)
    reference = Dense(model, x, y, "gaussian", structure)
    posterior = Laplace(model, (x, y), Gaussian(0.5), structure)
    first = Laplace(model, (x, y), Gaussian(0.5), structure).optimize_prior_precision()
    best = posterior.optimize_prior_precision(per_layer=per_layer, noise=noise)
    assert posterior.prior_precision == best
    variance = posterior.likelihood.variance
    assert (variance == 0.5) is (not noise)
    evidence = posterior.log_marginal_likelihood()
    assert evidence == pytest.approx(float(reference.evidence(best, variance)), rel=1e-8)
    # No worse than one precision for all at the given noise.
    assert evidence >= float(reference.evidence(first, 0.5)) - 1e-9
    logarithms = torch.tensor(
        [*(best.values() if per_layer else [best]), variance], dtype=torch.float64
    ).log()
    logarithms.requires_grad_()
    values = logarithms.exp()
    delta = dict(zip(LAYERS, values, strict=False)) if per_layer else values[0]
    value = reference.evidence(delta, values[-1] if noise else 0.5)
    (slope,) = torch.autograd.grad(value, logarithms)
    limit = 1e-4 if per_layer or noise else 2e-2  # One precision alone is searched by thirds.
    interior = [1e-3 < float(v.detach()) < 1e5 for v in values]
    assert any(interior)
    for inside, one in zip(interior, slope, strict=True):
        assert not inside or abs(float(one)) < limit
    # Predictions and further data are about the noise that was found.
    _, variances = posterior.predict(x)
    _, functional = posterior.functional_variance(x)
    dense.assert_same(variances, functional.diagonal(dim1=1, dim2=2) + variance)
    sigma = torch.linalg.inv(reference.precision(best, variance))
    _, jacobian = dense.jacobian(model, x)
    dense.assert_same(functional, jacobian @ sigma @ jacobian.mT, 1e-7)


def test_an_indefinite_precision_is_refused():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 4), torch.nn.Tanh(),
        torch.nn.Linear(4, 2),
    ).double()  # fmt: skip
    x, y = data("gaussian", 30)
    posterior = Laplace(model, (x, y), "gaussian", "block_tridiagonal")
    with pytest.raises(ValueError, match="not positive definite"):
        posterior.log_marginal_likelihood(1e-3)


def test_wrong_priors_and_noise_are_named():
    model, (x, y) = network(), data("categorical")
    with pytest.raises(ValueError, match="temperature"):
        Laplace(model, (x, y), temperature=0.0)
    with pytest.raises(ValueError, match="one for each layer"):
        Laplace(model, (x, y), prior_precision={"0": 1.0})
    with pytest.raises(ValueError, match="positive and finite"):
        Laplace(model, (x, y), prior_precision={"0": 1.0, "2": -1.0})
    with pytest.raises(ValueError, match=r"prior_mean .* 'none'|parameter '0.weight', got none"):
        Laplace(model, (x, y), prior_mean={})
    posterior = Laplace(model, (x, y))
    for wrong in (0.0, {"0": 1.0, "2": float("inf")}, torch.tensor(-1.0)):
        with pytest.raises(ValueError, match="positive and finite"):
            posterior.log_marginal_likelihood(wrong)
    with pytest.raises(ValueError, match="one for each layer"):
        posterior.log_marginal_likelihood({"0": 1.0})
    with pytest.raises(TypeError, match="gaussian likelihood"):
        posterior.log_marginal_likelihood(noise_variance=0.1)
    with pytest.raises(TypeError, match="gaussian likelihood"):
        posterior.optimize_prior_precision(noise=True)


def test_everything_is_had_without_gradients_too():
    """As in an evaluation loop, under ``torch.no_grad()``."""
    found = []
    for mode in (torch.enable_grad, torch.no_grad):
        model, (x, y) = network(), data("gaussian")
        with mode():
            posterior = Laplace(model, (x, y), "gaussian", "kfac")
            deltas = posterior.optimize_prior_precision(per_layer=True, noise=True)
            sparse = VariationalLaplace(model, (x, y), "gaussian", 4)
            noise = sparse.optimize_noise()
            history = sparse.fit_predictive((x, y), 3)
            found.append([*deltas.values(), *noise, *history, float(posterior.predict(x)[1].sum())])
    assert found[0] == found[1]
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        posterior.optimize_prior_precision(per_layer=True)
