"""Predicted training, against loops over the parameters of dense linear networks."""

from __future__ import annotations

import copy
import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from natgrad import likelihoods
from natgrad.ntk import (
    InfiniteNetwork,
    LinearizedNetwork,
    NetworkInFunctionSpace,
    predict,
)
from tests import dense
from tests.cases import CASES, normal
from tests.ntk import reference
from tests.ntk.examples import (
    EVERY,
    LAYERWISE,
    assert_follows,
    example,
    inputs,
    limit,
    mlp,
    stable_rate,
    tolerance,
)
from tests.ntk.reference import Linear, cross_entropy, squared

# -- the reference itself --------------------------------------------------------------------------


@pytest.mark.parametrize("standard", [False, True])
def test_reference_layers_have_the_jacobian_of_autograd(standard):
    if standard:
        model = CASES["mlp"]().model
        x = CASES["mlp"]().x
    else:
        model, x, _, _ = example()
    z, jac = dense.jacobian(model, x)
    outputs, layers = reference.chain(model, x)
    torch.testing.assert_close(outputs, z)
    rows = jac.flatten(0, 1)
    # Weight and bias are apart in the model, side by side in the reference: compare the kernels.
    where = dense.indices(model)
    kernels, names = [], list(where)
    for weight, bias in zip(names[::2], names[1::2], strict=True):
        part = rows[:, torch.cat([where[weight].flatten(), where[bias].flatten()])]
        kernels.append(part @ part.T)
    for layer, kernel in zip(layers, kernels, strict=True):
        own = layer.jacobian()
        dense.assert_same(own @ own.T, kernel)


# -- finite networks, squared loss -----------------------------------------------------------------


@pytest.mark.parametrize("structure", EVERY)
@pytest.mark.parametrize("damping", [0.0, 1e-3, 0.3])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_training_of_the_linearized_network(structure, damping, activation):
    model, x, x_test, y = example(activation=activation)
    linear = Linear.of(model, x, x_test)
    lr = stable_rate(linear, structure, damping)
    wanted = linear.train(structure, 6, lr, damping, *squared(y))
    network = LinearizedNetwork(model, x, x_test)
    found = predict(network, y, structure, steps=6, lr=lr, damping=damping)
    assert found.steps == (0, 1, 2, 3, 4, 5, 6) and found.learning_rate == lr
    assert_follows(found, wanted, tolerance(structure, damping))
    losses = 0.5 * (wanted[0] - y).square().sum((1, 2)) / len(y)
    own = max(1e-8, tolerance(structure, damping))
    dense.assert_same(found.train_loss, losses, own)
    y_test = normal(3, 2, seed=9)
    losses = 0.5 * (wanted[1] - y_test).square().sum((1, 2)) / 3
    dense.assert_same(found.test_loss(y_test), losses, own)


@given(
    depth=st.integers(1, 4),
    outputs=st.integers(1, 3),
    samples=st.integers(1, 4),
    tests=st.integers(0, 3),
    structure=st.sampled_from(EVERY),
    steps=st.lists(st.integers(0, 7), min_size=1, max_size=4),
    seed=st.integers(0, 5),
)
def test_any_shape_and_any_steps(depth, outputs, samples, tests, structure, steps, seed):
    model = mlp(3, *[6] * (depth - 1), outputs, seed=seed)
    x = inputs(samples, 3, seed)
    x_test = inputs(tests, 3, seed + 1) if tests else None
    y = normal(samples, outputs, seed=seed + 2)
    linear = Linear.of(model, x, x_test)
    lr = stable_rate(linear, structure, 0.1)
    train, test = linear.train(structure, max(steps), lr, 0.1, *squared(y))
    network = LinearizedNetwork(model, x, x_test)
    found = predict(network, y, structure, steps=steps, lr=lr, damping=0.1)
    assert found.steps == tuple(steps)
    assert_follows(found, (train[steps], None if test is None else test[steps]))


@pytest.mark.parametrize("structure", EVERY)
@pytest.mark.parametrize("damping", [0.0, 0.05])
def test_maps_of_the_linearized_network(structure, damping):
    model, x, x_test, _ = example(depth=4)
    found = LinearizedNetwork(model, x, x_test).maps(structure, damping)
    wanted = Linear.of(model, x, x_test).map(structure, damping)
    dense.assert_same(found[0], wanted[0], tolerance(structure, damping))
    dense.assert_same(found[1], wanted[1], tolerance(structure, damping))
    assert LinearizedNetwork(model, x).maps(structure, damping)[1] is None


