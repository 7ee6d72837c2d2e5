"""The linearised Laplace approximation against dense Gaussian algebra."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import natgrad
from natgrad import Capture, Categorical, Gaussian, Laplace, Poisson, fisher_matrix, ntk
from natgrad.operators import DenseOperator
from tests import dense
from tests.cases import CASES, normal
from tests.methods import curvature_of

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


def symmetric_root(matrix: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.sqrt()) @ vectors.T


ROOTS = ["full", "block_diagonal", "unit_wise", "kfac", "ekfac", "tkfac", "tekfac", "diagonal"]


@pytest.mark.parametrize("structure", ROOTS)
@pytest.mark.parametrize("name", ["mlp", "conv1d", "transposed_convolution", "language_model"])
def test_root_of_the_inverse_is_the_symmetric_one(structure, name):
    """Applied to the identity, for grouped, transposed and one-hot layers."""
    case = CASES[name]()
    y = case.target("categorical")
    matrix = fisher_matrix(case.model, (case.x, y), "categorical", structure)
    identity = torch.eye(matrix.shape[0]).double()
    for damping in (1e-4, 0.5):
        inverse = torch.linalg.inv(matrix.to_dense() + damping * identity)
        root = matrix.inverse_root(damping).to_dense()
        dense.assert_same(root, symmetric_root(inverse), 1e-8)
        dense.assert_same(root @ root, inverse, 1e-8)


@pytest.mark.parametrize("structure", ["full", "block_diagonal"])
@pytest.mark.parametrize("samples", [3, 40])
def test_root_in_sample_and_in_parameter_space(structure, samples):
    """More parameters than rows, and the other way round; eigenvalues zero in both."""
    model, _, _ = regression()
    x = normal(samples, 3)
    x[1] = x[0]
    matrix = fisher_matrix(model, (x, None), "gaussian", structure)
    moments = [isinstance(part, DenseOperator) for part in matrix.parts.values()]
    assert all(moments) if samples == 40 else not any(moments)
    identity = torch.eye(matrix.shape[0]).double()
    inverse = torch.linalg.inv(matrix.to_dense() + 1e-3 * identity)
    root = matrix.inverse_root(1e-3).to_dense()
    dense.assert_same(root, root.T)
    dense.assert_same(root @ root, inverse, 1e-8)


def test_root_by_the_other_damping_rule_and_before_any_data():
    model, x, y = regression()
    matrix = fisher_matrix(model, (x, y), "gaussian", "kfac", factored_damping=True)
    identity = torch.eye(matrix.shape[0]).double()
    root = matrix.inverse_root(0.1).to_dense()
    dense.assert_same(root @ root, matrix.solve(identity, 0.1))
    dense.assert_same(root, root.T)
    column = normal(matrix.shape[0])
    dense.assert_same(matrix.inverse_root(0.1) @ column, root @ column)
    named = matrix.inverse_root(0.1) @ matrix.layout.to_dict(column)
    dense.assert_same(matrix.layout.to_flat(named), root @ column)
    for structure in ("full", "diagonal"):
        with Capture(model) as capture:
            empty = curvature_of(structure, capture).matrix()
        dense.assert_same(empty.inverse_root(4.0) @ column, column / 2)


@pytest.mark.parametrize(
    "structure", ["full", "block_diagonal", "unit_wise", "kfac", "ekfac", "kpsvd", "diagonal"]
)
@pytest.mark.parametrize("parameters", ["all", "last_layer"])
def test_samples_of_the_parameters(structure, parameters):
    """The symmetric root on the same normal vectors; their covariance within five errors."""
    model, x, y = regression()
    posterior = Laplace(
        model, (x, y), "gaussian", structure, prior_precision=0.7, parameters=parameters
    )
    fisher = posterior.matrix.to_dense()
    size, draws = len(fisher), 4000
    sigma = torch.linalg.inv(6 * fisher + 0.7 * torch.eye(size).double())
    trained = model if parameters == "all" else model[2]
    center = nn.utils.parameters_to_vector(trained.parameters()).detach()
    found = posterior.sample(draws, torch.Generator().manual_seed(3))
    noise = torch.randn(
        draws, size, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )
    dense.assert_same(found, center + noise @ symmetric_root(sigma), 1e-8)
    white = torch.linalg.solve_triangular(
        torch.linalg.cholesky(sigma), (found - center).T, upper=False
    )
    identity = torch.eye(size).double()
    assert (white.mean(1).abs() < 5 / draws**0.5).all()
    assert ((white @ white.T / draws - identity).abs() < 5 * ((1 + identity) / draws).sqrt()).all()
    torch.manual_seed(1)
    first = posterior.sample(2)
    torch.manual_seed(1)
    assert torch.equal(posterior.sample(2), first)


def quadrature(function, mean: float, variance: float) -> tuple[float, float]:
    """Return mean and variance of a function of a normal variable."""
    grid = torch.linspace(-12, 12, 20001).double()
    weights = torch.exp(-grid.square() / 2)
    weights = weights / weights.sum()
    values = function(mean + variance**0.5 * grid)
    first = float(weights @ values)
    return first, float(weights @ values.square()) - first**2


@pytest.mark.parametrize("structure", ["full", "kfac"])
@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli"])
def test_mean_over_draws_of_the_outputs(structure, likelihood):
    """Two classes depend on the difference of their logits alone, a single normal variable."""
    model, x, _ = regression(2)
    y = torch.tensor([0, 1, 1, 0, 1, 0])
    target = y if likelihood == "categorical" else torch.stack([y, 1 - y], 1).double()
    posterior = Laplace(model, (x, target), likelihood, structure, prior_precision=0.3)
    mean, covariance = posterior.functional_variance(x)
    draws = 4000
    found = posterior.predict(x, samples=draws, generator=torch.Generator().manual_seed(0))
    assert found.shape == mean.shape
    for index in range(len(x)):
        if likelihood == "categorical":
            dense.assert_same(found[index].sum(), torch.ones(()).double())
            weights = torch.tensor([1.0, -1.0]).double()
            cases = [(0, weights @ mean[index], weights @ covariance[index] @ weights)]
        else:
            cases = [(c, mean[index, c], covariance[index, c, c]) for c in range(2)]
        for c, m, v in cases:
            expected, spread = quadrature(torch.sigmoid, float(m), float(v))
            assert abs(float(found[index, c]) - expected) < 5 * (spread / draws) ** 0.5


def test_draws_where_outputs_are_tokens_or_gaussian():
    case = CASES["tokens"]()
    likelihood = Categorical(class_dim=-1)
    posterior = Laplace(case.model, (case.x, case.target("categorical")), likelihood, "kfac")
    with pytest.raises(TypeError, match="samples"):
        posterior.predict(case.x)
    found = posterior.predict(case.x, samples=20)
    assert found.shape == case.z.shape
    dense.assert_same(found.sum(-1), torch.ones(case.z.shape[:-1]).double())
    # A prior that leaves no doubt: the plain probabilities.
    posterior.prior_precision = 1e14
    plain = torch.softmax(case.z.detach(), -1)
    dense.assert_same(posterior.predict(case.x, samples=2), plain, 1e-6)
    model, x, y = regression()
    posterior = Laplace(model, (x, y), "gaussian", "full")
    for exact, drawn in zip(posterior.predict(x), posterior.predict(x, samples=3), strict=True):
        assert torch.equal(exact, drawn)


def test_structures_without_a_root_say_so():
    model, x, y = regression()
    with pytest.raises(NotImplementedError, match="no square root"):
        Laplace(model, (x, y), "gaussian", "two_level").sample(3)


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
    posterior = Laplace(model, (x, y), "gaussian", "diagonal")
    for call in (lambda: posterior.sample(0), lambda: posterior.predict(x, samples=0)):
        with pytest.raises(ValueError, match="at least 1"):
            call()
    with pytest.raises(ValueError, match="positive damping"):
        posterior.matrix.inverse_root(0.0)
    counts = torch.ones(6, 2).double()
    with pytest.raises(TypeError, match="functional_variance"):
        Laplace(model, (x, counts), Poisson(), "diagonal").predict(x)


def ridge(variance: float, delta: float) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Return a linear model at the maximum of its posterior, and its data."""
    x = normal(8, 3)
    y = x @ normal(3, 1, seed=2) + 0.5 * normal(8, 1, seed=3)
    model = nn.Linear(3, 1, bias=False).double()
    precision = x.T @ x / variance + delta * torch.eye(3).double()
    model.weight.data = torch.linalg.solve(precision, x.T @ y / variance).T
    return model, x, y


