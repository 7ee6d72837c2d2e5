"""Conjugate gradients and thermal equilibrium, against dense solves and recursions."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import natgrad
from natgrad import Capture, fisher_matrix
from natgrad.curvature import GradientSource, make_structure
from natgrad.likelihoods import Gaussian
from tests import dense
from tests.cases import CASES, generator, normal


def network() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    return model, normal(5, 3), torch.tensor([0, 1, 1, 0, 1])


def matrix(structure: str, damping: float, **options):
    """A refreshed structure on a small network, A = F + λI in dense form, and a gradient."""
    model, x, _ = network()
    with Capture(model) as capture:
        output = model(x)
        rows = capture.pull_back(output, Gaussian().root_vectors(output.detach()))
        found = make_structure(structure, capture.blocks, capture.layout, **options)
        found.update(rows, len(x))
        found.refresh(damping)
    jac = rows.to_dense()
    a = jac.T @ jac / len(x) + damping * torch.eye(jac.shape[1]).double()
    return found, a, normal(a.shape[0], seed=9)


def precondition(found, gradient) -> torch.Tensor:
    source = GradientSource(found.layout.to_dict(gradient))
    return found.layout.to_flat(found.precondition(source))


@pytest.mark.parametrize("structure", ["conjugate_gradient", "thermodynamic"])
@pytest.mark.parametrize("name", ["mlp", "conv2d", "tied_embedding", "layer_norm", "generic"])
def test_as_an_object_it_is_the_exact_fisher_matrix(structure, name):
    case = CASES[name]()
    y = case.target("categorical")
    found = fisher_matrix(case.model, (case.x, y), "categorical", structure)
    exact = fisher_matrix(case.model, (case.x, y), "categorical", "full")
    v = normal(found.shape[0], seed=2)
    dense.assert_same(found @ v, exact.to_dense() @ v)
    dense.assert_same(found.solve(v, 0.1), exact.solve(v, 0.1), 1e-8)
    dense.assert_same(found.trace(), exact.trace())


@pytest.mark.parametrize("damping", [1e-3, 0.1])
def test_conjugate_gradients_solve_and_warm_starts_have_less_to_do(damping):
    found, a, gradient = matrix("conjugate_gradient", damping, tolerance=1e-12, max_iterations=200)
    dense.assert_same(precondition(found, gradient), torch.linalg.solve(a, gradient), 1e-8)
    part = found.parts["all layers"]
    products = []
    real = part.damped_product
    part.damped_product = lambda v: products.append(1) or real(v)
    precondition(found, gradient)
    assert len(products) <= 3  # the last solution still solves
    part.warm_start = False
    precondition(found, gradient)
    assert len(products) > 5


def test_conjugate_gradients_are_the_textbook_iteration():
    """Few iterations: the best point of the Krylov space, in the norm of A."""
    found, a, gradient = matrix("conjugate_gradient", 0.05, tolerance=0.0, max_iterations=3)
    krylov = torch.stack([torch.linalg.matrix_power(a, k) @ gradient for k in range(3)], 1)
    basis, _ = torch.linalg.qr(krylov)
    best = basis @ torch.linalg.solve(basis.T @ a @ basis, basis.T @ gradient)
    dense.assert_same(precondition(found, gradient), best, 1e-8)


def test_conjugate_gradients_without_damping_take_the_pseudo_inverse():
    found, a, gradient = matrix("conjugate_gradient", 0.0, tolerance=1e-13, max_iterations=300)
    inside = a @ gradient
    expected = torch.linalg.pinv(a, rtol=1e-11, hermitian=True) @ inside
    dense.assert_same(precondition(found, inside), expected, 1e-5)


@pytest.mark.parametrize("start", ["zero", "gradient", "warm"])
def test_simulation_is_the_euler_recursion(start):
    found, a, gradient = matrix("thermodynamic", 0.1, time=7.0, step_size=0.9, start=start)
    part = found.parts["all layers"]
    assert part.simulated_steps == 8
    dt = 7.0 / 8 / (1.2 * part._largest)
    assert part._largest == pytest.approx(float(torch.linalg.eigvalsh(a)[-1]), rel=0.1)
    x = torch.zeros_like(gradient)
    for _ in range(2):
        if start == "gradient":
            x = gradient
        elif start == "zero":
            x = torch.zeros_like(gradient)
        for _ in range(8):
            x = x + dt * (gradient - a @ x)
        dense.assert_same(precondition(found, gradient), x)


def test_small_steps_follow_the_flow_and_long_times_reach_the_natural_gradient():
    found, a, gradient = matrix("thermodynamic", 0.2, time=5.0, step_size=0.01, start="gradient")
    t = 5.0 / (1.2 * found.parts["all layers"]._largest)
    decay = torch.linalg.matrix_exp(-a * t)
    goal = torch.linalg.solve(a, gradient)
    flow = goal + decay @ (gradient - goal)
    dense.assert_same(precondition(found, gradient), flow, 0.01)
    found, a, gradient = matrix("thermodynamic", 0.2, time=2000.0, step_size=1.0)
    dense.assert_same(precondition(found, gradient), torch.linalg.solve(a, gradient), 1e-8)


@pytest.mark.slow
def test_noise_has_the_stationary_law():
    """Mean A⁻¹b, covariance T(A − dt A²/2)⁻¹ of the Euler scheme, within five standard errors."""
    temperature, draws, time = 0.3, 400, 15.0
    found, a, gradient = matrix(
        "thermodynamic", 1.0, time=time, step_size=1.0, temperature=temperature
    )
    part = found.parts["all layers"]
    precondition(found, gradient)
    samples = torch.stack([part.approximate_solution(gradient) for _ in range(draws)])
    dt = 1.0 / (1.2 * part._largest)
    covariance = temperature * torch.linalg.inv(a - dt * a @ a / 2)
    mean = torch.linalg.solve(a, gradient)
    # Successive states are correlated by exp(−λ t) with λ ≥ 1: at most so many fewer draws.
    slowest = float(torch.exp(-torch.linalg.eigvalsh(a)[0] * time * dt))
    effective = draws * (1 - slowest) / (1 + slowest)
    error = (covariance.diagonal() / effective).sqrt()
    assert ((samples.mean(0) - mean).abs() < 5 * error).all()
    found_variance = samples.var(0)
    assert ((found_variance / covariance.diagonal() - 1).abs() < 5 * (2 / effective) ** 0.5).all()


def test_no_gram_matrix_and_no_matrix_of_parameters_is_formed(monkeypatch):
    model, x, y = network()
    monkeypatch.setattr("natgrad.jacobians.Jacobians.gram", None)
    monkeypatch.setattr("natgrad.curvature.exact_rows.ExactRows._accumulate", None)
    for cls in (natgrad.ConjugateGradientNGD, natgrad.ThermodynamicNGD):
        optimizer = cls(model)
        for _ in range(2):
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (natgrad.ConjugateGradientNGD, {"tolerance": 1e-12, "max_iterations": 200}),
        (natgrad.ThermodynamicNGD, {"time": 4000.0}),
    ],
)
def test_optimizers_take_the_step_of_exact_natural_gradient_descent(cls, options):
    model, x, y = network()
    other = copy.deepcopy(model)
    fast = cls(model, damping=0.05, kl_clip=1e-3, **options)
    exact = natgrad.ExactNGD(other, damping=0.05, kl_clip=1e-3)
    for _ in range(3):
        for m, optimizer in ((model, fast), (other, exact)):
            optimizer.zero_grad()
            functional.cross_entropy(m(x), y).backward()
            optimizer.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


def test_no_time_from_the_gradient_is_gradient_descent():
    model, x, y = network()
    other = copy.deepcopy(model)
    optimizer = natgrad.ThermodynamicNGD(model, lr=0.1, time=0.0, start="gradient", kl_clip=None)
    functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    functional.cross_entropy(other(x), y).backward()
    torch.optim.SGD(other.parameters(), 0.1).step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("cls", [natgrad.ConjugateGradientNGD, natgrad.ThermodynamicNGD])
def test_training_resumes_and_survives_bad_steps(cls):
    model, x, _ = network()
    x = normal(40, 3)
    y = torch.randint(0, 2, (40,), generator=generator())
    options = {"temperature": 1e-6} if cls is natgrad.ThermodynamicNGD else {}
    optimizer = cls(model, **options)

    def step(m, o, inputs) -> float:
        o.zero_grad()
        loss = functional.cross_entropy(m(inputs), y)
        loss.backward()
        o.step()
        return float(loss)

    first = step(model, optimizer, x)
    with pytest.warns(UserWarning, match="skipped"):
        step(model, optimizer, x * float("nan"))
    last = [step(model, optimizer, x) for _ in range(15)][-1]
    assert last < first
    other = copy.deepcopy(model)
    resumed = cls(other, **options)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(3):
        assert step(model, optimizer, x) == step(other, resumed, x)


@pytest.mark.parametrize(
    ("structure", "options", "error"),
    [
        ("conjugate_gradient", {"tolerance": 1.0}, ValueError),
        ("conjugate_gradient", {"max_iterations": 0}, ValueError),
        ("conjugate_gradient", {"depth": 3}, TypeError),
        ("thermodynamic", {"time": -1.0}, ValueError),
        ("thermodynamic", {"step_size": 2.0}, ValueError),
        ("thermodynamic", {"temperature": -1.0}, ValueError),
        ("thermodynamic", {"start": "cold"}, ValueError),
        ("thermodynamic", {"depth": 3}, TypeError),
    ],
)
def test_wrong_options(structure, options, error):
    with pytest.raises(error):
        natgrad.Preconditioner(network()[0], structure, **options)