def test_layer_kernels_and_outputs_of_the_linearized_network():
    model, x, x_test, _ = example()
    network = LinearizedNetwork(model, x, x_test)
    dense.assert_same(network.outputs, model(x).detach(), 1e-14)
    dense.assert_same(network.test_outputs, model(x_test).detach(), 1e-14)
    layers = Linear.of(model, x).layers
    kernels = network.layer_kernels()
    assert list(kernels) == ["1", "3", "5"]
    for kernel, layer in zip(kernels.values(), layers, strict=True):
        rows = layer.jacobian()
        dense.assert_same(kernel, rows @ rows.T)


@pytest.mark.parametrize("name", ["conv2d", "transformer_layer", "dictionary_output", "embedding"])
@pytest.mark.parametrize("structure", ["gd", "full", "block_diagonal", "diagonal"])
def test_training_of_any_linearized_model(name, structure):
    """Other layers than linear ones, and other inputs than a tensor."""
    case = CASES[name]()
    z, jac = case.jacobian
    rows = jac.reshape(z.numel(), -1)
    y = normal(*z.shape, seed=3)
    kernel = rows.T @ rows / len(z)
    if structure == "gd":
        inverse = torch.eye(len(kernel), dtype=torch.float64)
    else:
        kernel = dense.structured(kernel, structure, case.model, case.blocks)
        inverse = torch.linalg.inv(kernel + 0.1 * torch.eye(len(kernel), dtype=torch.float64))
    theta = torch.zeros(len(inverse), dtype=torch.float64)
    lr, path = 0.02 if structure == "gd" else 0.3, []
    for _ in range(5):
        f = z + (rows @ theta).view_as(z)
        path.append(f)
        theta = theta - lr * inverse @ rows.T @ (f - y).flatten() / len(z)
    network = LinearizedNetwork(case.model, case.x, output=case.output)
    found = predict(network, y, structure, steps=4, lr=lr, damping=0.1)
    dense.assert_same(found.train, torch.stack(path))


def test_structure_options_reach_the_structure():
    """Tikhonov damping of K-FAC, ``B ⊗ A + λI``, instead of the default."""
    model, x, x_test, _ = example()
    linear = Linear.of(model, x, x_test)
    matrix = reference.fisher(linear.layers, "kfac", reference.identity(linear.layers))
    rows, test_rows = reference.jacobian(linear.layers), reference.jacobian(linear.test_layers)
    moved = reference.invert(matrix, 0.2) @ rows.T / len(x)
    options = {"kfac": {"factored_damping": False}}
    network = LinearizedNetwork(model, x, x_test, structure_options=options)
    found = network.maps("kfac", 0.2)
    dense.assert_same(found[0], rows @ moved)
    dense.assert_same(found[1], test_rows @ moved)
    assert (linear.map("kfac", 0.2)[0] - rows @ moved).norm() > 0.01 * found[0].norm()


def test_float32_models_are_linearized_in_float64():
    model, x, x_test, y = example()
    low = copy.deepcopy(model).float()
    exact = copy.deepcopy(low).double()
    before = copy.deepcopy(low.state_dict())
    found = predict(LinearizedNetwork(low, x.float(), x_test.float()), y.float(), steps=2, lr=0.4)
    x, x_test, y = (t.float().double() for t in (x, x_test, y))
    linear = Linear.of(exact, x, x_test)
    assert_follows(found, linear.train("full", 2, 0.4, 0.0, *squared(y)), 1e-8)
    for name, value in low.state_dict().items():
        assert torch.equal(value, before[name]) and value.dtype == torch.float32


# -- the loss's scale ------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", EVERY)
@pytest.mark.parametrize("loss", ["variance", "mse", "mse_sum"])
def test_scale_of_the_squared_loss(structure, loss):
    """Λ = I/σ², and (2/C)I for nn.MSELoss, with damping in the units of F."""
    outputs = 3
    model, x, x_test, y = example(outputs, samples=4)
    likelihood, scale = {
        "variance": (likelihoods.Gaussian(variance=0.2), 5.0),
        "mse": (nn.MSELoss(), 2.0 / outputs),
        "mse_sum": (likelihoods.Gaussian(variance=3.0, reduce_outputs="mean"), 1 / (3.0 * outputs)),
    }[loss]
    linear = Linear.of(model, x, x_test)
    lr = 0.05 if structure == "gd" else stable_rate(linear, structure, 0.0)
    wanted = linear.train(structure, 4, lr, 0.02, *squared(y, scale))
    network = LinearizedNetwork(model, x, x_test)
    found = predict(network, y, structure, steps=4, lr=lr, damping=0.02, likelihood=likelihood)
    assert_follows(found, wanted)
    losses = scale * 0.5 * (wanted[0] - y).square().sum((1, 2)) / len(y)
    dense.assert_same(found.train_loss, losses, 1e-8)
    if loss == "mse":
        torch.testing.assert_close(found.train_loss[-1], nn.functional.mse_loss(wanted[0][-1], y))


