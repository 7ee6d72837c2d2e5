"""The variational linearised Laplace approximation against dense Gaussian algebra."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from natgrad import (
    Bernoulli,
    Categorical,
    Gaussian,
    Laplace,
    Poisson,
    VariationalLaplace,
    fisher_matrix,
)
from natgrad.variational_laplace.inducing_points import choose_inducing_points
from tests import dense
from tests.cases import CASES, normal
from tests.test_laplace import ridge


def regression(outputs: int = 2, samples: int = 8) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, outputs)).double()
    return model, normal(samples, 3), normal(samples, outputs, seed=1)


def problem(kind: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor, object]:
    """Return a model, data and a likelihood with a curvature that is not constant."""
    if kind == "gaussian":
        return *regression(), Gaussian(0.3)
    model, x, _ = regression(3)
    if kind == "categorical":
        return model, x, torch.tensor([0, 1, 2, 0, 1, 0, 2, 2]), Categorical()
    return model, x, (normal(8, 3, seed=4) > 0).double(), Bernoulli()


KINDS = ["gaussian", "categorical", "bernoulli"]


def dense_parts(model, x, y, likelihood, z, outputs="all"):
    """Return ``H = Σ Jᵀ Λ J``, the rows of z, and an orthonormal basis of their span ``(P, r)``."""
    fisher = fisher_matrix(model, (x, y), likelihood, "full").to_dense()
    rows = dense.jacobian(model, z)[1]
    if outputs == "one":
        rows = torch.stack([row[m % rows.shape[1]] for m, row in enumerate(rows)])
    else:
        rows = rows.flatten(0, 1)
    basis, values, _ = torch.linalg.svd(rows.T, full_matrices=False)
    return len(x) * fisher, rows, basis[:, values > 1e-10 * values[0]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("delta", [0.02, 0.7])
def test_with_all_points_inducing_it_is_the_full_laplace(kind, delta):
    model, x, y, likelihood = problem(kind)
    full = Laplace(model, (x, y), likelihood, "full", prior_precision=delta)
    sparse = VariationalLaplace(model, (x, y), likelihood, x, prior_precision=delta)
    new = normal(20, 3, seed=5)  # More than one chunk.
    for one, other in zip(
        sparse.functional_variance(new), full.functional_variance(new), strict=True
    ):
        dense.assert_same(one, other, 1e-8)
    expected, found = full.predict(new), sparse.predict(new)
    pairs = zip(found, expected, strict=True) if kind == "gaussian" else [(found, expected)]
    for one, other in pairs:
        dense.assert_same(one, other, 1e-8)
    assert sparse.count == full.count
    assert sparse.log_likelihood == pytest.approx(full.log_likelihood, rel=1e-12)
    evidence = full.log_marginal_likelihood()
    assert sparse.log_marginal_likelihood() == pytest.approx(evidence, rel=1e-8)
    assert sparse.elbo(x, y) == pytest.approx(evidence, rel=1e-8)
    assert sparse.optimize_prior_precision() == pytest.approx(full.optimize_prior_precision())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outputs", ["all", "one"])
def test_covariance_is_that_of_the_dual_form_at_its_optimum(kind, outputs):
    r"""``J[I − J_Zᵀ(δA⁻¹ + K)⁻¹J_Z]Jᵀ/δ``, and the best A for the bound, both dense."""
    model, x, y, likelihood = problem(kind)
    z, new, delta = normal(3, 3, seed=7), normal(5, 3, seed=5), 0.4
    h, rows, basis = dense_parts(model, x, y, likelihood, z, outputs)
    sparse = VariationalLaplace(
        model, (x, y), likelihood, z, outputs=outputs, prior_precision=delta
    )
    # J_Zᵀ A J_Z = U B Uᵀ with B = UᵀHU.
    whiten = torch.linalg.pinv(rows.T)  # (R, P)
    projected = basis @ basis.T @ h @ basis @ basis.T
    a = whiten @ projected @ whiten.T
    identity = torch.eye(len(rows)).double()
    inner = torch.linalg.solve(delta * identity + a @ (rows @ rows.T), a)  # (δA⁻¹ + K)⁻¹
    z_new, jac = dense.jacobian(model, new)
    cross = jac @ rows.T
    expected = (jac @ jac.mT - cross @ inner @ cross.mT) / delta
    mean, covariance = sparse.functional_variance(new)
    dense.assert_same(covariance, expected, 1e-8)
    dense.assert_same(mean, z_new)
    assert torch.equal(mean, model(new).detach())
    dense.assert_same(sparse.matrix.to_dense(), projected / len(x), 1e-8)


def dense_bound(model, x, y, likelihood, delta, posterior) -> float:
    """Return the bound at any posterior covariance, term by term."""
    h = len(x) * fisher_matrix(model, (x, y), likelihood, "full").to_dense()
    theta = nn.utils.parameters_to_vector(model.parameters()).detach()
    prior = torch.distributions.MultivariateNormal(
        torch.zeros_like(theta), torch.eye(len(theta)).double() / delta
    )
    q = torch.distributions.MultivariateNormal(theta, posterior)
    fit = -float(likelihood.nll(model(x).detach(), y).sum())
    if isinstance(likelihood, Gaussian):
        fit -= y.numel() / 2 * math.log(likelihood.variance)
    divergence = torch.distributions.kl_divergence(q, prior)
    return fit - 0.5 * float((h * posterior).sum()) - float(divergence)


def dense_posterior(sparse: VariationalLaplace) -> torch.Tensor:
    fisher = sparse.matrix.to_dense()
    identity = torch.eye(len(fisher)).double()
    return torch.linalg.inv(sparse.count * fisher + sparse.prior_precision * identity)


@pytest.mark.parametrize("kind", KINDS)
def test_bound_is_below_the_evidence_and_the_closed_form_is_its_maximum(kind):
    model, x, y, likelihood = problem(kind)
    delta, z = 0.4, normal(2, 3, seed=7)
    sparse = VariationalLaplace(model, (x, y), likelihood, z, prior_precision=delta)
    bound = sparse.log_marginal_likelihood()
    full = Laplace(model, (x, y), likelihood, "full", prior_precision=delta)
    assert bound < full.log_marginal_likelihood() - 0.1
    posterior = dense_posterior(sparse)
    expected = dense_bound(model, x, y, likelihood, delta, posterior)
    assert bound == pytest.approx(expected, rel=1e-9)
    assert sparse.elbo(x, y) == pytest.approx(expected, rel=1e-9)
    _, _, basis = dense_parts(model, x, y, likelihood, z)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):  # Any other covariance of the family has a smaller bound.
        root = torch.randn(basis.shape[1], basis.shape[1], generator=generator).double()
        precision = torch.linalg.inv(posterior) + 0.1 * basis @ root @ root.T @ basis.T
        other = dense_bound(model, x, y, likelihood, delta, torch.linalg.inv(precision))
        assert other < bound - 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_bounds_of_mini_batches_are_unbiased(kind):
    model, x, y, likelihood = problem(kind)
    for steps in (None, 1):
        sparse = VariationalLaplace(
            model, [(x[:4], y[:4]), (x[4:], y[4:])], likelihood, x[:2], steps=steps,
            count=8, prior_precision=0.4,
        )  # fmt: skip
        batches = [sparse.elbo(x[i : i + 2], y[i : i + 2]) for i in range(0, 8, 2)]
        exact = dense_bound(model, x, y, likelihood, 0.4, dense_posterior(sparse))
        assert sum(batches) / 4 == pytest.approx(exact, rel=1e-9)
        assert max(batches) > exact + 1e-3


def test_mini_batches_are_a_running_mean_that_ends_at_the_optimum():
    model, x, y = regression()
    batches = [(x[i : i + 2], y[i : i + 2]) for i in range(0, 8, 2)]
    whole = VariationalLaplace(model, (x, y), "gaussian", x[:3])
    every = VariationalLaplace(model, batches, "gaussian", x[:3], steps=9, count=8)
    dense.assert_same(every.matrix.to_dense(), whole.matrix.to_dense(), 1e-9)
    parts = [VariationalLaplace(model, [one], "gaussian", x[:3], steps=1, count=8)
             for one in batches]  # fmt: skip
    mean = torch.stack([part.matrix.to_dense() for part in parts]).mean(0)
    dense.assert_same(mean, whole.matrix.to_dense(), 1e-9)
    assert all(part.count == 8 for part in parts)
    likelihoods = [part.log_likelihood for part in parts]
    assert sum(likelihoods) / 4 == pytest.approx(whole.log_likelihood)
    half = VariationalLaplace(model, batches, "gaussian", x[:3], steps=2, count=8)
    pair = torch.stack([part.matrix.to_dense() for part in parts[:2]]).mean(0)
    dense.assert_same(half.matrix.to_dense(), pair, 1e-9)
    dataset = torch.utils.data.TensorDataset(x, y)
    loader = torch.utils.data.DataLoader(dataset, batch_size=4)
    assert VariationalLaplace(model, loader, "gaussian", x[:3], steps=1).count == 8


@pytest.mark.parametrize("kind", KINDS)
def test_nested_inducing_points_bring_it_to_the_full_posterior(kind):
    """The bound rises, the divergence from the full posterior and the left-over variance fall.

    The variance itself need not: at an inducing point it is below that of the full posterior, which
    knows less of a direction whose neighbours are uncertain, too.
    """
    model, x, y, likelihood = problem(kind)
    delta, new = 0.4, normal(6, 3, seed=5)
    full = Laplace(model, (x, y), likelihood, "full", prior_precision=delta)
    exact = torch.distributions.MultivariateNormal(
        torch.zeros(full.matrix.shape[0]).double(),
        torch.linalg.inv(
            8 * full.matrix.to_dense() + delta * torch.eye(full.matrix.shape[0]).double()
        ),
    )
    bounds, divergences, left_over = [], [], []
    for number in (1, 2, 4, 8):
        sparse = VariationalLaplace(model, (x, y), likelihood, x[:number], prior_precision=delta)
        q = torch.distributions.MultivariateNormal(exact.mean, dense_posterior(sparse))
        divergences.append(float(torch.distributions.kl_divergence(q, exact)))
        bounds.append(sparse.log_marginal_likelihood())
        _, rows, basis = dense_parts(model, x, y, likelihood, x[:number])
        jac = dense.jacobian(model, new)[1]
        rest = jac - jac @ basis @ basis.T
        left_over.append((rest @ rest.mT).diagonal(dim1=1, dim2=2))
        at_points = sparse.functional_variance(x[:number])[1].diagonal(dim1=1, dim2=2)
        truth = full.functional_variance(x[:number])[1].diagonal(dim1=1, dim2=2)
        assert (at_points <= truth + 1e-9).all()
    evidence = full.log_marginal_likelihood()
    for before, after in zip(bounds, bounds[1:], strict=False):
        assert before < after + 1e-9
    for bound, divergence in zip(bounds, divergences, strict=True):
        # Evidence, bound and divergence are the two sides of one equation.
        assert evidence - bound == pytest.approx(divergence, abs=1e-7)
    assert divergences[0] > 0.1
    assert abs(divergences[-1]) < 1e-7
    for before, after in zip(left_over, left_over[1:], strict=False):
        assert (after <= before + 1e-9).all()


def test_points_twice_and_outputs_that_move_together():
    model, x, y = regression(2)
    with torch.no_grad():  # Two outputs are one.
        model[2].weight[1] = model[2].weight[0]
        model[2].bias[1] = model[2].bias[0]
    once = VariationalLaplace(model, (x, y), "gaussian", x[:3])
    twice = VariationalLaplace(model, (x, y), "gaussian", torch.cat([x[:3], x[:3], x[:1]]))
    new = normal(4, 3, seed=5)
    dense.assert_same(twice.functional_variance(new)[1], once.functional_variance(new)[1], 1e-8)
    assert twice.log_marginal_likelihood() == pytest.approx(once.log_marginal_likelihood())
    assert len(twice.matrix.eigenvalues()) == twice.matrix.shape[0]
    # More inducing rows than parameters: the span is everything.
    many = VariationalLaplace(model, (x, y), "gaussian", normal(60, 3, seed=9))
    full = Laplace(model, (x, y), "gaussian", "full")
    dense.assert_same(many.functional_variance(new)[1], full.functional_variance(new)[1], 1e-7)


def test_float32():
    model, x, y = regression()
    exact = VariationalLaplace(model, (x, y), "gaussian", x[:4]).functional_variance(x)[1]
    model.float()
    sparse = VariationalLaplace(model, (x.float(), y.float()), "gaussian", x[:4].float())
    found = sparse.functional_variance(x.float())[1]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-4)
    assert (found.diagonal(dim1=1, dim2=2) > 0).all()


@pytest.mark.parametrize("variance", [0.05, 2.0])
@pytest.mark.parametrize("delta", [0.2, 3.0])
def test_bound_of_a_linear_model_against_its_marginal_likelihood(variance, delta):
    """``log N(y; 0, XXᵀ/δ + σ²I)``; with fewer points than dimensions the bound is below."""
    model, x, y = ridge(variance, delta)
    covariance = x @ x.T / delta + variance * torch.eye(8).double()
    exact = -0.5 * float(y.T @ torch.linalg.solve(covariance, y) + torch.logdet(covariance))
    for number, equal in ((1, False), (2, False), (3, True), (8, True)):
        sparse = VariationalLaplace(
            model, (x, y), Gaussian(variance), x[:number], prior_precision=delta
        )
        bound = sparse.log_marginal_likelihood()
        if equal:
            assert bound == pytest.approx(exact, rel=1e-9)
        else:
            assert bound < exact - 1e-3


@pytest.mark.parametrize("number", [2, 8])
def test_noise_and_prior_are_those_of_the_largest_bound(number):
    model, x, y = regression()
    sparse = VariationalLaplace(model, (x, y), Gaussian(0.3), x[:number])
    delta, variance = sparse.optimize_noise()
    assert sparse.prior_precision == delta
    assert sparse.likelihood.variance == variance
    found = sparse.log_marginal_likelihood()
    again = VariationalLaplace(model, (x, y), Gaussian(variance), x[:number], prior_precision=delta)
    assert again.log_marginal_likelihood() == pytest.approx(found, rel=1e-10)
    assert again.elbo(x, y) == pytest.approx(sparse.elbo(x, y), rel=1e-10)
    dense.assert_same(again.predict(x)[1], sparse.predict(x)[1], 1e-9)
    for a in (0.9, 1.0, 1.1):
        for b in (0.9, 1.0, 1.1):
            other = VariationalLaplace(
                model, (x, y), Gaussian(variance * a), x[:number], prior_precision=delta * b
            )
            assert other.log_marginal_likelihood() <= found + 1e-9


def predictive_objective(model, x, y, likelihood, delta, basis, moment, whole) -> torch.Tensor:
    """Return ``Σ log E p(y | f) − KL`` for ``U B Uᵀ``, dense and differentiable in B and δ."""
    output, jac = dense.jacobian(model, x)
    identity = torch.eye(jac.shape[-1]).double()
    precision = delta * identity + basis @ moment @ basis.T
    variance = torch.einsum("ncp,pq,ncq->nc", jac, torch.linalg.inv(precision), jac)
    if isinstance(likelihood, Gaussian):
        deviation = (variance + likelihood.variance).sqrt()
        fit = torch.distributions.Normal(output, deviation).log_prob(y).sum()
        fit = fit + y.numel() / 2 * math.log(2 * math.pi)
    else:
        fit = -likelihood.nll(output / (1 + math.pi / 8 * variance).sqrt(), y).sum()
    mean = torch.zeros(len(identity)).double()
    q = torch.distributions.MultivariateNormal(mean, precision_matrix=precision)
    prior = torch.distributions.MultivariateNormal(mean, precision_matrix=delta * identity)
    theta = nn.utils.parameters_to_vector(model.parameters()).detach()
    norm = 0.5 * delta * theta.square().sum() if whole else 0.0
    return fit - torch.distributions.kl_divergence(q, prior) - norm


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_on_the_predictive_density_are_natural_gradients(kind, whole):
    """``B ← (1 − ρ)B − 2ρ ∂(fit)/∂Σ`` in the basis, and Adam's first step on log δ is lr."""
    model, x, y, likelihood = problem(kind)
    delta, z = 0.4, x[:2]
    sparse = VariationalLaplace(model, (x, y), likelihood, z, prior_precision=delta)
    _, _, basis = dense_parts(model, x, y, likelihood, z)
    moment = (basis.T @ (8 * sparse.matrix.to_dense()) @ basis).requires_grad_(True)
    precision = torch.tensor(delta, dtype=torch.float64, requires_grad=True)
    value = predictive_objective(model, x, y, likelihood, precision, basis, moment, whole)
    gradient, slope = torch.autograd.grad(value, [moment, precision])
    # The natural gradient: that with respect to the covariance (δI + B)⁻¹.
    inverse = delta * torch.eye(len(moment)).double() + moment.detach()
    expected = moment.detach() + 2 * 0.5 * inverse @ gradient @ inverse
    history = sparse.fit_predictive((x, y), 1, rate=0.5, lr=0.0, mean_term=whole)
    assert history == [pytest.approx(float(value.detach()), rel=1e-9)]
    assert sparse.prior_precision == pytest.approx(delta)
    values, vectors = torch.linalg.eigh(0.5 * (expected + expected.T))
    expected = vectors @ torch.diag(values.clamp(min=0)) @ vectors.T
    dense.assert_same(8 * sparse.matrix.to_dense(), basis @ expected @ basis.T, 1e-8)
    before = sparse.prior_precision
    sparse.fit_predictive((x, y), 1, lr=0.01)
    assert abs(math.log(sparse.prior_precision / before)) == pytest.approx(0.01, rel=1e-3)
    again = VariationalLaplace(model, (x, y), likelihood, z, prior_precision=delta)
    again.fit_predictive((x, y), 1, lr=0.01, mean_term=whole)
    assert (again.prior_precision > delta) == (float(slope) > 0)


