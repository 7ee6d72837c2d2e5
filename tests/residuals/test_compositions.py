"""What is put around networks and losses: each trained by ResidualNGD to a known solution."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from natgrad import ResidualNGD
from natgrad.residuals import Residual, Sine, TaylorNetwork, register_activation
from tests import dense
from tests.residuals.test_residuals import flat, perceptron

PI = math.pi


def line(count: int, low: float = -1.0, high: float = 1.0) -> Tensor:
    """Return evenly spaced points ``(N, 1)``."""
    return torch.linspace(low, high, count, dtype=torch.float64).unsqueeze(1)


def error(network: nn.Module, x: Tensor, known: Tensor) -> float:
    with torch.no_grad():
        return float((network(x) - known).norm() / known.norm())


def train(optimizer: ResidualNGD, steps: int, before: Callable[[], None] | None = None) -> None:
    for _ in range(steps):
        if before is not None:
            before()
        optimizer.step()
        if optimizer.last.loss_after < 1e-13:
            return


class Clamped(nn.Module):
    """A network that is 0 at −1 and 1: ``(1 − x²) N(x)``."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return (1 - x.square()) * self.network(x)


def test_hard_constraints_of_a_module_and_by_the_product_rule():
    """u'' = −π² sin πx: the module's steps are those of a residual that spells the product out."""
    plain, other = perceptron([1, 12, 1]), perceptron([1, 12, 1])

    def of_module(u, x):
        return torch.func.hessian(u)(x)[0, 0] + PI**2 * torch.sin(PI * x)

    def of_product(n, x):
        second = (1 - x**2) * n.second[0] - 4 * x * n.first[0] - 2 * n.value
        return second + PI**2 * torch.sin(PI * x)

    x = line(30)
    clamped = Clamped(plain)
    optimizer = ResidualNGD(clamped, Residual(of_module, x))
    spelled = ResidualNGD(TaylorNetwork(other, second=[(0, 0)]), Residual(of_product, x))
    for _ in range(3):
        assert optimizer.step() == pytest.approx(spelled.step(), rel=1e-9)
        dense.assert_same(flat(plain), flat(other), 1e-8)
    train(optimizer, 35)
    with torch.no_grad():
        assert not clamped(torch.tensor([[-1.0], [1.0]], dtype=torch.float64)).any()
    assert error(clamped, line(101), torch.sin(PI * line(101))) < 1e-6