def test_default_rates():
    model, x, x_test, y = example()
    linear, network = Linear.of(model, x, x_test), LinearizedNetwork(model, x, x_test)
    for structure in EVERY:
        for damping in (0.0, 0.1):
            coefficients = linear.map(structure, damping)[0]
            rate = 1 / float(coefficients.diagonal().mean())
            if structure == "gd":
                rate = 1 / float(torch.linalg.eigvalsh(coefficients).max())
            if rate > 0:
                found = predict(network, y, structure, steps=1, damping=damping)
                assert found.learning_rate == pytest.approx(rate, rel=1e-8)
    alphas = {"full": 1, "block_diagonal": 3, "block_tridiagonal": 1, "kfac": 5 * 2 + 1}
    for structure, alpha in alphas.items():
        found = predict(network, y, structure, steps=1)
        assert found.learning_rate == pytest.approx(1 / alpha, rel=1e-8)
        # One step lands on the targets.
        torch.testing.assert_close(found.train[1], y, rtol=0, atol=1e-7)


@pytest.mark.parametrize("structure", ["gd", "full", "kfac"])
@pytest.mark.parametrize("variance", [0.05, 20.0])
def test_default_rate_fits_the_likelihood(structure, variance):
    """One over the mean (or largest) coefficient of the iteration that is predicted."""
    model, x, x_test, y = example()
    linear, network = Linear.of(model, x, x_test), LinearizedNetwork(model, x, x_test)
    likelihood = likelihoods.Gaussian(variance=variance)
    found = predict(network, y, structure, steps=3, damping=0.1, likelihood=likelihood)
    # F/σ² + λI = (F + λσ²I)/σ²: the coefficients are those at damping λσ².
    coefficients = linear.map(structure, 0.1 * variance)[0]
    rate = 1 / float(coefficients.diagonal().mean())
    if structure == "gd":
        rate = variance / float(torch.linalg.eigvalsh(coefficients).max())
    assert found.learning_rate == pytest.approx(rate, rel=1e-8)
    assert float(found.train_loss[-1]) < float(found.train_loss[0])


# -- many steps and continuous time ----------------------------------------------------------------


def flow(linear: Linear, structure: str, damping: float, y: Tensor, rate: float, time: float):
    """Solve ``d(r, f')/dt = −η(Kr, K'r)`` by one matrix exponential."""
    train, test = linear.map(structure, damping)
    n, m = len(train), len(test)
    generator = torch.zeros(n + m, n + m, dtype=torch.float64)
    generator[:n, :n], generator[n:, :n] = -rate * train, -rate * test
    start = torch.cat([(linear.outputs - y).flatten(), linear.test_outputs.flatten()])
    end = torch.linalg.matrix_exp(time * generator) @ start
    return y + end[:n].view_as(y), end[n:].view_as(linear.test_outputs)


@pytest.mark.parametrize("structure", EVERY)
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_continuous_time_is_a_matrix_exponential(structure, damping):
    model, x, x_test, y = example()
    linear, network = Linear.of(model, x, x_test), LinearizedNetwork(model, x, x_test)
    times = [0.0, 0.3, 1.0, 2.5]
    found = predict(network, y, structure, steps=times, lr=0.4, damping=damping, continuous=True)
    wanted = [flow(linear, structure, damping, y, 0.4, time) for time in times]
    paths = tuple(map(torch.stack, zip(*wanted, strict=True)))
    assert_follows(found, paths, tolerance(structure, damping))
    dense.assert_same(found.train[0], linear.outputs, 1e-13)
    dense.assert_same(found.test[0], linear.test_outputs, 1e-13)


class Given(NetworkInFunctionSpace):
    """A network of given maps: K diagonal, K' of ones, and no other test output."""

    def __init__(self, values: list[float]) -> None:
        self.values = torch.tensor(values, dtype=torch.float64)
        self.outputs = torch.zeros(len(values), 1, dtype=torch.float64)
        self.test_outputs = torch.zeros(1, 1, dtype=torch.float64)

    def maps(self, structure: str, damping: float = 0.0) -> tuple[Tensor, Tensor]:
        return torch.diag(self.values), torch.ones(1, len(self.values), dtype=torch.float64)

    def change(self, *args):
        raise NotImplementedError


