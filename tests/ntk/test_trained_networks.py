"""Trained networks against prediction, and the published figures."""

from __future__ import annotations

import functools
import math
import os

import pytest
import torch
from torch import Tensor, nn

import natgrad
from natgrad.ntk import (
    MLP,
    InfiniteNetwork,
    LinearizedNetwork,
    predict,
)
from tests.cases import normal
from tests.methods import make_optimizer
from tests.ntk import reference
from tests.ntk.examples import inputs, mlp, slope

# -- wide networks ---------------------------------------------------------------------------------


@functools.lru_cache(maxsize=48)
def wide(width: int, seed: int) -> LinearizedNetwork:
    """Return a network at its first parameters."""
    model = mlp(6, width, width, 1, activation="relu", bias=0.1, seed=seed)
    return LinearizedNetwork(model, inputs(5, 6), inputs(3, 6, seed=1))


@functools.cache
def infinite(width: int) -> InfiniteNetwork:
    """Return the infinite one of their kind, whose maps are the same for all seeds."""
    model = mlp(6, width, width, 1, activation="relu", bias=0.1, seed=0)
    return InfiniteNetwork(model, inputs(5, 6), inputs(3, 6, seed=1))


@pytest.mark.parametrize(
    "structure, damping",
    [
        ("gd", 0.0),
        ("full", 0.0),
        ("full", 0.02),
        ("block_diagonal", 0.0),
        ("block_diagonal", 0.02),
        ("block_tridiagonal", 0.02),
        ("kfac", 0.02),
    ],
)
def test_wide_networks_approach_the_infinite_one(structure, damping):
    """Maps differ by O(1/√M); the error is a root mean square over seeds."""
    widths, seeds = [128, 256, 512, 1024], 12 if structure == "kfac" else 6
    errors: list[list[float]] = []
    for width in widths:
        squares = torch.zeros(2, dtype=torch.float64)
        wanted = infinite(width).maps(structure, damping)
        for seed in range(seeds):
            found = wide(width, seed).maps(structure, damping)
            for k, (own, other) in enumerate(zip(found, wanted, strict=True)):
                squares[k] += (own - other).square().sum() / other.square().sum() / seeds
        errors.append(squares.sqrt().tolist())
    for k, which in enumerate(("train", "test")):
        own = [error[k] for error in errors]
        if which == "train" and damping == 0 and structure != "gd":
            assert max(own) < 1e-9  # both are αI
            continue
        assert -0.75 < slope(widths, own) < -0.3, (which, own)
        assert own[-1] < 5 / widths[-1] ** 0.5, (which, own)


#: Inputs of networks that train, for training and for tests.
X, X_TEST = inputs(12, 20), inputs(4, 20, seed=1)


def to_train(width: int, seed: int) -> nn.Module:
    return mlp(20, width, width, 1, activation="relu", bias=0.0, seed=seed)


@functools.lru_cache(maxsize=32)
def linearized(width: int, seed: int) -> LinearizedNetwork:
    """Return a network that trains as it is at first."""
    return LinearizedNetwork(to_train(width, seed), X, X_TEST)


OPTIMIZERS = {
    "full": natgrad.ExactNGD,
    "block_diagonal": natgrad.BlockDiagonalNGD,
    "block_tridiagonal": natgrad.BlockTridiagonalNGD,
    "kfac": natgrad.KFAC,
    "unit_wise": natgrad.UnitWiseNGD,
}


def trained(
    model: nn.Module, y: Tensor, structure: str, lr: float, damping: float
) -> tuple[Tensor, Tensor]:
    """Train a model for three steps by a real optimizer; return its outputs at every step."""
    if structure == "gd":
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    else:
        optimizer = make_optimizer(
            OPTIMIZERS[structure], model, "gaussian", lr=lr, damping=damping, momentum=0.0,
            kl_clip=None, decay=0.0, factors=1, inverses=1, fisher="exact",
        )  # fmt: skip
    train, test = [], []
    for step in range(4):
        with torch.no_grad():
            train.append(model(X))
            test.append(model(X_TEST))
        if step < 3:
            optimizer.zero_grad()
            (0.5 * (model(X) - y).square().sum() / len(X)).backward()
            optimizer.step()
    return torch.stack(train), torch.stack(test)