def features(frequencies: Tensor, phases: Tensor) -> nn.Sequential:
    """Return ``sin(Bx + b)`` with B and b fixed."""
    layer = nn.Linear(frequencies.shape[1], len(frequencies), dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(frequencies)
        layer.bias.copy_(phases)
    return nn.Sequential(layer.requires_grad_(False), Sine())


def test_fourier_features_are_a_frozen_layer():
    """u'' = −(6π)² sin 6πx, which a tanh network of this size does not find."""
    torch.manual_seed(0)
    frequencies = 3 * PI * torch.randn(8, 1, dtype=torch.float64)
    sines, cosines = torch.zeros(8).double(), torch.full((8,), PI / 2).double()
    embedding = features(torch.cat([frequencies] * 2), torch.cat([sines, cosines]))
    errors = []
    for network in (
        nn.Sequential(embedding, *perceptron([16, 10, 1])), perceptron([1, 18, 1])
    ):  # fmt: skip
        model = TaylorNetwork(network, second=[(0, 0)])
        ends = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
        residuals = {
            "equation": Residual(
                lambda u, x: u.second[0] / (6 * PI) ** 2 + torch.sin(6 * PI * x), line(120)
            ),
            "ends": Residual(lambda u, x: u.value, ends),
        }
        train(ResidualNGD(model, residuals), 60)
        errors.append(error(network, line(301), torch.sin(6 * PI * line(301))))
    assert torch.equal(embedding[0].weight, torch.cat([frequencies] * 2))
    assert errors[0] < 1e-4 < errors[1]


class PeriodicInput(nn.Module):
    """``(x, t) ↦ (cos πx, sin πx, t)``: whatever follows has period 2 in x."""

    def forward(self, points: Tensor) -> Tensor:
        x, t = points.split(1, -1)
        return torch.cat([torch.cos(PI * x), torch.sin(PI * x), t], -1)


def test_periodic_embeddings_need_no_boundary_condition():
    """u_t = u_xx/π² from sin πx is ``e^{-t} sin πx``."""
    network = nn.Sequential(PeriodicInput(), *perceptron([3, 8, 1]))
    generator = torch.Generator().manual_seed(0)
    inside = torch.rand(100, 2, generator=generator, dtype=torch.float64)
    inside[:, 0] = 2 * inside[:, 0] - 1
    start = torch.cat([line(25), torch.zeros(25, 1)], 1)

    def heat(u, x):
        return torch.func.jacrev(u)(x)[0, 1] - torch.func.hessian(u)(x)[0, 0, 0] / PI**2

    residuals = {
        "equation": Residual(heat, inside),
        "start": Residual(lambda u, x: u(x) - torch.sin(PI * x[:1]), start, weight=10.0),
    }
    train(ResidualNGD(network, residuals), 25)
    known = (-inside[:, 1:]).exp() * torch.sin(PI * inside[:, :1])
    assert error(network, inside, known) < 1e-4
    with torch.no_grad():
        shifted = network(inside + torch.tensor([2.0, 0.0]))
        torch.testing.assert_close(shifted, network(inside), rtol=0, atol=1e-13)


def test_embeddings_that_differ_by_column_propagate_their_derivatives():
    """The activation of the guide, ``(πx + π/2, πx, t) ↦ (cos πx, sin πx, t)``."""

    class Columns(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return torch.cat([z[..., :2].sin(), z[..., 2:]], -1)

    def derivatives(module: nn.Module, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        angles, rest = z[..., :2], z[..., 2:]
        slopes = torch.cat([angles.cos(), torch.ones_like(rest)], -1)
        return module(z), slopes, torch.cat([-angles.sin(), torch.zeros_like(rest)], -1)

    register_activation(Columns, derivatives)
    frozen = nn.Linear(2, 3).double().requires_grad_(False)
    frozen.weight.copy_(torch.tensor([[PI, 0], [PI, 0], [0, 1]], dtype=torch.float64))
    frozen.bias.copy_(torch.tensor([PI / 2, 0, 0], dtype=torch.float64))
    inner, x = perceptron([3, 8, 1]), torch.randn(20, 2, dtype=torch.float64)
    u = TaylorNetwork(nn.Sequential(frozen, Columns(), *inner), second=[(0, 0), (0, 1)])
    found = u.derivatives(x)
    plain = nn.Sequential(PeriodicInput(), *inner)
    hessians = torch.func.vmap(torch.func.hessian(plain))(x)[:, 0]
    first = torch.func.vmap(torch.func.jacrev(plain))(x)[:, 0]
    torch.testing.assert_close(found.value, plain(x), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.first[..., 0], first, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.second[..., 0], hessians[:, 0], rtol=1e-9, atol=1e-12)


def poisson_parts(weighted: bool) -> dict[str, Residual]:
    """Return u'' = −π² sin πx with u = 0 at both ends; data are weights of points."""
    ends = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)

    def equation(u, x, *root):
        value = u.second[0] + PI**2 * torch.sin(PI * x)
        return root[0] * value if root else value

    ones = torch.ones(30, 1, dtype=torch.float64) if weighted else None
    return {
        "equation": Residual(equation, line(30), ones),
        "ends": Residual(lambda u, x: u.value, ends),
    }


def test_weights_of_parts_that_follow_their_losses():
    """Every tenth step the weights make the losses of parts equal."""
    network = perceptron([1, 12, 1])
    residuals = poisson_parts(False)
    optimizer = ResidualNGD(TaylorNetwork(network, second=[(0, 0)]), residuals)
    count = 0

    def balance() -> None:
        nonlocal count
        if count % 10 == 0:
            losses = {n: float(v.square().mean()) for n, v in optimizer.rows.values().items()}
            for name, residual in residuals.items():
                residual.weight = min(1e3, max(losses.values()) / (losses[name] + 1e-30))
        count += 1

    for _ in range(60):
        balance()
        optimizer.step()
        assert optimizer.last.loss_after <= optimizer.last.loss
    assert residuals["ends"].weight != 1.0
    assert error(network, line(101), torch.sin(PI * line(101))) < 1e-5


def test_weights_of_points_are_data():
    """The step with data √w is that of residuals times √w; here w follows the residuals."""
    network = perceptron([1, 12, 1])
    residuals = poisson_parts(True)
    optimizer = ResidualNGD(
        TaylorNetwork(network, second=[(0, 0)]), residuals, acceleration=False, damping=1e-3
    )
    weights = torch.ones(30, 1, dtype=torch.float64)
    equation = residuals["equation"]

    def attend() -> None:
        nonlocal weights
        root = equation.data
        sizes = (optimizer.rows.values()["equation"] / root).abs()
        weights = 0.9 * weights + 0.1 * sizes / sizes.max()
        equation.replace(equation.points, weights.sqrt())

    attend()
    rows, values = [], []
    for name, residual in residuals.items():
        for index in range(len(residual)):
            single = ResidualNGD(
                TaylorNetwork(network, second=[(0, 0)]),
                Residual(
                    residual.function,
                    residual.points[index : index + 1],
                    None if residual.data is None else torch.ones(1, 1).double(),
                ),
            )
            ((_, value, row),) = single.rows.chunks()
            scale = (float(weights[index]) if name == "equation" else 1.0) ** 0.5
            rows.append(scale * residual.row_scale() * row.to_dense())
            values.append(scale * residual.row_scale() * value.flatten())
    jacobian, rho, before = torch.cat(rows), torch.cat(values), flat(network)
    optimizer.step()
    matrix = jacobian.T @ jacobian
    matrix.diagonal().add_(optimizer.last.damping)
    expected = optimizer.last.length * torch.linalg.solve(matrix, jacobian.T @ rho)
    dense.assert_same(before - flat(network), expected, 1e-7)
    train(optimizer, 100, attend)
    assert error(network, line(101), torch.sin(PI * line(101))) < 1e-5


class Fields(nn.Module):
    """A network for u and one of another size for its slope p."""

    def __init__(self) -> None:
        super().__init__()
        self.u = perceptron([1, 8, 1], "sine")
        self.p = perceptron([1, 10, 6, 1], "tanh", seed=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.u(x), self.p(x)], -1)


def test_a_network_for_each_field():
    """u' = p, p' = −π² sin πx and u = 0 at both ends."""
    network = Fields()

    def system(u, x):
        slopes = torch.func.jacrev(u)(x)[:, 0]
        return torch.stack([slopes[0] - u(x)[1], slopes[1] + PI**2 * torch.sin(PI * x[0])])

    ends = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    residuals = {
        "system": Residual(system, line(30)),
        "ends": Residual(lambda u, x: u(x)[0], ends),
    }
    optimizer = ResidualNGD(network, residuals)
    assert {name.split(".")[0] for name in optimizer.rows.layout.names} == {"u", "p"}
    train(optimizer, 60)
    x = line(101)
    assert error(network, x, torch.cat([torch.sin(PI * x), PI * torch.cos(PI * x)], 1)) < 1e-5