@pytest.mark.parametrize(
    "value", [0.0, 1e-300, 1e-17, 1e-14, 1e-11, -1e-11, 1e-7, 1e-3, -0.02, 0.3, 0.5, 0.9, 1.0, 1.7]
)
def test_eigenvalues_of_all_sizes(value):
    """``[1 − (1 − ηλ)^t]/λ`` in exact fractions, for t in one step and in forty."""
    rate = 0.75
    found = predict(Given([value, 1.0]), torch.tensor([[-1.0], [0.0]]), steps=[1, 40], lr=rate)
    base = 1 - Fraction(rate) * Fraction(value)
    for index, time in enumerate((1, 40)):
        factor = 1 - base**time
        moved = float(factor / Fraction(value)) if value else rate * time
        assert float(found.test[index]) == pytest.approx(-moved, rel=1e-12)
        assert float(found.train[index, 0]) == pytest.approx(float(base**time) - 1, abs=1e-12)
    times = [1.0, 40.0]
    found = predict(
        Given([value, 1.0]), torch.tensor([[-1.0], [0.0]]), steps=times, lr=rate, continuous=True
    )
    for index, time in enumerate(times):
        moved = -math.expm1(-rate * value * time) / value if value > 1e-290 else rate * time
        if value < 0:
            moved = math.expm1(-rate * value * time) / -value
        assert float(found.test[index]) == pytest.approx(-moved, rel=1e-12)


@pytest.mark.parametrize("structure", ["gd", "kfac", "diagonal"])
def test_continuous_time_is_the_limit_of_small_steps(structure):
    model, x, x_test, y = example()
    network = LinearizedNetwork(model, x, x_test)
    end = flow(Linear.of(model, x, x_test), structure, 0.1, y, 1.0, 0.02)
    errors = []
    for number in (100, 200, 400):
        found = predict(network, y, structure, steps=[number], lr=0.02 / number, damping=0.1)
        errors.append(
            [float((a[0] - b).norm()) for a, b in zip((found.train, found.test), end, strict=True)]
        )
    for coarse, fine in ((0, 1), (1, 2)):
        for which in (0, 1):
            assert 1.9 < errors[coarse][which] / errors[fine][which] < 2.1


def singular(kind: str):
    """Networks whose kernel is singular: duplicate samples, or fewer parameters than rows."""
    if kind == "duplicates":
        model, x, x_test, y = example()
        x = torch.cat([x[:3], x[:2]])
        return model, x, x_test, y
    return mlp(2, 1, 1, seed=3), inputs(9, 2), inputs(3, 2, seed=1), normal(9, 1, seed=2)


@pytest.mark.parametrize("kind", ["duplicates", "few parameters"])
@pytest.mark.parametrize("structure", ["gd", "full", "block_diagonal", "kfac", "diagonal"])
@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_singular_kernels(kind, structure, damping):
    model, x, x_test, y = singular(kind)
    linear, network = Linear.of(model, x, x_test), LinearizedNetwork(model, x, x_test)
    coefficients = linear.map(structure, damping)[0]
    values = torch.linalg.eigvalsh(coefficients)
    if structure != "kfac" or damping:
        assert values[0].abs() < 1e-9 * values[-1]
    lr = 0.7 / float(values[-1])
    found = predict(network, y, structure, steps=20, lr=lr, damping=damping)
    assert_follows(found, linear.train(structure, 20, lr, damping, *squared(y)), 1e-8)
    times = [0.0, 1.5]
    found = predict(network, y, structure, steps=times, lr=lr, damping=damping, continuous=True)
    wanted = [flow(linear, structure, damping, y, lr, time) for time in times]
    assert_follows(found, tuple(map(torch.stack, zip(*wanted, strict=True))), 1e-8)


@pytest.mark.parametrize("kind", ["duplicates", "few parameters"])
def test_limit_of_singular_gradient_descent(kind):
    """After 10⁹ steps: the least-squares solution, as the pseudo-inverse gives it."""
    model, x, x_test, y = singular(kind)
    linear = Linear.of(model, x, x_test)
    rows, test_rows = reference.jacobian(linear.layers), reference.jacobian(linear.test_layers)
    theta = torch.linalg.pinv(rows, rtol=1e-9) @ (y - linear.outputs).flatten()
    found = predict(LinearizedNetwork(model, x, x_test), y, "gd", steps=[10**9])
    train = linear.outputs + (rows @ theta).view_as(y)
    test = linear.test_outputs + (test_rows @ theta).view_as(linear.test_outputs)
    # A zero eigenvalue is known to 10·ε·λ_max, which grows over the steps to 10·ε·10⁹.
    dense.assert_same(found.train[0], train, 2.2e-6)
    dense.assert_same(found.test[0], test, 2.2e-6)