@pytest.mark.parametrize("kind", KINDS)
def test_predictive_density_grows(kind):
    model, x, y, likelihood = problem(kind)
    sparse = VariationalLaplace(model, (x, y), likelihood, x[:3], prior_precision=0.4)
    bound = sparse.log_marginal_likelihood(0.4)
    history = sparse.fit_predictive((x, y), 40, rate=0.3, lr=0.02)
    assert history[-1] > history[0]
    mean, _ = sparse.functional_variance(x)
    assert torch.equal(mean, model(x).detach())
    if kind == "gaussian":
        assert sparse.likelihood.variance != 0.3
    else:  # The bound is about another covariance.
        assert sparse.log_marginal_likelihood(0.4) == bound
        assert sparse.elbo(x, y) < sparse.log_marginal_likelihood()
    batches = [(x[:5], y[:5]), (x[5:], y[5:])]
    assert len(sparse.fit_predictive(batches, 5)) == 5


def test_predictive_fit_leaves_out_what_is_missing():
    model, x, y = regression()
    sparse = VariationalLaplace(model, (x[:6], y[:6]), Gaussian(0.3), x[:2])
    target = y.clone()
    target[6:] = math.nan
    masked = VariationalLaplace(model, (x, target), Gaussian(0.3), x[:2])
    assert masked.log_marginal_likelihood() == pytest.approx(sparse.log_marginal_likelihood())
    expected = sparse.fit_predictive((x[:6], y[:6]), 3)
    assert masked.fit_predictive((x, target), 3) == pytest.approx(expected, rel=1e-9)
    dense.assert_same(masked.predict(x)[1], sparse.predict(x)[1], 1e-8)