def marginal(x: torch.Tensor, y: torch.Tensor, variance: float, delta: float) -> float:
    """Return ``log N(y; 0, XXᵀ/δ + σ²I)`` without its constant."""
    covariance = x @ x.T / delta + variance * torch.eye(len(x)).double()
    fit = y.T @ torch.linalg.solve(covariance, y)
    return -0.5 * float(fit + torch.logdet(covariance))


@pytest.mark.parametrize("variance", [0.05, 0.3, 2.0])
@pytest.mark.parametrize("delta", [0.2, 3.0])
def test_evidence_of_a_linear_model_is_exact_in_noise_and_prior(variance, delta):
    model, x, y = ridge(variance, delta)
    posterior = Laplace(model, (x, y), Gaussian(variance), "full", prior_precision=delta)
    expected = marginal(x, y, variance, delta)
    assert posterior.log_marginal_likelihood() == pytest.approx(expected, rel=1e-10)
    # Averaging over outputs is a variance that is larger by their number, here 1.
    posterior = Laplace(model, (x, y), Gaussian(variance, "mean"), "full", prior_precision=delta)
    assert posterior.log_marginal_likelihood() == pytest.approx(expected, rel=1e-10)


def test_missing_targets_leave_the_evidence_and_the_count():
    model, x, y = ridge(0.3, 1.0)
    masked = y.clone()
    masked[[2, 5]] = torch.nan
    kept = [0, 1, 3, 4, 6, 7]
    found = Laplace(model, (x, masked), Gaussian(0.3), "full")
    expected = Laplace(model, (x[kept], y[kept]), Gaussian(0.3), "full")
    assert found.count == 6
    assert found.log_marginal_likelihood() == pytest.approx(expected.log_marginal_likelihood())
    for one, other in zip(found.predict(x), expected.predict(x), strict=True):
        dense.assert_same(one, other)