def test_gradient_descent_and_exact_natural_gradient_end_in_the_same_function():
    model, x, x_test, y = example()
    linear, network = Linear.of(model, x, x_test), LinearizedNetwork(model, x, x_test)
    rows, test_rows = reference.jacobian(linear.layers), reference.jacobian(linear.test_layers)
    theta = rows.T @ torch.linalg.solve(rows @ rows.T, (y - linear.outputs).flatten())
    limit = linear.test_outputs + (test_rows @ theta).view_as(linear.test_outputs)
    descent = predict(network, y, "gd", steps=[10**9])
    exact = predict(network, y, "full", steps=[1], lr=1.0)
    for found in (descent, exact):
        dense.assert_same(found.train[0], y, 1e-7)
        dense.assert_same(found.test[0], limit, 1e-7)
    other = predict(network, y, "block_diagonal", steps=[1], lr=1 / 3)
    dense.assert_same(other.train[0], y, 1e-7)
    assert (other.test[0] - limit).norm() > 0.01 * limit.norm()


@pytest.mark.parametrize(
    "structure, alpha", [("full", 1), ("block_diagonal", 3), ("block_tridiagonal", 1), ("kfac", 11)]
)
def test_rates_below_at_and_above_two_over_alpha(structure, alpha):
    model, x, x_test, y = example()
    network = LinearizedNetwork(model, x, x_test)
    start = float((network.outputs - y).norm())
    for rate in (1.9, 2.0, 2.1):
        found = predict(network, y, structure, steps=[1, 20], lr=rate / alpha)
        for index, step in enumerate((1, 20)):
            size = float((found.train[index] - y).norm())
            assert size == pytest.approx(abs(1 - rate) ** step * start, rel=1e-5)
        sign = (found.train[0] - y).flatten() @ (network.outputs - y).flatten()
        assert sign < 0  # overshoots


@pytest.mark.parametrize("outputs", [1, 2])
def test_structures_agree_on_a_single_layer(outputs):
    """One layer's block is the whole matrix, and ``A ⊗ I``: K-FAC and unit-wise are exact."""
    model, x, x_test, y = mlp(7, outputs), inputs(5, 7), inputs(3, 7, seed=1), normal(5, outputs)
    network, linear = LinearizedNetwork(model, x, x_test), Linear.of(model, x, x_test)
    for damping in (0.0, 0.1):
        wanted = linear.train("full", 4, 0.6, damping, *squared(y))
        for structure in ("full", "block_diagonal", "block_tridiagonal", "unit_wise", "kfac"):
            if structure != "kfac" or damping == 0:
                found = predict(network, y, structure, steps=4, lr=0.6, damping=damping)
                assert_follows(found, wanted, 1e-8)


# -- cross-entropy and output damping --------------------------------------------------------------


def labelled(outputs: int = 3, samples: int = 4, depth: int = 3):
    model = mlp(7, *[13] * (depth - 1), outputs)
    x, x_test = inputs(samples, 7), inputs(2, 7, seed=1)
    labels = torch.arange(samples) % outputs
    return model, x, x_test, labels


@pytest.mark.parametrize("structure", EVERY)
@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_cross_entropy_of_the_linearized_network(structure, damping):
    """Λ_t and the Fisher matrix are made anew at every step's outputs."""
    model, x, x_test, labels = labelled()
    linear, network = Linear.of(model, x, x_test), LinearizedNetwork(model, x, x_test)
    lr = {"gd": 0.3, "kfac": 0.05, "unit_wise": 0.02, "diagonal": 0.002}.get(structure, 0.2)
    wanted = linear.train(structure, 3, lr, damping, *cross_entropy(labels))
    found = predict(
        network, labels, structure, steps=3, lr=lr, damping=damping, likelihood="categorical"
    )
    assert_follows(found, wanted, tolerance(structure, damping))
    losses = [nn.functional.cross_entropy(f, labels) for f in wanted[0]]
    dense.assert_same(found.train_loss, torch.stack(losses), 1e-8)
    losses = [nn.functional.cross_entropy(f, labels[:2]) for f in wanted[1]]
    dense.assert_same(found.test_loss(labels[:2]), torch.stack(losses), 1e-8)
    few = predict(
        network, labels, structure, steps=[3, 1], lr=lr, damping=damping, likelihood="categorical"
    )
    assert_follows(few, (wanted[0][[3, 1]], wanted[1][[3, 1]]), tolerance(structure, damping))