@pytest.mark.slow
@pytest.mark.parametrize("structure", ["gd", *OPTIMIZERS])
def test_trained_networks_follow_the_prediction(structure):
    """Real networks, real optimizers, lr = 1/α: the prediction is off by O(1/√M).

    A unit's gradient can be close to zero, and the undamped step of unit-wise natural gradients
    divides by it. So they get damping far below the blocks' typical eigenvalues, of order 1/M.
    """
    widths, seeds = [64, 256, 512], 4
    y = normal(len(X), 1, seed=2)
    errors = []
    for width in widths:
        damping = 0.1 / width if structure == "unit_wise" else 0.0
        total = 0.0
        for seed in range(seeds):
            predicted = predict(linearized(width, seed), y, structure, steps=3, damping=damping)
            rate = predicted.learning_rate
            train, test = trained(to_train(width, seed), y, structure, rate, damping)
            difference = torch.cat([train - predicted.train, test - predicted.test], 1)
            total += float(difference.square().mean() / (train[0] - y).square().mean())
            if structure not in ("gd", "unit_wise"):  # αI, so one step lands on the targets
                torch.testing.assert_close(predicted.train[1], y, rtol=0, atol=1e-5)
        errors.append(math.sqrt(total / seeds))
    # The tangent kernel of gradient descent may move less than the bound, by 1/M.
    assert (-1.1 if structure == "gd" else -0.9) < slope(widths, errors) < -0.35, errors
    assert errors[-1] < 2 / widths[-1] ** 0.5, errors


# -- the published figure --------------------------------------------------------------------------


def two_classes(x: Tensor, labels: Tensor, samples: int = 100) -> tuple[Tensor, Tensor]:
    """Return samples of classes 0 and 1 with ‖x‖ = 1, and targets ±½."""
    keep = [(labels == c).nonzero()[: samples // 2, 0] for c in (0, 1)]
    chosen = x.flatten(1).double()[torch.cat(keep)]
    chosen = chosen / chosen.norm(dim=1, keepdim=True)
    y = torch.cat([torch.full((samples // 2, 1), v, dtype=torch.float64) for v in (-0.5, 0.5)])
    return chosen, y


def exact_losses(x: Tensor, y: Tensor, width: int, steps: int = 2) -> list[float]:
    """Train three layers by exact natural gradient descent with η = 1; return the losses."""
    torch.manual_seed(0)
    model = MLP((x.shape[1], width, width, 1), "relu", 2.0, dtype=x.dtype)
    optimizer = natgrad.ExactNGD(
        model, "gaussian", lr=1.0, damping=0.0, momentum=0.0, kl_clip=None, fisher="exact"
    )
    losses = []
    for step in range(steps + 1):
        optimizer.zero_grad()
        loss = 0.5 * (model(x) - y).square().sum() / len(x)
        losses.append(float(loss.detach()))
        if step < steps:
            loss.backward()
            optimizer.step()
    return losses


def digits(samples: int) -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return two_classes(torch.tensor(data.data), torch.tensor(data.target), samples)


def test_two_steps_of_exact_natural_gradient_on_digits():
    """Karakida & Osawa (2020): the loss falls by orders of magnitude in each step."""
    losses = exact_losses(*digits(20), 1024)
    assert 0.12 < losses[0] < 0.2
    assert losses[1] < 1e-2 * losses[0] and losses[2] < 1e-2 * losses[1]


def test_exact_natural_gradient_on_digits_is_the_dense_iteration():
    """``Δθ = −Jᵀ(JJᵀ)⁻¹(f − y)`` with the rows of the present parameters, in samples' space."""
    x, y = digits(100)
    torch.manual_seed(0)
    model = MLP((64, 1024, 1024, 1), "relu", 2.0, dtype=torch.float64)
    wanted = []
    for _ in range(3):
        f, layers = reference.chain(model, x)
        wanted.append(0.5 * float((f - y).square().mean()))
        kernel = torch.zeros(100, 100, dtype=torch.float64)
        for layer in layers:
            delta = layer.gradients[:, 0]
            kernel += (delta @ delta.T) * (layer.inputs @ layer.inputs.T)
        weights = torch.linalg.solve(kernel, f - y)
        with torch.no_grad():
            for module, layer in zip(model[1::2], layers, strict=True):
                module.weight -= (layer.gradients[:, 0] * weights).T @ layer.inputs
    assert wanted[1] < 1e-2 * wanted[0] and wanted[2] < 0.1 * wanted[1]
    assert exact_losses(x, y, 1024) == pytest.approx(wanted, rel=1e-8)


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("NATGRAD_DATA"), reason="NATGRAD_DATA names no data folder")
def test_published_losses_of_exact_natural_gradient_on_mnist():
    """MNIST 0 and 1, N = 100, three layers of width 4096: 0.134, then 2e-4, then 1e-7."""
    from natgrad.experiments.data import load_dataset
    from natgrad.experiments.formats import DataError

    try:
        data = load_dataset("mnist", os.environ["NATGRAD_DATA"])
    except DataError as error:
        pytest.skip(str(error))
    x, y = two_classes(data.train_inputs, data.train_labels)
    losses = exact_losses(x, y, 4096)
    assert 0.12 < losses[0] < 0.15
    assert 2e-5 < losses[1] < 2e-3
    assert 1e-8 < losses[2] < 1e-6
