"""Conjugate gradients and thermal equilibrium, against dense solves and recursions."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

import natgrad
from natgrad import Capture, fisher_matrix
from natgrad.curvature import Full
from natgrad.likelihoods import Gaussian
from natgrad.operators import GradientSource
from natgrad.operators.rows import RowsOperator
from natgrad.solvers import ConjugateGradient, IterativeSolver, Thermodynamic
from tests import dense
from tests.cases import CASES, generator, normal
from tests.methods import curvature_of, make_optimizer


def network() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    return model, normal(5, 3), torch.tensor([0, 1, 1, 0, 1])


def matrix(solver: IterativeSolver, damping: float):
    """A matrix inverted by a solver on a small network, A = F + λI in dense form, a gradient."""
    model, x, _ = network()
    with Capture(model) as capture:
        output = model(x)
        rows = capture.pull_back(output, Gaussian().root_vectors(output.detach()))
        found = curvature_of(Full(solver=solver), capture)
        found.update(rows, len(x))
        found.refresh(damping)
    jac = rows.to_dense()
    a = jac.T @ jac / len(x) + damping * torch.eye(jac.shape[1]).double()
    return found, a, normal(a.shape[0], seed=9)


def precondition(found, gradient) -> torch.Tensor:
    source = GradientSource(found.layout.to_dict(gradient))
    return found.layout.to_flat(found.natural_gradient(source))


def state(found) -> dict:
    """Return what the solver carries from one solution to the next."""
    return found.estimates["all layers"].inverse.state


def equilibrium(solver: Thermodynamic, draws: int):
    """Draw solutions one after another; return them, A, the gradient and the solver's state.

    A is multiplied as a matrix: that rows give the same is for the recursions below to see.
    """
    found, a, gradient = matrix(solver, 1.0)
    held, samples = state(found), []
    for _ in range(draws + 1):
        sample, held = solver.solve(lambda v: a @ v, gradient, held)
        samples.append(sample)
    return torch.stack(samples[1:]), a, gradient, held


@pytest.mark.parametrize(
    "solver", [ConjugateGradient(1e-12, 500), Thermodynamic(time=200.0)], ids=["cg", "thermal"]
)
@pytest.mark.parametrize("name", ["mlp", "conv2d", "tied_embedding", "layer_norm", "generic"])
def test_inverses_are_those_of_the_exact_fisher_matrix(solver, name):
    case = CASES[name]()
    y = case.target("categorical")
    exact = fisher_matrix(case.model, (case.x, y), "categorical", "full")
    v = normal(exact.shape[0], 2, seed=2)
    found = exact.inverse(4.0, solver)
    dense.assert_same(found @ v, exact.solve(v, 4.0), 1e-8)
    dense.assert_same(found @ v[:, 0], exact.solve(v[:, 0], 4.0), 1e-8)


@pytest.mark.parametrize("damping", [1e-3, 0.1])
@pytest.mark.parametrize("warm_start", [True, False])
def test_conjugate_gradients_solve_and_warm_starts_have_less_to_do(
    damping, warm_start, monkeypatch
):
    found, a, gradient = matrix(ConjugateGradient(1e-12, 200, warm_start), damping)
    dense.assert_same(precondition(found, gradient), torch.linalg.solve(a, gradient), 1e-8)
    products = []
    multiply = RowsOperator.multiply
    monkeypatch.setattr(
        RowsOperator, "multiply", lambda self, v: products.append(1) or multiply(self, v)
    )
    precondition(found, gradient)
    assert (
        len(products) <= 3 if warm_start else len(products) > 5
    )  # The last solution still solves.


def test_conjugate_gradients_are_the_textbook_iteration():
    """Few iterations: the best point of the Krylov space, in the norm of A."""
    found, a, gradient = matrix(ConjugateGradient(tolerance=0.0, max_iterations=3), 0.05)
    krylov = torch.stack([torch.linalg.matrix_power(a, k) @ gradient for k in range(3)], 1)
    basis, _ = torch.linalg.qr(krylov)
    best = basis @ torch.linalg.solve(basis.T @ a @ basis, basis.T @ gradient)
    dense.assert_same(precondition(found, gradient), best, 1e-8)


def test_conjugate_gradients_without_damping_take_the_pseudo_inverse():
    found, a, gradient = matrix(ConjugateGradient(tolerance=1e-13, max_iterations=300), 0.0)
    inside = a @ gradient
    expected = torch.linalg.pinv(a, rtol=1e-11, hermitian=True) @ inside
    dense.assert_same(precondition(found, inside), expected, 1e-5)


@pytest.mark.parametrize("start", ["zero", "gradient", "warm"])
def test_simulation_is_the_euler_recursion(start):
    found, a, gradient = matrix(Thermodynamic(time=7.0, step_size=0.9, start=start), 0.1)
    assert found.structure.solver.products == 8
    dt = 7.0 / 8 / (1.2 * state(found)["largest"])
    assert state(found)["largest"] == pytest.approx(float(torch.linalg.eigvalsh(a)[-1]), rel=0.1)
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
    found, a, gradient = matrix(Thermodynamic(time=5.0, step_size=0.01, start="gradient"), 0.2)
    t = 5.0 / (1.2 * state(found)["largest"])
    decay = torch.linalg.matrix_exp(-a * t)
    goal = torch.linalg.solve(a, gradient)
    flow = goal + decay @ (gradient - goal)
    dense.assert_same(precondition(found, gradient), flow, 0.01)
    found, a, gradient = matrix(Thermodynamic(time=600.0, step_size=1.0), 0.2)
    dense.assert_same(precondition(found, gradient), torch.linalg.solve(a, gradient), 1e-8)


def test_noise_is_that_of_the_euler_scheme():
    """The recursion with the same random numbers, step by step."""
    options = {"time": 6.0, "step_size": 0.8, "temperature": 0.3, "seed": 5}
    found, a, gradient = matrix(Thermodynamic(**options), 0.1)
    noise = torch.Generator()
    noise.set_state(state(found)["generator"])
    dt = 6.0 / 8 / (1.2 * state(found)["largest"])
    x = torch.zeros_like(gradient)
    for _ in range(2):
        for _ in range(8):
            x = x + dt * (gradient - a @ x)
            xi = torch.randn(x.shape, generator=noise, dtype=torch.float64)
            x = x + (2 * 0.3 * dt) ** 0.5 * xi
        dense.assert_same(precondition(found, gradient), x)


@pytest.mark.slow
def test_noise_has_the_stationary_law():
    """Mean A⁻¹b, covariance T(A − dt A²/2)⁻¹ of the Euler scheme, within five standard errors."""
    temperature, draws, time = 0.3, 250, 15.0
    solver = Thermodynamic(time=time, step_size=1.0, temperature=temperature)
    samples, a, gradient, held = equilibrium(solver, draws)
    dt = 1.0 / (1.2 * held["largest"])
    covariance = temperature * torch.linalg.inv(a - dt * a @ a / 2)
    mean = torch.linalg.solve(a, gradient)
    # Successive states are correlated by exp(−λ t) with λ ≥ 1: at most so many fewer draws.
    slowest = float(torch.exp(-torch.linalg.eigvalsh(a)[0] * time * dt))
    effective = draws * (1 - slowest) / (1 + slowest)
    error = (covariance.diagonal() / effective).sqrt()
    assert ((samples.mean(0) - mean).abs() < 5 * error).all()
    # Of standard normal vectors the sample covariance has variance (1 + δ_ij)/n.
    root = torch.linalg.cholesky(covariance)
    white = torch.linalg.solve_triangular(root, (samples - mean).T, upper=False)
    identity = torch.eye(len(mean)).double()
    error = ((1 + identity) / effective).sqrt()
    assert ((white @ white.T / draws - identity).abs() < 5 * error).all()


@pytest.mark.parametrize("start", ["zero", "gradient", "warm"])
@pytest.mark.parametrize("delay", [0.0, 2.5, 7.0])
@pytest.mark.parametrize("temperature", [0.0, 0.2])
def test_a_delay_runs_under_the_matrix_and_gradient_of_the_step_before(start, delay, temperature):
    """Three steps on three systems against the recursion that keeps the old ones."""
    model, _, _ = network()
    options = {"time": 7.0, "step_size": 0.9, "start": start, "temperature": temperature}
    with Capture(model) as capture:
        found = curvature_of(Full(solver=Thermodynamic(delay=delay, **options)), capture)
        noise, old, x = torch.Generator(), None, None
        for index in range(3):
            inputs, damping = normal(5, 3, seed=index), 0.1 * (index + 1)
            output = model(inputs)
            rows = capture.pull_back(output, Gaussian().root_vectors(output.detach()))
            found.observe(rows, len(inputs))
            found.join(0.0)
            found.refresh(damping)
            jac = rows.to_dense()
            a = jac.T @ jac / len(inputs) + damping * torch.eye(jac.shape[1]).double()
            gradient = normal(len(a), seed=20 + index)
            present = (a, gradient, 1.2 * state(found)["largest"])
            if index == 0:
                noise.set_state(state(found)["generator"])
            first = old if old and delay else present
            begin = {"zero": torch.zeros_like(gradient), "gradient": first[1], "warm": x}[start]
            x = torch.zeros_like(gradient) if begin is None else begin
            phases = [(old, delay), (present, 7.0 - delay)] if old else [(present, 7.0)]
            for (matrix_, b, largest), time in phases:
                steps = math.ceil(time / 0.9)
                for _ in range(steps):
                    dt = time / steps / largest
                    x = x + dt * (b - matrix_ @ x)
                    if temperature:
                        xi = torch.randn(x.shape, generator=noise, dtype=torch.float64)
                        x = x + (2 * temperature * dt) ** 0.5 * xi
            dense.assert_same(precondition(found, gradient), x)
            old = present
    assert found.structure.solver.products == math.ceil(delay / 0.9) + math.ceil(
        (7.0 - delay) / 0.9
    )
    assert (state(found).get("delayed") is None) == (delay == 0)


@pytest.mark.parametrize("delay", [0.0, 2.0])
def test_burn_in_takes_the_mean_of_the_states_after_it(delay):
    found, a, gradient = matrix(
        Thermodynamic(time=8.0, step_size=1.0, burn_in=3.5, delay=delay), 0.1
    )
    dt = 1.0 / (1.2 * state(found)["largest"])
    x = torch.zeros_like(gradient)
    for phase in (8, 8 - int(delay)):
        states = []
        for _ in range(phase):
            x = x + dt * (gradient - a @ x)
            states.append(x)
        dense.assert_same(precondition(found, gradient), torch.stack(states[3:]).mean(0))
        for _ in range(int(delay)):
            x = x + dt * (gradient - a @ x)


@pytest.mark.slow
def test_means_after_burn_in_have_less_noise_by_the_closed_form():
    """In an eigendirection of A the Euler scheme is an autoregression with ρ = 1 − dt·a."""
    temperature, draws, kept = 0.3, 200, 20
    solver = Thermodynamic(time=40.0, step_size=1.0, temperature=temperature, burn_in=20.0)
    samples, a, gradient, held = equilibrium(solver, draws)
    dt = 1.0 / (1.2 * held["largest"])
    values, vectors = torch.linalg.eigh(a)
    rho = 1 - dt * values
    spread = 2 * temperature * dt / (1 - rho.square())
    lags = torch.arange(1, kept).double()
    sums = ((kept - lags) * rho.unsqueeze(1) ** lags).sum(1)
    variance = spread / kept**2 * (kept + 2 * sums)
    deviations = (samples - torch.linalg.solve(a, gradient)) @ vectors
    # Means of successive simulations are correlated by at most ρ^20.
    slowest = float(rho.abs().max() ** 20)
    effective = draws * (1 - slowest) / (1 + slowest)
    assert (deviations.mean(0).abs() < 5 * (variance / effective).sqrt()).all()
    found_variance = deviations.square().mean(0)
    assert ((found_variance / variance - 1).abs() < 5 * (2 / effective) ** 0.5).all()
    assert (variance < 0.7 * spread).all()


def test_no_gram_matrix_and_no_matrix_of_parameters_is_formed(monkeypatch):
    model, x, y = network()
    monkeypatch.setattr("natgrad.jacobians.Jacobians.gram", None)
    monkeypatch.setattr("natgrad.operators.rows.RowsOperator.direct_inverse", None)
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
        (natgrad.ThermodynamicNGD, {"time": 400.0}),
    ],
)
def test_optimizers_take_the_step_of_exact_natural_gradient_descent(cls, options):
    model, x, y = network()
    other = copy.deepcopy(model)
    fast = make_optimizer(cls, model, damping=0.05, kl_clip=1e-3, **options)
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
    optimizer = make_optimizer(
        natgrad.ThermodynamicNGD, model, lr=0.1, time=0.0, start="gradient", kl_clip=None
    )
    functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    functional.cross_entropy(other(x), y).backward()
    torch.optim.SGD(other.parameters(), 0.1).step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)


SOLVED = [
    (natgrad.ExactNGD, {}),
    (natgrad.BlockDiagonalNGD, {}),
    (natgrad.ImprovedEmpiricalNGD, {}),
    (natgrad.ConjugateGradientNGD, {"tolerance": 1e-13, "max_iterations": 200}),
    (natgrad.ThermodynamicNGD, {"time": 300.0, "delay": 50.0}),
]


@pytest.mark.parametrize(("cls", "options"), SOLVED)
def test_accumulated_passes_are_one_batch(cls, options):
    if cls is natgrad.ThermodynamicNGD:
        options = {"time": 20.0, "delay": 5.0}  # Both simulate the same, wherever it is by then.
    model, x, y = network()
    x, y = normal(6, 3), torch.tensor([0, 1, 1, 0, 1, 1])
    other = copy.deepcopy(model)
    optimizers = [make_optimizer(cls, m, damping=0.3, **options) for m in (model, other)]
    for _ in range(2):
        for m, optimizer, parts in ((model, optimizers[0], 1), (other, optimizers[1], 3)):
            optimizer.zero_grad()
            for part in torch.arange(6).chunk(parts):
                (functional.cross_entropy(m(x[part]), y[part]) / parts).backward()
            optimizer.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("missing", ["other group", "no gradient"])
@pytest.mark.parametrize(("cls", "options"), SOLVED)
def test_a_bound_on_steps_of_some_of_the_parameters(cls, options, missing):
    """Of a layer whose bias is left to the fallback, or has no gradient, the weight moves alone."""
    model, x, y = network()
    structure = "block_diagonal" if cls is natgrad.BlockDiagonalNGD else "full"
    kind = "improved" if cls is natgrad.ImprovedEmpiricalNGD else "exact"
    seen = copy.deepcopy(model)
    seen[2].bias.requires_grad_(missing == "no gradient")  # The other group has no rows.
    f, whole = (
        fisher_matrix(seen, (x, y), "categorical", name, kind).to_dense()
        for name in (structure, "full")
    )
    if missing == "other group":
        f, whole = (functional.pad(matrix, (0, 2, 0, 2)) for matrix in (f, whole))
    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    functional.cross_entropy(model(x), y).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    kept = torch.arange(len(gradient)) < len(gradient) - 2  # all but the last bias
    natural = torch.linalg.solve(f + 0.3 * torch.eye(len(f)).double(), gradient * kept) * kept
    change = natural @ whole @ natural
    if cls is natgrad.BlockDiagonalNGD and missing == "other group":
        change = natural @ gradient  # A block smaller than its Gram matrix keeps no rows.
    scale = min(1.0, (1e-3 / float(change)) ** 0.5)
    assert scale < 1
    groups = [{"params": "2.bias", "preconditioned": False}] if missing == "other group" else None
    optimizer = make_optimizer(
        cls,
        model,
        lr=1.0,
        damping=0.3,
        kl_clip=1e-3,
        params=groups,
        fallback=natgrad.Fallback("adamw", 0.0),
        **options,
    )
    optimizer.zero_grad()
    functional.cross_entropy(model(x), y).backward()
    if missing == "no gradient":
        model[2].bias.grad = None
    optimizer.step()
    after = nn.utils.parameters_to_vector(model.parameters()).detach()
    dense.assert_same(before - after, scale * natural, 1e-6)


@pytest.mark.parametrize("cls", [natgrad.ConjugateGradientNGD, natgrad.ThermodynamicNGD])
def test_training_resumes_and_survives_bad_steps(cls):
    model, x, _ = network()
    x = normal(40, 3)
    y = torch.randint(0, 2, (40,), generator=generator())
    options = {"temperature": 1e-6, "delay": 5.0, "burn_in": 2.0}
    options = options if cls is natgrad.ThermodynamicNGD else {}
    optimizer = make_optimizer(cls, model, **options)

    def step(m, o, inputs) -> float:
        o.zero_grad()
        loss = functional.cross_entropy(m(inputs), y)
        loss.backward()
        o.step()
        return float(loss)

    first = step(model, optimizer, x)
    before = copy.deepcopy(state(optimizer.preconditioner.curvature))
    with pytest.warns(UserWarning, match="skipped"):
        step(model, optimizer, x * float("nan"))
    after = state(optimizer.preconditioner.curvature)
    assert set(after) == set(before)
    for name, value in before.items():  # The noise has not gone on either.
        assert torch.equal(torch.as_tensor(after[name]), torch.as_tensor(value)), name
    last = [step(model, optimizer, x) for _ in range(15)][-1]
    assert last < first
    other = copy.deepcopy(model)
    resumed = make_optimizer(cls, other, **options)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(3):
        assert step(model, optimizer, x) == step(other, resumed, x)


@pytest.mark.parametrize(
    ("solver", "options", "error"),
    [
        (ConjugateGradient, {"tolerance": 1.0}, ValueError),
        (ConjugateGradient, {"max_iterations": 0}, ValueError),
        (ConjugateGradient, {"depth": 3}, TypeError),
        (Thermodynamic, {"time": -1.0}, ValueError),
        (Thermodynamic, {"step_size": 2.0}, ValueError),
        (Thermodynamic, {"temperature": -1.0}, ValueError),
        (Thermodynamic, {"start": "cold"}, ValueError),
        (Thermodynamic, {"delay": -1.0}, ValueError),
        (Thermodynamic, {"delay": 20.5}, ValueError),
        (Thermodynamic, {"burn_in": -1.0}, ValueError),
        (Thermodynamic, {"burn_in": 15.0, "delay": 5.0}, ValueError),
        (Thermodynamic, {"depth": 3}, TypeError),
    ],
)
def test_wrong_options(solver, options, error):
    with pytest.raises(error):
        solver(**options)