def test_samples_of_the_parameters_have_the_covariance():
    """The symmetric root on the same normal vectors."""
    model, x, y = regression()
    sparse = VariationalLaplace(model, (x, y), "gaussian", x[:2], prior_precision=0.7)
    found = sparse.sample(50, torch.Generator().manual_seed(3))
    values, vectors = torch.linalg.eigh(dense_posterior(sparse))
    root = vectors @ torch.diag(values.sqrt()) @ vectors.T
    noise = torch.randn(
        50, len(root), generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )
    center = nn.utils.parameters_to_vector(model.parameters()).detach()
    dense.assert_same(found, center + noise @ root, 1e-8)
    column = normal(len(root))
    dense.assert_same(sparse.matrix @ column, sparse.matrix.to_dense() @ column)
    dense.assert_same(sparse.matrix.solve(column), torch.linalg.pinv(
        sparse.matrix.to_dense(), hermitian=True, rtol=1e-12) @ column, 1e-7)  # fmt: skip


def test_last_layer_alone_masks_and_other_layers():
    model, x, y = regression()
    full = Laplace(model, (x, y), "gaussian", "full", parameters="last_layer")
    sparse = VariationalLaplace(model, (x, y), "gaussian", x, parameters="last_layer")
    assert sparse.matrix.parameter_names == ("2.weight", "2.bias")
    assert all(p.requires_grad for p in model.parameters())
    dense.assert_same(sparse.functional_variance(x)[1], full.functional_variance(x)[1], 1e-8)
    model, x, _ = regression(3)
    y = torch.tensor([0, 1, -100, 2, 1, -100, 0, 0])
    whole = Laplace(model, (x, y), Categorical(), "full")
    parts = VariationalLaplace(model, [(x[:3], y[:3]), (x[3:], y[3:])], Categorical(), x)
    assert parts.count == whole.count == 6
    dense.assert_same(parts.predict(x), whole.predict(x), 1e-8)
    for name in ("conv2d", "tokens"):
        case = CASES[name]()
        likelihood = Categorical(class_dim=-1) if name == "tokens" else Categorical()
        target = case.target("categorical")
        full = Laplace(case.model, (case.x, target), likelihood, "full")
        sparse = VariationalLaplace(case.model, (case.x, target), likelihood, case.x)
        expected = full.functional_variance(case.x)[1]
        dense.assert_same(sparse.functional_variance(case.x)[1], expected, 1e-7)


