"""Conditions of linear convergence against dense Jacobians from torch.func."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, jacrev

from natgrad import ExactNGD
from natgrad.ntk import (
    JacobianStability,
    convergence_bounds,
    generalization_bound,
    jacobian_conditions,
)
from natgrad.ntk.two_layer import TwoLayerNetwork, two_layer_kernel
from tests.cases import generator, normal


def dense_jacobian(model: nn.Module, *x: torch.Tensor) -> torch.Tensor:
    parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        rows = jacrev(lambda p: functional_call(model, p, x).flatten())(parameters)
    return torch.cat([r.flatten(1) for r in rows.values()], dim=1)


def mlp(inputs: int = 3, width: int = 6, outputs: int = 2, activation=nn.Tanh) -> nn.Module:
    return nn.Sequential(
        nn.Linear(inputs, width),
        activation(),
        nn.Linear(width, width),
        activation(),
        nn.Linear(width, outputs),
    ).double()


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(4, 4, 3, groups=2, bias=False),
        nn.Flatten(),
        nn.Linear(16, 2),
    ).double()


def normalized() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 2)).double()


class Tied(nn.Module):
    """An embedding whose weight is the output layer's too: rows that are a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(5, 3)
        self.mix = nn.Linear(3, 3)
        self.out = nn.Linear(3, 5, bias=False)
        self.out.weight = self.tokens.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.mix(self.tokens(x)).mean(1)))