def weighted(labels: Tensor, weights: Tensor):
    """Return gradient, Hessian (per unit of count / N) and mean of torch's own cross-entropy."""

    def total(f: Tensor, reduction: str = "sum") -> Tensor:
        return nn.functional.cross_entropy(f, labels, weight=weights, reduction=reduction)

    def gradient(f: Tensor) -> Tensor:
        f = f.clone().requires_grad_()
        return torch.autograd.grad(total(f), f)[0] * share

    def hessian(f: Tensor) -> Tensor:
        full = torch.autograd.functional.hessian(total, f)
        return torch.stack([full[n, :, n] for n in range(len(f))]) * share

    kept = labels[labels >= 0]
    share = len(labels) / float(weights[kept].sum())
    return gradient, hessian, lambda f: total(f, "mean")


@pytest.mark.parametrize("structure", LAYERWISE)
@pytest.mark.parametrize("infinite", [False, True])
def test_class_weights_and_ignored_samples(structure, infinite):
    """The mean divides by the weights of the samples that count."""
    weights = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, -100, 1])
    likelihood = likelihoods.Categorical(class_weights=weights)
    if infinite:
        network, linear = limit(3)
    else:
        model, x, x_test, _ = labelled(3, 5)
        network, linear = LinearizedNetwork(model, x, x_test), Linear.of(model, x, x_test)
    gradient, hessian, mean = weighted(labels, weights)
    wanted = linear.train(structure, 3, 0.1, 0.05, gradient, hessian)
    found = predict(
        network, labels, structure, steps=3, lr=0.1, damping=0.05, likelihood=likelihood
    )
    assert_follows(found, wanted)
    dense.assert_same(found.train_loss, torch.stack([mean(f) for f in wanted[0]]), 1e-8)


@pytest.mark.parametrize("structure", ["gd", "full", "block_diagonal"])
def test_cross_entropy_of_every_token(structure):
    """Outputs (N, T, C) of a language model: the mean is over tokens."""
    case = CASES["language_model"]()
    z, jac = case.jacobian
    rows, y, loss = jac.reshape(z.numel(), -1), case.target("categorical"), case.loss("categorical")
    count = loss.count(z, y)
    assert count == z.shape[0] * z.shape[1]
    f, theta = z, torch.zeros(rows.shape[1], dtype=torch.float64)
    for _ in range(3):
        step = rows.T @ dense.output_gradient(loss, f, y).flatten() / count
        if structure != "gd":
            matrix = rows.T @ dense.output_hessian(loss, f, y) @ rows / count
            matrix = dense.structured(matrix, structure, case.model, case.blocks)
            step = reference.invert(matrix, 0.1) @ step
        theta = theta - 0.3 * step
        f = z + (rows @ theta).view_as(z)
    network = LinearizedNetwork(case.model, case.x)
    found = predict(
        network, y, structure, steps=[3, 0, 3], lr=0.3, damping=0.1, likelihood="categorical"
    )
    dense.assert_same(found.train, torch.stack([f, z, f]))
    assert float(found.train_loss[0]) == pytest.approx(float(loss.total(f, y)) / count, rel=1e-10)


@pytest.mark.parametrize("structure", ["gd", "full", "block_diagonal", "kfac"])
def test_bernoulli_outputs(structure):
    model, x, x_test, _ = labelled(2)
    y = (normal(4, 2, seed=4) > 0).double()
    linear, network = Linear.of(model, x, x_test), LinearizedNetwork(model, x, x_test)

    def gradient(f: Tensor) -> Tensor:
        return 1 / (1 + (-f).exp()) - y

    def hessian(f: Tensor) -> Tensor:
        p = 1 / (1 + (-f).exp())
        return torch.diag_embed(p * (1 - p))

    wanted = linear.train(structure, 3, 0.1, 0.02, gradient, hessian)
    found = predict(network, y, structure, steps=3, lr=0.1, damping=0.02, likelihood="bernoulli")
    assert_follows(found, wanted)