def test_sampled_labels_and_models_left_as_they_were():
    model, x, _, likelihood = problem("categorical")
    y = torch.tensor([0, 1, 2, 0, 1, 0, 2, 2])
    before = [p.detach().clone() for p in model.parameters()]
    exact = VariationalLaplace(model, (x, y), likelihood, x[:3]).matrix.to_dense()
    draws = [
        VariationalLaplace(model, (x, y), likelihood, x[:3], fisher="mc", seed=seed)
        for seed in range(60)
    ]
    dense_draws = torch.stack([one.matrix.to_dense() for one in draws])
    error = (dense_draws.mean(0) - exact).norm() / exact.norm()
    assert error < 5 * float((dense_draws - exact).flatten(1).norm(dim=1).mean()) / (
        60**0.5 * float(exact.norm())
    )
    for old, new in zip(before, model.parameters(), strict=True):
        assert torch.equal(old, new)
        assert new.grad is None
    assert not any(m._forward_hooks for m in model.modules())


def batches_of(x: torch.Tensor) -> Iterator[torch.Tensor]:
    return iter(x.split(7))


def test_choice_of_inducing_points():
    model, _, _ = regression()
    centres = torch.tensor([[4.0, 0, 0], [0, 4, 0], [0, 0, 4], [-4, -4, 0]]).double()
    x = (centres.repeat(10, 1) + 0.01 * normal(40, 3)).contiguous()
    for selection in ("random", "greedy", "k_means"):
        found = choose_inducing_points(
            model, batches_of(x), 4, selection, torch.Generator().manual_seed(1)
        )
        assert found.shape == (4, 3)
        inside = (found[:, None] == x).all(2).any(1).all()
        assert bool(inside) == (selection != "k_means")
        if selection != "random":  # One in each cluster, for kernels and for means.
            assert sorted(torch.cdist(found, centres).argmin(1).tolist()) == [0, 1, 2, 3]
    # Greedy: the remainders are those of conditioning on what was chosen before.
    kernel = dense.jacobian(model, x)[1].flatten(1)
    kernel = kernel @ kernel.T
    found = choose_inducing_points(model, [x], 5, "greedy", torch.Generator())
    chosen = [int(torch.cdist(one[None], x).argmin()) for one in found]
    for step in range(1, 5):
        some = chosen[:step]
        cross = kernel[:, some]
        left = (
            kernel.diagonal()
            - (cross @ torch.linalg.solve(kernel[some][:, some], cross.T)).diagonal()
        )
        assert left[chosen[step]] >= left.max() - 1e-9
    # Copies add nothing, so that fewer points come back.
    copies = x[:2].repeat(6, 1)
    assert len(choose_inducing_points(model, [copies], 5, "greedy", torch.Generator())) == 2


