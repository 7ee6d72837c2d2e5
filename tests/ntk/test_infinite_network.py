"""Predicted training at infinite width, against dense formulas and loops."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor, nn

from natgrad import likelihoods
from natgrad.ntk import (
    Architecture,
    InfiniteNetwork,
    predict,
)
from tests import dense
from tests.cases import normal
from tests.ntk import reference
from tests.ntk.examples import (
    LAYERWISE,
    assert_follows,
    inputs,
    limit,
    mlp,
    stable_rate,
    tolerance,
)
from tests.ntk.reference import cross_entropy, squared

# -- infinite width --------------------------------------------------------------------------------


def spread(matrix: Tensor, outputs: int) -> Tensor:
    """Return a map shared by all outputs as one of all of them."""
    return torch.kron(matrix, torch.eye(outputs, dtype=torch.float64))


@pytest.mark.parametrize("structure", LAYERWISE)
@pytest.mark.parametrize("damping", [0.0, 0.02])
@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("depth", [1, 3, 4])
def test_training_of_the_infinite_network(structure, damping, outputs, depth):
    network, linear = limit(outputs, depth)
    y = normal(5, outputs, seed=2)
    dense.assert_same(network.outputs, linear.outputs, 1e-13)
    found, wanted = network.maps(structure, damping), linear.map(structure, damping)
    for own, other in zip(found, wanted, strict=True):
        dense.assert_same(spread(own, outputs), other, tolerance(structure, damping))
    lr = stable_rate(linear, structure, damping)
    wanted = linear.train(structure, 5, lr, damping, *squared(y))
    found = predict(network, y, structure, steps=5, lr=lr, damping=damping)
    assert_follows(found, wanted, tolerance(structure, damping))


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("damping", [0.0, 1e-3, 0.1])
def test_maps_of_the_infinite_network_by_their_formulas(outputs, damping):
    """The kernels' own formulas, with Kronecker products over outputs and one dense LU."""
    depth, n, m = 4, 5, 3
    network, _ = limit(outputs, depth)
    x = torch.cat([inputs(n, 6), inputs(m, 6, seed=1)])
    qs, bs = reference.relu_kernels(x, depth, 1.7, 0.1)
    eye = torch.eye(n * outputs, dtype=torch.float64)
    everywhere = torch.ones(outputs, outputs, dtype=torch.float64)
    full = [spread(q * b, outputs) / n for q, b in zip(qs, bs, strict=True)]
    size = n * outputs
    thetas, crosses = [k[:size, :size] for k in full], [k[size:, :size] for k in full]

    def check(structure: str, weights: list[Tensor]) -> None:
        found = network.maps(structure, damping)
        for own, kernels in zip(found, (thetas, crosses), strict=True):
            wanted = sum(k @ z for k, z in zip(kernels, weights, strict=True))
            dense.assert_same(spread(own, outputs), wanted, tolerance(structure, damping))

    check("gd", [eye] * depth)
    check("full", [torch.linalg.inv(sum(thetas) + damping * eye)] * depth)
    check("block_diagonal", [torch.linalg.inv(theta + damping * eye) for theta in thetas])
    sigma = torch.zeros(depth, depth, dtype=torch.float64)
    for i in range(depth):
        for j in range(depth):
            sigma[i, j] = float(abs(i - j) <= 1)
    coupled = torch.kron(sigma, eye) @ torch.block_diag(*thetas)
    coupled += damping * torch.eye(len(coupled), dtype=torch.float64)
    stacked = torch.linalg.solve(coupled, eye.repeat(depth, 1))
    check("block_tridiagonal", list(stacked.split(size)))

    wanted = [torch.zeros(size, size).double(), torch.zeros(m * outputs, size).double()]
    widths = network.architecture.widths
    for layer, (q, b) in enumerate(zip(qs, bs, strict=True)):
        b = spread(b, outputs)
        a, b_train = q[:n, :n], b[:size, :size]
        mean_a = float(a.trace()) / n / (widths[layer] + 1)
        mean_b = float(b_train.trace()) / n / widths[layer + 1]
        rho_a = math.sqrt(damping * mean_a / mean_b)
        rho_b = math.sqrt(damping * mean_b / mean_a)
        inverse_a = torch.linalg.inv(a + n * rho_a * torch.eye(n, dtype=torch.float64))
        # The last layer's B is of rank C whatever the damping.
        inverse_b = reference.invert(b_train, n * rho_b)
        for k, rows in enumerate((slice(0, n), slice(n, None))):
            wide = slice(rows.start * outputs, None if k else size)
            hats = torch.kron(q[rows, :n] @ inverse_a, everywhere)
            wanted[k] += n * hats * (b[wide, :size] @ inverse_b)
    found = network.maps("kfac", damping)
    for own, value in zip(found, wanted, strict=True):
        dense.assert_same(spread(own, outputs), value, tolerance("kfac", damping))


@pytest.mark.parametrize("structure", LAYERWISE)
@pytest.mark.parametrize("damping", [0.0, 0.02])
def test_cross_entropy_of_the_infinite_network(structure, damping):
    network, linear = limit(3)
    labels = torch.arange(5) % 3
    lr = {"gd": 0.3, "kfac": 0.05}.get(structure, 0.2)
    wanted = linear.train(structure, 3, lr, damping, *cross_entropy(labels))
    found = predict(
        network, labels, structure, steps=3, lr=lr, damping=damping, likelihood="categorical"
    )
    assert_follows(found, wanted, tolerance(structure, damping))