@pytest.mark.parametrize("structure", ["full", "block_diagonal", "kfac", "unit_wise"])
@pytest.mark.parametrize("output_damping", [0.0, 0.1])
@pytest.mark.parametrize("damping", [0.0, 0.05])
def test_damped_newton_steps_of_the_outputs(structure, output_damping, damping):
    model, x, x_test, labels = labelled()
    linear, network = Linear.of(model, x, x_test), LinearizedNetwork(model, x, x_test)
    train_map, test_map = linear.map(structure, damping)
    gradient, hessian = cross_entropy(labels)
    lr = 0.5 / float(train_map.diagonal().mean())
    f, f_test = linear.outputs, linear.test_outputs
    train, test = [f], [f_test]
    for _ in range(3):
        newton = []
        for curvature, slope in zip(hessian(f), gradient(f), strict=True):
            damped = curvature + output_damping * torch.eye(3, dtype=torch.float64)
            newton.append((torch.linalg.inv(damped) if output_damping else torch.linalg.pinv(
                damped, rtol=1e-12, hermitian=True)) @ slope)  # fmt: skip
        step = lr * torch.cat(newton)
        f = f - (train_map @ step).view_as(f)
        f_test = f_test - (test_map @ step).view_as(f_test)
        train.append(f), test.append(f_test)
    found = predict(
        network, labels, structure, steps=3, lr=lr, damping=damping, likelihood="categorical",
        output_damping=output_damping,
    )  # fmt: skip
    assert_follows(found, (torch.stack(train), torch.stack(test)), tolerance(structure, damping))


def test_damped_newton_steps_are_decoupled_where_the_map_is_isotropic():
    """``f ← f − η(Λ + ρI)⁻¹v``, sample by sample, whatever the network."""
    model, x, _, labels = labelled()
    network = LinearizedNetwork(model, x)
    gradient, hessian = cross_entropy(labels)
    f = network.outputs
    for _ in range(3):
        shifted = hessian(f) + 0.2 * torch.eye(3, dtype=torch.float64)
        f = f - 0.6 * torch.linalg.solve(shifted, gradient(f).unsqueeze(2))[..., 0]
    for structure, alpha in (("full", 1), ("block_diagonal", 3), ("kfac", 4 * 2 + 1)):
        found = predict(
            network, labels, structure, steps=[3], lr=0.6 / alpha, likelihood="categorical",
            output_damping=0.2,
        )  # fmt: skip
        dense.assert_same(found.train[0], f, 1e-7)


def test_output_damping_of_the_squared_loss_shrinks_the_step():
    model, x, x_test, y = example()
    linear, network = Linear.of(model, x, x_test), LinearizedNetwork(model, x, x_test)
    train_map, test_map = linear.map("kfac", 0.1)
    residual = (linear.outputs - y).flatten()
    found = predict(network, y, "kfac", steps=[1], lr=0.05, damping=0.1, output_damping=0.25)
    step = 0.05 * residual / 1.25
    dense.assert_same(found.train[0], linear.outputs - (train_map @ step).view_as(y))
    dense.assert_same(found.test[0], linear.test_outputs - (test_map @ step).view(3, 2))


# -- errors ----------------------------------------------------------------------------------------


def test_errors():
    model, x, x_test, y = example()
    network = LinearizedNetwork(model, x, x_test)
    infinite = InfiniteNetwork(model, x, x_test)
    labels = torch.arange(5) % 2
    with pytest.raises(TypeError, match="LinearizedNetwork"):
        predict(model, y)
    with pytest.raises(ValueError, match="structure must be one of.*gd.*'nonsense'"):
        predict(network, y, "nonsense")
    with pytest.raises(ValueError, match="lr"):
        predict(network, y, lr=-0.1)
    with pytest.raises(ValueError, match="lr"):
        predict(network, y, lr=float("nan"))
    with pytest.raises(ValueError, match="squared loss"):
        predict(network, labels, likelihood="categorical", lr=0.1, continuous=True)
    with pytest.raises(ValueError, match="LinearizedNetwork"):
        infinite.maps("unit_wise")
    with pytest.raises(ValueError, match="LinearizedNetwork"):
        InfiniteNetwork(model, x).maps("unit_wise", 0.1)
    with pytest.raises(ValueError, match="LinearizedNetwork"):
        infinite.maps("diagonal")
    with pytest.raises(ValueError, match="LinearizedNetwork"):
        predict(infinite, labels, "unit_wise", lr=0.1, likelihood="categorical")
    for steps in (1.5, [0.5], [-1], -1, [], [float("inf")], [float("nan")]):
        with pytest.raises((ValueError, TypeError)):
            predict(network, y, steps=steps)
    with pytest.raises(ValueError, match="whole"):
        predict(network, y, steps=[0.5])
    for structure, value in (("gd", 0.1), ("full", -0.1)):
        with pytest.raises(ValueError, match="output_damping"):
            predict(network, labels, structure, lr=0.1, likelihood="categorical",
                    output_damping=value)  # fmt: skip
    with pytest.raises(ValueError, match="test"):
        predict(LinearizedNetwork(model, x), y).test_loss(y)