def test_wrong_input():
    model, x, y = regression()
    for message, arguments in {
        "prior_precision": {"prior_precision": 0.0},
        "last_layer": {"parameters": "first"},
        "outputs must be": {"outputs": "some"},
        "inducing must be": {"inducing": 0},
        "selection must be": {"selection": "best"},
        "steps must be": {"steps": 0},
    }.items():
        with pytest.raises(ValueError, match=message):
            VariationalLaplace(model, (x, y), "gaussian", **{"inducing": 2, **arguments})
    with pytest.raises(ValueError, match="re-iterable"):
        VariationalLaplace(model, iter([(x, y)]), "gaussian")
    with pytest.raises(ValueError, match="targets"):
        VariationalLaplace(model, [(x, None)], "gaussian", x)
    with pytest.raises(ValueError, match="no batches"):
        VariationalLaplace(model, [], "gaussian")
    with pytest.raises(ValueError, match="count="):
        VariationalLaplace(model, [(x, y)], "gaussian", x, steps=1)
    model, x, y, likelihood = problem("categorical")
    sparse = VariationalLaplace(model, (x, y), likelihood, x[:2])
    with pytest.raises(ValueError, match="no targets"):
        sparse.elbo(x, torch.full_like(y, -100))
    with pytest.raises(ValueError, match="floating-point"):
        VariationalLaplace(model, ((x,), y), likelihood, 2)
    for message, arguments in {
        "steps must be": {"steps": 0}, "rate must be": {"steps": 1, "rate": 0.0},
        "lr must be": {"steps": 1, "lr": -1.0},
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=message):
            sparse.fit_predictive((x, y), **arguments)
    with pytest.raises(ValueError, match="no batches"):
        sparse.fit_predictive([], 1)
    counts = VariationalLaplace(model, (x, torch.ones(8, 3).double()), Poisson(), x[:2])
    with pytest.raises(TypeError, match="fit_predictive"):
        counts.fit_predictive((x, torch.ones(8, 3).double()), 1)
    with pytest.raises(TypeError, match="gaussian"):
        sparse.optimize_noise()
