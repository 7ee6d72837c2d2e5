"""The two-layer network: its definition, its kernel, and both optimizers on it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, jacrev

from natgrad import KFAC, ExactNGD, fisher_matrix
from natgrad.ntk import JacobianStability, convergence_bounds, jacobian_conditions
from natgrad.ntk.two_layer import TwoLayerNetwork, two_layer_kernel
from tests.cases import generator, normal
from tests.methods import make_optimizer


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return nn.functional.normalize(normal(*shape, seed=seed), dim=1)


def network(inputs: int, width: int, seed: int = 0, **options) -> TwoLayerNetwork:
    return TwoLayerNetwork(inputs, width, generator=generator(seed), dtype=torch.float64, **options)


def dense_jacobian(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    rows = jacrev(lambda p: functional_call(model, p, (x,)).flatten())(parameters)
    return torch.cat([r.flatten(1) for r in rows.values()], dim=1)


def train(model: nn.Module, optimizer, x, y, steps: int) -> list[float]:
    """Train on the mean of half squared errors; return every squared residual, first to last."""
    history = []
    for _ in range(steps):
        optimizer.zero_grad()
        residual = model(x) - y
        history.append(float(residual.detach().square().sum()))
        (0.5 * residual.square().sum() / len(x)).backward()
        optimizer.step()
    with torch.no_grad():
        history.append(float((model(x) - y).square().sum()))
    return history


def test_output_is_the_definition():
    model = network(3, 7, weight_std=0.5)
    x = normal(4, 3)
    w, a = model.hidden.weight.detach(), model.signs
    expected = [
        sum(float(a[r]) * max(0.0, float(w[r] @ x[n])) for r in range(7)) / math.sqrt(7)
        for n in range(4)
    ]
    assert model(x).shape == (4, 1)
    torch.testing.assert_close(model(x)[:, 0], torch.tensor(expected, dtype=torch.float64))
    assert [n for n, _ in model.named_parameters()] == ["hidden.weight"]
    assert set(model.state_dict()) == {"hidden.weight", "signs"}


def test_parameters_are_drawn_as_documented():
    model = TwoLayerNetwork(50, 4000, weight_std=0.3, generator=generator(1))
    weight = model.hidden.weight.detach()
    assert weight.dtype == torch.float32
    assert abs(float(weight.std()) / 0.3 - 1) < 0.01
    assert set(model.signs.tolist()) == {-1.0, 1.0}
    assert abs(float(model.signs.mean())) < 5 / 4000**0.5
    again = TwoLayerNetwork(50, 4000, weight_std=0.3, generator=generator(1))
    assert torch.equal(again.hidden.weight, weight) and torch.equal(again.signs, model.signs)
    for options in ({"width": 0}, {"inputs": 0}, {"weight_std": 0.0}, {"weight_std": math.inf}):
        with pytest.raises(ValueError, match=next(iter(options))):
            TwoLayerNetwork(**{"inputs": 2, "width": 3, **options})


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_kernel_is_the_formula(d, n, m, seed):
    x, z = normal(n, d, seed=seed), normal(m, d, seed=seed + 100)
    kernel = two_layer_kernel(x, z)
    for i in range(n):
        for j in range(m):
            inner = float(x[i] @ z[j])
            cosine = inner / float(x[i].norm() * z[j].norm())
            angle = math.acos(max(-1.0, min(1.0, cosine)))
            assert abs(float(kernel[i, j]) - inner * (math.pi - angle) / (2 * math.pi)) < 1e-7
    own = two_layer_kernel(x.float())
    assert own.dtype == torch.float64
    torch.testing.assert_close(
        own.diagonal(), x.float().double().square().sum(1) / 2, rtol=1e-14, atol=0
    )
    torch.testing.assert_close(own, own.T, rtol=1e-13, atol=1e-14)


def test_kernel_of_special_angles_and_bad_shapes():
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    third = 3 / 8  # angle π/4, inner product 1
    expected = torch.tensor(
        [
            [0.5, 0, 0, third, 0],
            [0, 0.5, 0, third, 0],
            [0, 0, 0.5, -1 / 8, 0],
            [third, third, -1 / 8, 1, 0],
            [0, 0, 0, 0, 0],
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(two_layer_kernel(x), expected, rtol=0, atol=1e-15)
    for bad in (torch.ones(3), torch.ones(2, 3)):
        with pytest.raises(ValueError, match="shape"):
            two_layer_kernel(x, bad)


@pytest.mark.parametrize(("pairs", "singular"), [(1, False), (2, False), (3, True)])
def test_opposite_inputs_are_singular_only_beyond_the_dimension(pairs, singular):
    """In the plane three opposite pairs are dependent, in the limit and at every width."""
    axes = unit(pairs, 2, seed=3)
    x = torch.cat([axes, -axes])
    assert (float(torch.linalg.eigvalsh(two_layer_kernel(x))[0]) < 1e-14) == singular
    assert jacobian_conditions(network(2, 500), x).full_row_rank != singular


def test_gram_matrix_tends_to_the_kernel_like_one_over_the_root_of_the_width():
    x = unit(6, 5)
    kernel = two_layer_kernel(x)
    widths, errors = [256, 1024, 4096, 16384], []
    for width in widths:
        squared = []
        for seed in range(24):
            model = network(5, width, seed)
            active = (x @ model.hidden.weight.detach().T > 0).double()
            squared.append(float((x @ x.T * (active @ active.T) / width - kernel).square().sum()))
        errors.append(math.sqrt(sum(squared) / len(squared)))
    slope = math.log(errors[-1] / errors[0]) / math.log(widths[-1] / widths[0])
    assert -0.6 < slope < -0.4
    # The formula of the Gram matrix used here is that of the model's own Jacobian.
    model = network(5, 256, 0)
    active = (x @ model.hidden.weight.detach().T > 0).double()
    jac = dense_jacobian(model, x)
    torch.testing.assert_close(jac @ jac.T, x @ x.T * (active @ active.T) / 256)


@pytest.mark.parametrize("eta", [0.2, 0.5, 1.0])
def test_exact_natural_gradient_contracts_as_the_theory_says(eta):
    """Close to (1 − η)² of the linearised network, and never above the guaranteed 1 − η."""
    x = unit(6, 8)
    model = network(8, 20000, weight_std=100.0)
    y = model(x).detach() + normal(6, 1, seed=5)
    optimizer = ExactNGD(model, "gaussian", lr=eta, damping=0.0, kl_clip=None)
    history = train(model, optimizer, x, y, 4)
    ratios = [after / before for before, after in zip(history[:-1], history[1:], strict=True)]
    if eta < 1:
        guaranteed = convergence_bounds(method="ngd", step_size=eta).factor
        assert all(ratio < guaranteed for ratio in ratios)
        assert all(abs(ratio / (1 - eta) ** 2 - 1) < 0.02 for ratio in ratios)
    else:
        assert history[1] < 1e-4 * history[0]


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_theorem_holds_with_the_measured_constant(share):
    """Every step within the measured constant keeps to 1 − η of the squared residual."""
    x, y = unit(4, 8, seed=2), normal(4, 1, seed=6)
    model = network(8, 40000, seed=1)
    stability = JacobianStability(model, x, y)
    trial = ExactNGD(model, "gaussian", lr=1.0, damping=0.0, kl_clip=None)
    start = {n: p.clone() for n, p in model.state_dict().items()}
    train(model, trial, x, y, 3)
    measured = stability.measure()
    assert measured.stable and measured.radius is not None
    assert measured.distance < measured.radius
    bounds = convergence_bounds(method="ngd", stability=measured.constant)
    assert 0 < bounds.largest_step < 1
    model.load_state_dict(start)
    eta = share * bounds.largest_step
    history = train(model, ExactNGD(model, "gaussian", lr=eta, damping=0.0, kl_clip=None), x, y, 4)
    for before, after in zip(history[:-1], history[1:], strict=True):
        assert after <= (1 - eta) * before


@pytest.mark.parametrize(("n", "d"), [(6, 3), (5, 4), (5, 5), (4, 7)])
def test_kfac_maps_residuals_by_the_diagonal_of_the_projection(n, d):
    x = unit(n, d, seed=n)
    model = network(d, 300)
    slopes = (x @ model.hidden.weight.detach().T > 0).double()
    assert torch.linalg.matrix_rank(slopes) == n
    jac = dense_jacobian(model, x)
    f = fisher_matrix(model, (x, normal(n, 1)), "gaussian", "kfac")
    moved = torch.stack([jac @ f.solve(jac.T @ e / n) for e in torch.eye(n).double()], dim=1)
    projection = x @ torch.linalg.pinv(x)
    torch.testing.assert_close(moved / n, torch.diag(projection.diagonal()), rtol=1e-7, atol=1e-7)
    if d >= n:
        torch.testing.assert_close(moved / n, torch.eye(n).double(), rtol=1e-7, atol=1e-7)
    bounds = convergence_bounds(method="kfac", inputs=x)
    values = torch.linalg.eigvalsh(moved)
    assert bounds.largest_step == pytest.approx(2 / float(values[-1]))
    assert bounds.factor == pytest.approx(
        max(abs(1 - bounds.step_size * float(v)) for v in values) ** 2, abs=1e-9
    )
    # For small steps the rate implies the one with 1/λ_max(XᵀX).
    eta = 0.5 * bounds.largest_step
    rate = convergence_bounds(method="kfac", inputs=x, step_size=eta).factor
    assert rate <= (1 - eta * n / float(torch.linalg.eigvalsh(x.T @ x)[-1])) ** 2 + 1e-12


def test_kfac_trains_at_the_predicted_rate():
    """Large weights and targets near the first output leave the slopes as they are."""
    n, d = 6, 3
    x = unit(n, d, seed=n)
    model = network(d, 300, weight_std=1e4)
    residual = normal(n, 1, seed=8)
    y = model(x).detach() - residual
    bounds = convergence_bounds(method="kfac", inputs=x)
    projection = (x @ torch.linalg.pinv(x)).diagonal().unsqueeze(1)
    optimizer = make_optimizer(
        KFAC,
        model,
        "gaussian",
        lr=bounds.step_size,
        damping=0.0,
        momentum=0.0,
        fisher="exact",
        factors=1,
        inverses=1,
        kl_clip=None,
    )
    history = train(model, optimizer, x, y, 3)
    for step, measured in enumerate(history):
        expected = (1 - bounds.step_size * n * projection) ** step * residual
        assert measured == pytest.approx(float(expected.square().sum()), rel=1e-6)
        assert measured <= bounds.factor**step * history[0] * (1 + 1e-9)


@pytest.mark.parametrize(("factor", "converges"), [(0.95, True), (1.05, False)])
def test_gradient_descent_diverges_above_its_bound(factor, converges):
    """The linearised network: features are the Jacobian's rows, which do not change."""
    x, y = unit(5, 6), normal(5, 1, seed=4)
    jac = dense_jacobian(network(6, 200), x)
    gram = jac @ jac.T
    linear = nn.Linear(jac.shape[1], 1, bias=False).double()
    bounds = convergence_bounds(gram, method="gd")
    step = factor * bounds.largest_step
    history = train(linear, torch.optim.SGD(linear.parameters(), lr=step), jac, y, 60)
    assert (history[-1] < 0.1 * history[0]) == converges
    assert (history[-1] > 2 * history[-11]) == (not converges)
    if converges:
        bound = convergence_bounds(gram, method="gd", step_size=step).factor
        for before, after in zip(history[:-1], history[1:], strict=True):
            assert after <= bound * before * (1 + 1e-9)