@pytest.mark.parametrize("network", [LinearizedNetwork, InfiniteNetwork])
def test_bad_damping_is_refused(network):
    model, x, x_test, y = example()
    view = network(model, x, x_test)
    for damping, structure in itertools.product((-0.1, math.nan, math.inf), LAYERWISE[1:]):
        options = {"lr": 0.1, "damping": damping}
        with pytest.raises(ValueError, match="damping"):
            predict(view, y, structure, **options)
        with pytest.raises(ValueError, match="damping"):
            predict(view, torch.arange(5) % 2, structure, likelihood="categorical", **options)


@pytest.mark.parametrize("network", [LinearizedNetwork, InfiniteNetwork])
def test_targets_of_another_shape_are_refused(network):
    """Instead of being broadcast against the outputs."""
    view = network(mlp(7, 12, 1), inputs(5, 7))
    for shape in ((5,), (5, 3), (1, 1), (4, 1)):
        with pytest.raises(ValueError, match=r"\(5, 1\)"):
            predict(view, torch.zeros(shape).double(), steps=1, lr=0.5)


@pytest.mark.parametrize("structure, rate", [("block_diagonal", 5.0), ("gd", 50.0)])
def test_divergence_is_infinite_and_not_undefined(structure, rate):
    """Outputs of both signs may overflow, but the loss is infinite, not NaN."""
    model, x, x_test, y = example()
    network = LinearizedNetwork(model, x, x_test)
    found = predict(network, y, structure, lr=rate, steps=[10, 10**5])
    assert float(found.train_loss[0]) > 1e3 and found.train[0].isfinite().all()
    assert float(found.train_loss[1]) == float("inf")


def test_no_learning_rate():
    """lr = 0 is no change at all, and times of 0 are the start."""
    model, x, x_test, y = example()
    for network in (LinearizedNetwork(model, x, x_test), InfiniteNetwork(model, x, x_test)):
        for structure in LAYERWISE:
            found = predict(network, y, structure, lr=0.0, steps=[0, 7, 10**9], damping=0.1)
            for train, test in zip(found.train, found.test, strict=True):
                dense.assert_same(train, network.outputs, 1e-13)
                dense.assert_same(test, network.test_outputs, 1e-13)


@pytest.mark.parametrize("depth", [2, 5])
def test_singular_depths_of_the_tridiagonal_form(depth):
    model, x, x_test, y = example(1, depth)
    for network in (LinearizedNetwork(model, x, x_test), InfiniteNetwork(model, x, x_test)):
        with pytest.raises(ValueError, match=f"{depth} layers.*singular"):
            predict(network, y, "block_tridiagonal", lr=0.1)
        assert predict(network, y, "block-tridiagonal", lr=0.1, damping=0.5).train.isfinite().all()


def test_other_names_of_structures():
    model, x, x_test, y = example()
    linear, network = Linear.of(model, x, x_test), LinearizedNetwork(model, x, x_test)
    for alias, name in (
        ("exact", "full"), ("gradient-descent", "gd"), ("block-diagonal", "block_diagonal"),
    ):  # fmt: skip
        found = predict(network, y, alias, steps=2, lr=0.05, damping=0.1)
        assert_follows(found, linear.train(name, 2, 0.05, 0.1, *squared(y)))


def test_models_are_left_as_they_were():
    model = nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.3), nn.Linear(5, 2)
    ).double()
    model(normal(6, 4)).sum().backward()
    before = copy.deepcopy(model.state_dict())
    gradients = [p.grad.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    model.eval()
    model[3].train()
    network = LinearizedNetwork(model, normal(5, 4), normal(2, 4, seed=1))
    predict(network, normal(5, 2), "kfac", steps=2, damping=0.1)
    assert torch.equal(torch.get_rng_state(), state)
    assert model[3].training and not model[1].training and not model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_missing_targets_are_refused_where_all_outputs_are_trained(value):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    network, target = LinearizedNetwork(model, normal(5, 3)), normal(5, 2)
    target[1, 0] = value
    for structure in ("gd", "full"):
        with pytest.raises(ValueError, match="NaN or infinite"):
            predict(network, target, structure, damping=0.1)