# -- types -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli"])
def test_half_precision_predictions_are_means_in_full_precision(dtype, likelihood):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    x = torch.randn(6, 4).to(dtype)
    y = torch.arange(6) % 3 if likelihood == "categorical" else torch.ones(6, 3, dtype=dtype)
    found = {}
    for kind in (dtype, torch.float32):
        given = (x.to(kind), y.to(kind) if y.is_floating_point() else y)
        for posterior in (
            Laplace(model.to(kind), given, likelihood),
            natgrad.VariationalLaplace(model, given, likelihood, inducing=4),
        ):
            drawn = torch.Generator().manual_seed(0)
            averages = posterior.predict(given[0], samples=200, generator=drawn)
            found.setdefault(kind, []).extend([posterior.predict(given[0]), averages])
    for half, full in zip(found[dtype], found[torch.float32], strict=True):
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, full, atol=0.02, rtol=0)


def test_layers_of_several_types_have_joint_predictions():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3).double()

        def forward(self, x):
            return self.head(torch.tanh(self.body(x.to(self.body.weight.dtype))).double())

    torch.manual_seed(0)
    model, x, y = Mixed(), torch.randn(6, 4).double(), torch.arange(6) % 3
    _, joint = Laplace(model, (x, y), "categorical", "full").functional_variance(x, joint=True)
    scores = natgrad.tools.influence(
        model, (x, y), (x, y), structure="full", damping=0.1, leave_one_out=True
    )
    model.double()
    _, whole = Laplace(model, (x, y), "categorical", "full").functional_variance(x, joint=True)
    torch.testing.assert_close(joint.double(), whole, rtol=1e-4, atol=1e-5)
    expected = natgrad.tools.influence(
        model, (x, y), (x, y), structure="full", damping=0.1, leave_one_out=True
    )
    torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=1e-5)