def test_cross_entropy_of_the_infinite_network_by_its_formulas():
    """``Θ(ΛΘ + ρI)⁻¹v`` for exact and layer-wise natural gradients, with (N·C)² matrices."""
    network, _ = limit(3)
    n, c, rho, lr = 5, 3, 0.05, 0.3
    labels = torch.arange(n) % c
    gradient, hessian = cross_entropy(labels)
    x = torch.cat([inputs(n, 6), inputs(3, 6, seed=1)])
    qs, bs = reference.relu_kernels(x, 3, 1.7, 0.1)
    kernels = [spread(q * b, c) / n for q, b in zip(qs, bs, strict=True)]
    eye = torch.eye(n * c, dtype=torch.float64)
    for structure, parts in (("full", [sum(kernels)]), ("block_diagonal", kernels)):
        f, f_test = network.outputs, network.test_outputs
        for _ in range(3):
            curvature = torch.block_diag(*hessian(f))
            moved = torch.zeros(8 * c, dtype=torch.float64)
            for kernel in parts:
                theta = kernel[: n * c, : n * c]
                weights = torch.linalg.solve(curvature @ theta + rho * eye, gradient(f).flatten())
                moved += kernel[:, : n * c] @ weights
            f = f - lr * moved[: n * c].view(n, c)
            f_test = f_test - lr * moved[n * c :].view(3, c)
        found = predict(
            network, labels, structure, steps=[3], lr=lr, damping=rho, likelihood="categorical"
        )
        dense.assert_same(found.train[0], f)
        dense.assert_same(found.test[0], f_test)


@pytest.mark.parametrize("structure", ["full", "kfac"])
def test_output_damping_of_the_infinite_network(structure):
    network, linear = limit(3)
    labels = torch.arange(5) % 3
    gradient, hessian = cross_entropy(labels)
    train_map, test_map = linear.map(structure, 0.02)
    shifted = hessian(linear.outputs) + 0.1 * torch.eye(3, dtype=torch.float64)
    newton = torch.linalg.solve(shifted, gradient(linear.outputs).unsqueeze(2)).flatten()
    found = predict(
        network, labels, structure, steps=[1], lr=0.1, damping=0.02, likelihood="categorical",
        output_damping=0.1,
    )  # fmt: skip
    dense.assert_same(found.train[0], linear.outputs - 0.1 * (train_map @ newton).view(5, 3))
    dense.assert_same(found.test[0], linear.test_outputs - 0.1 * (test_map @ newton).view(3, 3))


@pytest.mark.parametrize("scale", [5.0, 2 / 3])
@pytest.mark.parametrize("structure", LAYERWISE)
def test_scale_of_the_squared_loss_at_infinite_width(structure, scale):
    network, linear = limit(3)
    y = normal(5, 3, seed=2)
    likelihood = nn.MSELoss() if scale < 1 else likelihoods.Gaussian(variance=0.2)
    lr = 0.05 if structure == "gd" else stable_rate(linear, structure, 0.0)
    wanted = linear.train(structure, 3, lr, 0.03, *squared(y, scale))
    found = predict(network, y, structure, steps=3, lr=lr, damping=0.03, likelihood=likelihood)
    assert_follows(found, wanted)


def test_infinite_network_of_an_architecture_starts_from_zero():
    model = mlp(6, 20, 20, 2, activation="relu")
    x, x_test = inputs(5, 6), inputs(3, 6, seed=1)
    network = InfiniteNetwork(Architecture.of(model), x, x_test)
    assert network.outputs.shape == (5, 2) and not bool(network.outputs.any())
    assert network.test_outputs.shape == (3, 2) and not bool(network.test_outputs.any())
    linear = reference.infinite(x, x_test, (6, 20, 20, 2), 1.7, 0.1)
    y = normal(5, 2)
    wanted = linear.train("full", 2, 0.7, 0.1, *squared(y))
    assert_follows(predict(network, y, steps=2, lr=0.7, damping=0.1), wanted)


def test_unit_wise_of_the_infinite_network_is_a_constant():
    """γM(L − 1)/C + 1 with γ = 1/2 for ReLU, here M = 20, L = 3, C = 2."""
    model = mlp(6, 20, 20, 2, activation="relu")
    network = InfiniteNetwork(model, inputs(5, 6))
    train, test = network.maps("unit_wise")
    assert test is None
    dense.assert_same(train, 11.0 * torch.eye(5, dtype=torch.float64), 1e-13)
    y = normal(5, 2)
    found = predict(network, y, "unit_wise", steps=[2], lr=0.05)
    dense.assert_same(found.train[0], y + (1 - 0.55) ** 2 * (network.outputs - y), 1e-12)


def test_singular_kernels_are_named():
    """Equal samples, and for ReLU without biases parallel ones, leave the kernel without rank."""
    x = inputs(5, 6)
    model = mlp(6, 20, 1, activation="relu", bias=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        InfiniteNetwork(model, x)
    equal = x.clone()
    equal[3] = equal[1]
    with pytest.warns(UserWarning, match="samples 1 and 3 are equal"):
        network = InfiniteNetwork(model, equal)
    target = normal(5, 1, seed=2)
    # What the two equal samples share is learnt, their difference cannot be.
    found = predict(network, target, "full", steps=[1], lr=1.0).train[0]
    torch.testing.assert_close(found[1], found[3])
    torch.testing.assert_close(found[1], 0.5 * (target[1] + target[3]))
    torch.testing.assert_close(found[[0, 2, 4]], target[[0, 2, 4]])
    parallel = x.clone()
    parallel[4] = 2.0 * parallel[0]
    with pytest.warns(UserWarning, match="samples 0 and 4 are parallel"):
        InfiniteNetwork(model, parallel)
