"""Small networks and inputs that the tests of the theory kit share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from natgrad.ntk import MLP, InfiniteNetwork
from tests import dense
from tests.cases import normal
from tests.ntk import reference
from tests.ntk.reference import Linear

LAYERWISE = ["gd", "full", "block_diagonal", "block_tridiagonal", "kfac"]
EVERY = [*LAYERWISE, "unit_wise", "diagonal"]


def mlp(*widths: int, activation: str = "tanh", bias: float = 0.1, seed: int = 0) -> MLP:
    torch.manual_seed(seed)
    return MLP(widths, activation, 1.7, bias, dtype=torch.float64)


def inputs(samples: int, dim: int, seed: int = 0) -> Tensor:
    """Samples with ‖x‖² = dim."""
    x = normal(samples, dim, seed=seed)
    return x * math.sqrt(dim) / x.norm(dim=1, keepdim=True)


def slope(widths: list[int], errors: list[float]) -> float:
    """Fit the exponent of errors as a power of the width."""
    x = torch.tensor(widths, dtype=torch.float64).log()
    y = torch.tensor(errors, dtype=torch.float64).log()
    x = x - x.mean()
    return float(x @ y / (x @ x))


def example(outputs: int = 2, depth: int = 3, activation: str = "tanh", samples: int = 5):
    """A network wider than its N·C rows, training inputs, test inputs and targets."""
    model = mlp(7, *[12] * (depth - 1), outputs, activation=activation)
    x, x_test = inputs(samples, 7), inputs(3, 7, seed=1)
    return model, x, x_test, normal(samples, outputs, seed=2)


def stable_rate(linear: Linear, structure: str, damping: float) -> float:
    """A rate of the order of 1/α."""
    coefficients, _ = linear.map(structure, damping)
    return 0.7 / float(torch.linalg.eigvalsh(coefficients).abs().max())


def tolerance(structure: str, damping: float) -> float:
    """Bound relative errors by 10·ε·κ of what is inverted.

    Undamped, κ is up to 2e5 for K-FAC's factors and 1e8 for the blocks of units.
    """
    if damping:
        return 1e-9
    return {"kfac": 4e-10, "unit_wise": 2.4e-7}.get(structure, 1e-10)


def assert_follows(found, wanted: tuple[Tensor, Tensor | None], tolerance: float = 1e-9) -> None:
    train, test = wanted
    dense.assert_same(found.train, train, tolerance)
    if test is None:
        assert found.test is None
    else:
        dense.assert_same(found.test, test, tolerance)


def limit(outputs: int, depth: int = 3, bias: float = 0.1):
    """An infinite ReLU network in both forms: natgrad's, and one with explicit parameters."""
    widths = (6, *[20] * (depth - 1), outputs)
    model = mlp(*widths, activation="relu", bias=bias)
    x, x_test = inputs(5, 6), inputs(3, 6, seed=1)
    linear = reference.infinite(
        x, x_test, widths, 1.7, bias, model(x).detach(), model(x_test).detach()
    )
    return InfiniteNetwork(model, x, x_test), linear