class Scale(nn.Module):
    """A module natgrad has no formula for."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale.exp()


def tokens() -> torch.Tensor:
    return torch.randint(0, 5, (4, 3), generator=generator(3))


MODELS = {
    "mlp": (mlp, lambda: normal(5, 3)),
    "reused positions": (mlp, lambda: normal(3, 2, 3)),
    "convolution": (convolutional, lambda: normal(4, 2, 4, 4)),
    "layer norm": (normalized, lambda: normal(5, 3)),
    "tied": (lambda: Tied().double(), tokens),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(9, 2)).double(),
        tokens,
    ),
    "dense rows": (lambda: nn.Sequential(Scale(), nn.Linear(3, 2)).double(), lambda: normal(5, 3)),
}


def perturb(model: nn.Module, size: float, seed: int = 11) -> None:
    g = generator(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(size * torch.randn(p.shape, generator=g, dtype=p.dtype))


@pytest.mark.parametrize("size", [0.3, 1e-5])
@pytest.mark.parametrize("name", MODELS)
def test_stability_measures_the_dense_difference(name, size):
    """Also for tiny changes, whose Gram matrix would cancel if computed from Gram matrices."""
    make, inputs = MODELS[name]
    model, x = make(), inputs()
    before, old = dense_jacobian(model, x), copy.deepcopy(model)
    with torch.no_grad():
        targets = model(x) + 1.0
    stability = JacobianStability(model, x, targets)
    perturb(model, size)
    change = dense_jacobian(model, x) - before
    measured = stability.measure()
    tolerance = 1e-9 if size > 1e-3 else 1e-6
    spectral = float(torch.linalg.matrix_norm(change, 2))
    assert measured.spectral_norm == pytest.approx(spectral, rel=tolerance)
    assert measured.relative_change == pytest.approx(
        float(change.norm() / before.norm()), rel=tolerance
    )
    singular = torch.linalg.svdvals(before)
    if len(before) > before.shape[1] or singular[-1] < 1e-6:
        assert measured.constant == math.inf and measured.radius == math.inf
    else:
        delta = spectral / float(singular[-1])
        expected = 2 * delta / (1 - delta) if delta < 1 else math.inf
        assert measured.constant == pytest.approx(expected, rel=1e-5)
        assert measured.stable == (expected < 0.5)
        radius = 3 * math.sqrt(targets.numel()) / float(singular[-1])
        assert measured.radius == pytest.approx(radius, rel=1e-5)
    pairs = zip(model.parameters(), old.parameters(), strict=True)
    moved = [(p - q).detach().square().sum() for p, q in pairs]
    assert measured.distance == pytest.approx(math.sqrt(float(sum(moved))), rel=1e-9)


@pytest.mark.parametrize("elements", [1, 100])
@pytest.mark.parametrize("name", ["tied", "embedding", "dense rows"])
def test_stability_of_rows_that_need_chunks(name, elements, monkeypatch):
    monkeypatch.setattr("natgrad.jacobians.layer.CHUNK_ELEMENTS", elements)
    test_stability_measures_the_dense_difference(name, 0.3)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.integers(1, 4))
def test_stability_of_random_shapes(samples, inputs, outputs, width):
    torch.manual_seed(samples + 10 * inputs)
    model, x = mlp(inputs, width, outputs), normal(samples, inputs)
    before = dense_jacobian(model, x)
    stability = JacobianStability(model, x)
    perturb(model, 0.1)
    spectral = float(torch.linalg.matrix_norm(dense_jacobian(model, x) - before, 2))
    assert stability.measure().spectral_norm == pytest.approx(spectral, rel=1e-9)


def test_nothing_moved_nothing_measured_and_the_model_is_left_alone():
    model = nn.Sequential(mlp(), nn.BatchNorm1d(2)).double().train()
    x = normal(5, 3)
    model(x).sum().backward()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    gradients = [p.grad.clone() for p in model.parameters()]
    state = torch.random.get_rng_state()
    stability = JacobianStability(model, x)
    x.add_(1.0)  # the remembered inputs are a copy
    measured = stability.measure()
    jacobian_conditions(model, x)
    assert (measured.spectral_norm, measured.relative_change, measured.distance) == (0, 0, 0)
    assert measured.constant == 0 and measured.stable and measured.radius is None
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training and not any(m._forward_hooks for m in model.modules())


def test_linear_models_are_perfectly_stable():
    model, x = nn.Linear(6, 1).double(), normal(4, 6)
    stability = JacobianStability(model, x)
    perturb(model, 5.0)
    measured = stability.measure()
    assert measured.constant == 0 and measured.distance > 1


def test_two_layer_network_is_more_stable_the_wider_it_is():
    """The share of flipped slopes falls like m^(−1/2): the squared change has slope −1/2."""
    x = nn.functional.normalize(normal(6, 8), dim=1)
    y = normal(6, 1, seed=1)
    widths, changes = [256, 1024, 4096, 16384], []
    for width in widths:
        squared = []
        for seed in range(6):
            model = TwoLayerNetwork(8, width, generator=generator(seed), dtype=torch.float64)
            stability = JacobianStability(model, x, y)
            optimizer = ExactNGD(model, "gaussian", lr=1.0, damping=0.0, kl_clip=None)
            (0.5 * (model(x) - y).square().mean()).backward()
            optimizer.step()
            squared.append(stability.measure().relative_change ** 2)
        changes.append(sum(squared) / len(squared))
    slope = math.log(changes[-1] / changes[0]) / math.log(widths[-1] / widths[0])
    assert -0.6 < slope < -0.4


def test_stability_says_what_is_wrong():
    model, x = mlp(), normal(5, 3)
    with pytest.raises(ValueError, match=r"\(5, 2\), got \(5,\)"):
        JacobianStability(model, x, torch.zeros(5))
    with pytest.raises(ValueError, match="NaN"):
        JacobianStability(model, x * math.nan)
    frozen = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU()).double()
    with pytest.raises(ValueError, match="zero"):
        JacobianStability(frozen, torch.zeros(3, 2).double())

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.other = nn.Linear(3, 1), nn.Linear(3, 1), False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.second if self.other else self.first)(x)

    branch = Branch().double()
    stability = JacobianStability(branch, x)
    branch.other = True
    with pytest.raises(ValueError, match="other layers"):
        stability.measure()


# -- condition 1 -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_conditions_are_those_of_the_dense_jacobian(name):
    make, inputs = MODELS[name]
    model, x = make(), inputs()
    jac = dense_jacobian(model, x)
    found = jacobian_conditions(model, x)
    values = torch.linalg.svdvals(jac).square()
    assert (found.samples * found.outputs, found.parameters) == tuple(jac.shape)
    assert found.rank == int(torch.linalg.matrix_rank(jac, rtol=1e-6))
    assert found.largest_eigenvalue == pytest.approx(float(values[0]), rel=1e-9)
    if found.full_row_rank:
        smallest = float(values[-1])
        assert found.smallest_eigenvalue == pytest.approx(smallest, rel=1e-5)
        assert found.condition_number == pytest.approx(float(values[0]) / smallest, rel=1e-5)
        assert "full row rank" in str(found)
    else:
        assert found.condition_number == math.inf
        assert "condition 1 does not hold" in str(found)


def test_conditions_name_what_is_to_blame():
    relu = nn.Sequential(nn.Linear(3, 40, bias=False), nn.ReLU(), nn.Linear(40, 1, bias=False))
    relu = relu.double()
    x = normal(5, 3)
    good = jacobian_conditions(relu, x)
    assert good.full_row_rank and not (good.duplicates or good.proportional or good.silent)
    twice = torch.cat([x, x[1:2]])
    found = jacobian_conditions(relu, twice)
    assert found.rank == 5 and found.duplicates == ((1, 5),)
    assert "samples 1 and 5 are equal" in str(found)
    parallel = torch.cat([x, 0.3 * x[:1], -2.0 * x[2:3]])
    found = jacobian_conditions(relu, parallel)
    # Opposite inputs have different slopes here, so that pair is innocent.
    assert found.rank == 6 and found.proportional == ((0, 5),)
    assert "0 and 5 are parallel or opposite" in str(found)
    with_bias = mlp(3, 20, 1)
    assert jacobian_conditions(with_bias, parallel).proportional == ()
    straight = nn.Linear(3, 1, bias=False).double()
    found = jacobian_conditions(straight, parallel)
    assert set(found.proportional) == {(0, 5), (2, 6)}
    assert "7 rows are more than 3 parameters" in str(found)
    found = jacobian_conditions(relu, torch.cat([x, torch.zeros(1, 3).double()]))
    assert found.silent == (5,) and "samples 5 depends on no parameter" in str(found)
    many = jacobian_conditions(relu, x[:1].repeat(6, 1))
    assert len(many.duplicates) == 15 and "and 12 more pairs" in str(many)
    # Dependent rows that no pair of samples explains.
    found = jacobian_conditions(nn.Sequential(relu[0], nn.Linear(40, 1)).double(), x)
    assert found.rank == 4 and "no reason" in str(found)


def test_conditions_of_single_precision_tokens_and_tuples():
    x = torch.cat([normal(4, 3), normal(4, 3)[:1]]).float()
    found = jacobian_conditions(mlp(outputs=1).float(), x)
    assert not found.full_row_rank and found.duplicates == ((0, 4),)
    found = jacobian_conditions(Tied().double(), torch.cat([tokens(), tokens()[1:2]]))
    assert (1, 4) in found.duplicates
    assert jacobian_conditions(mlp(), (normal(2, 3),)).full_row_rank


def test_conditions_take_the_infinite_width_kernel():
    x = nn.functional.normalize(normal(5, 4), dim=1)
    kernel = two_layer_kernel(x)
    smallest = float(torch.linalg.eigvalsh(kernel)[0])
    model = TwoLayerNetwork(4, 50000, generator=generator(), dtype=torch.float64)
    found = jacobian_conditions(model, x, kernel=kernel)
    assert found.limit_smallest_eigenvalue == pytest.approx(smallest)
    assert found.smallest_eigenvalue == pytest.approx(smallest, rel=0.1)
    wide = torch.kron(kernel, torch.eye(2).double())
    double = jacobian_conditions(mlp(4), x, kernel=wide)
    assert double.limit_smallest_eigenvalue == pytest.approx(smallest)
    with pytest.raises(ValueError, match=r"\(5, 5\) or \(10, 10\), got \(4, 4\)"):
        jacobian_conditions(mlp(4), x, kernel=kernel[:4, :4])


@given(st.integers(1, 6), st.integers(0, 50), st.floats(0.05, 0.99))
def test_gradient_descent_bound_is_the_norm_of_the_residual_map(n, seed, share):
    a = normal(n, n + 2, seed=seed)
    gram = a @ a.T
    best = convergence_bounds(gram)
    assert best.largest_step == pytest.approx(
        2 * n / float(torch.linalg.matrix_norm(gram, 2)), rel=1e-9
    )
    step = share * best.largest_step
    bound = convergence_bounds(gram, method="gd", step_size=step)
    step_map = torch.eye(n).double() - step * gram / n
    assert bound.factor == pytest.approx(float(torch.linalg.matrix_norm(step_map, 2)) ** 2)
    assert best.factor <= bound.factor + 1e-12 < 1 + 1e-12
    assert convergence_bounds(gram, samples=3 * n).largest_step == pytest.approx(
        3 * best.largest_step
    )


def test_natural_gradient_bounds():
    at_infinity = convergence_bounds(method="ngd")
    assert (at_infinity.largest_step, at_infinity.step_size, at_infinity.factor) == (1, 1, 0)
    finite = convergence_bounds(method="ngd", stability=0.25)
    assert finite.largest_step == pytest.approx(0.5 / 1.25**2)
    assert finite.factor == pytest.approx(1 - finite.largest_step)
    convex = convergence_bounds(method="ngd", strong_convexity=0.5, smoothness=2.0, step_size=0.3)
    assert convex.largest_step == pytest.approx(0.8)
    assert convex.factor == pytest.approx(1 - 2 * 0.3 * 1.0 / 2.5)


@given(st.floats(0.0, 0.49), st.integers(1, 4), st.integers(0, 50))
def test_step_of_the_theorem_contracts_under_every_allowed_disturbance(constant, n, seed):
    """r − η(I + E)r with ‖E‖ ≤ C loses at least the share η of its squared norm."""
    eta = convergence_bounds(method="ngd", stability=constant).largest_step
    disturbance = normal(n, n, seed=seed)
    disturbance *= constant / torch.linalg.matrix_norm(disturbance, 2)
    for e in (disturbance, constant * torch.eye(n), -constant * torch.eye(n)):
        r = normal(n, seed=seed + 1)
        after = r - eta * (r + e.double() @ r)
        assert after.square().sum() <= (1 - eta) * r.square().sum() * (1 + 1e-9) + 1e-12


@given(st.floats(0.1, 1.0), st.floats(1.0, 5.0), st.floats(0.01, 1.0))
def test_convex_losses_contract_at_the_bound(mu, kappa, share):
    """Quadratics with curvatures μ, κ and in between, gradient descent in the outputs."""
    largest = convergence_bounds(method="ngd", strong_convexity=mu, smoothness=kappa).largest_step
    step = share * largest
    bound = convergence_bounds(method="ngd", strong_convexity=mu, smoothness=kappa, step_size=step)
    for curvature in (mu, kappa, (mu + kappa) / 2):
        assert (1 - step * curvature) ** 2 <= bound.factor + 1e-9


def test_bounds_say_what_is_wrong():
    gram = torch.eye(2).double()
    for match, arguments in [
        ("needs the Gram matrix", {"method": "gd"}),
        ("needs the Gram matrix", {"gram": torch.ones(2, 3)}),
        ("needs the inputs", {"method": "kfac"}),
        ("'gd', 'ngd' or 'kfac'", {"method": "adam"}),
        ("positive definite", {"gram": torch.ones(2, 2)}),
        ("inputs that are zero", {"method": "kfac", "inputs": torch.eye(3)[:, :2]}),
        ("step_size must be positive and below 4", {"gram": gram, "step_size": 4.0}),
        ("step_size", {"gram": gram, "step_size": 0.0}),
        ("step_size must be positive and at most 1", {"method": "ngd", "step_size": 1.01}),
        ("stability must be", {"method": "ngd", "stability": 0.5}),
        ("strong_convexity", {"method": "ngd", "strong_convexity": 2.0}),
        ("squared loss only", {"method": "ngd", "stability": 0.1, "smoothness": 2.0}),
        ("concern method='ngd'", {"gram": gram, "stability": 0.1}),
    ]:
        with pytest.raises(ValueError, match=match):
            convergence_bounds(**arguments)


def test_generalization_bound_of_a_hand_example():
    """Orthogonal unit inputs: G∞ = I/2, so the bound is √(2·2‖y‖²/n)."""
    y = torch.tensor([1.0, -2.0, 2.0])
    kernel = two_layer_kernel(torch.eye(3))
    assert generalization_bound(kernel, y) == pytest.approx(math.sqrt(4 * 9 / 3))
    # Inputs 60 degrees apart: off-diagonal ½·(π − π/3)/2π = 1/6; y = (1, 1) is an eigenvector.
    x = torch.tensor([[1.0, 0.0], [0.5, math.sqrt(0.75)]], dtype=torch.float64)
    kernel = two_layer_kernel(x)
    assert float(kernel[0, 1]) == pytest.approx(1 / 6)
    ones = torch.ones(2, 1)
    assert generalization_bound(kernel, ones) == pytest.approx(math.sqrt(1 / (2 / 3) * 2))
    with pytest.raises(ValueError, match="divide each sample"):
        generalization_bound(two_layer_kernel(2 * x), ones)
    with pytest.raises(ValueError, match="singular"):
        generalization_bound(two_layer_kernel(x[[0, 0]]), ones)
    with pytest.raises(ValueError, match=r"shape \(3, 3\)"):
        generalization_bound(kernel, y)
