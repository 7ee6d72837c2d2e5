"""Points added where residuals are large: when, how many, where, and what for."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from natgrad import ResidualNGD
from natgrad.residuals import AdaptivePoints, Residual, TaylorNetwork
from tests.residuals.test_residuals import perceptron, points


def uniform(dimension: int = 2, seed: int = 0):
    """Return a function that draws points of a cube."""
    generator = torch.Generator().manual_seed(seed)
    return lambda count: torch.rand(count, dimension, generator=generator, dtype=torch.float64)


class Planted(nn.Module):
    """A model whose residual is what a test says: ``u(x) = c · g(x)``."""

    def __init__(self, function) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1, dtype=torch.float64))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.function(x)


def value(u, x):
    return u(x)


@given(
    inside=st.floats(0.1, 2.0),
    outside=st.floats(0.1, 2.0),
    weight=st.floats(0.5, 3.0),
    growth=st.floats(0.1, 1.5),
    count=st.integers(1, 30),
)
def test_parts_get_points_where_the_loss_elsewhere_is_twice_theirs(
    inside, outside, weight, growth, count
):
    """Residuals are one number at the points (x < 0) and another where points are drawn."""
    model = Planted(lambda x: torch.where(x < 0, inside, outside))
    start = -1 - torch.rand(count, 1, dtype=torch.float64)
    residuals = {
        "equation": Residual(value, start, weight=weight),
        "fixed": Residual(value, start, weight=0.25),
    }
    adaptive = AdaptivePoints(model, residuals, {"equation": uniform(1)}, growth=growth)
    assert len(adaptive.held_out["equation"]) == count
    excess = weight * (outside**2 - inside**2)
    total = (weight + 0.25) * inside**2
    if math.isclose(excess, total, rel_tol=1e-9):
        return
    changed = adaptive.update()
    assert changed == (["equation"] if excess > total else [])
    added = max(1, round(growth * count)) if changed else 0
    assert len(residuals["equation"]) == count + added
    assert len(adaptive.held_out["equation"]) == count + added
    assert torch.equal(residuals["equation"].points[:count], start)
    assert bool((residuals["equation"].points[count:] > 0).all())
    assert torch.equal(residuals["fixed"].points, start)


def test_points_are_added_by_the_density_of_the_residuals():
    """Residuals are 0, 1 and 5 on thirds of the interval: mean 2, density 1, 1.5 and 3.5."""
    model = Planted(lambda x: torch.where(x < 1 / 3, 0.0, torch.where(x < 2 / 3, 1.0, 5.0)))
    start = torch.full((300, 1), 0.1, dtype=torch.float64)
    residual, counts, rounds = Residual(value, start), torch.zeros(3), 20
    adaptive = AdaptivePoints(
        model, residual, uniform(1), growth=1.0, generator=torch.Generator().manual_seed(0)
    )
    for _ in range(rounds):
        assert adaptive.update() == ["residual"]
        added = residual.points[300:, 0]
        assert len(added) == 300 and len(added.unique()) == 300
        counts += torch.histc((3 * added).float(), 3, 0, 3)
        residual.replace(start)
        adaptive.held_out["residual"].replace(uniform(1)(300))
    shares = counts / counts.sum()
    # Drawn without replacement out of 16 times as many, of which none runs short.
    expected = torch.tensor([1.0, 1.5, 3.5]) / 6
    deviation = (expected * (1 - expected) / (300 * rounds)).sqrt()
    assert bool(((shares - expected).abs() < 4 * deviation + 0.01).all())


def test_points_of_least_residual_make_room():
    model = Planted(lambda x: torch.where(x < 0, x.abs(), 100.0))
    start = -torch.tensor([[3.0], [1.0], [4.0], [2.0]], dtype=torch.float64)
    residual = Residual(value, start)
    adaptive = AdaptivePoints(model, residual, uniform(1), growth=0.5, most=5)
    assert adaptive.update() == ["residual"]
    assert sorted(residual.points[:3, 0].tolist()) == [-4.0, -3.0, -2.0] and len(residual) == 5
    residual.replace(start)
    adaptive = AdaptivePoints(model, residual, uniform(1), growth=3.0, most=5)
    adaptive.update()
    assert len(residual) == 5 and bool((residual.points > 0).all())


def test_data_belong_to_their_points():
    def draw(count: int) -> tuple[Tensor, Tensor]:
        x = uniform()(count)
        return x, x.sum(1, keepdim=True)

    network, x = perceptron([2, 4, 1]), points(3)
    residual = Residual(lambda u, x, f: u(x) - 10 * f, x, network(x).detach() / 10)
    AdaptivePoints(network, residual, draw, growth=0.5).update()
    assert len(residual) == 5
    torch.testing.assert_close(residual.data[3:, 0], residual.points[3:].sum(1), rtol=0, atol=0)
    torch.testing.assert_close(residual.data[:3], network(x).detach() / 10, rtol=0, atol=0)


def test_residuals_that_are_not_finite_add_no_points():
    model = Planted(lambda x: torch.where(x < 0, 1.0, math.nan))
    for start in (-uniform(1)(3), uniform(1)(3)):
        assert AdaptivePoints(model, Residual(value, start), uniform(1)).update() == []


def test_both_ways_to_differentiate_choose_the_same_points():
    chosen = []
    for taylor in (False, True):
        network = perceptron([2, 6, 1])
        model = TaylorNetwork(network, laplacian=True) if taylor else network

        def equation(u, x, taylor=taylor):
            laplacian = u.laplacian if taylor else torch.func.hessian(u)(x)[0].trace()
            return laplacian - 10 * x.prod()

        residual = Residual(equation, 1e-3 * points(4))
        adaptive = AdaptivePoints(
            model, residual, uniform(), generator=torch.Generator().manual_seed(3)
        )
        assert adaptive.update() == ["residual"]
        chosen.append(residual.points)
    assert torch.equal(*chosen)


def test_added_points_bring_the_error_between_points_down():
    """u'' = −64 sin 8x on eight points is fitted by 31 parameters; the rest comes with points."""
    errors, grid = [], torch.linspace(0, 1, 201, dtype=torch.float64).unsqueeze(1)
    for adapts in (False, True):
        network = perceptron([1, 10, 1])
        model = TaylorNetwork(network, second=[(0, 0)])
        ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        residuals = {
            "equation": Residual(
                lambda u, x: (u.second[0] + 64 * torch.sin(8 * x)) / 64, uniform(1)(8)
            ),
            "ends": Residual(lambda u, x: u.value - torch.sin(8 * x), ends),
        }
        optimizer = ResidualNGD(model, residuals)
        adaptive = AdaptivePoints(
            model,
            residuals,
            {"equation": uniform(1, 1)},
            generator=torch.Generator().manual_seed(0),
        )
        for _ in range(60):
            optimizer.step()
            if adapts:
                adaptive.update()
            elif optimizer.last.loss_after < 1e-20:
                break  # Fitted to rounding errors.
        known = torch.sin(8 * grid)
        with torch.no_grad():
            errors.append(float((network(grid) - known).norm() / known.norm()))
        assert optimizer.last.loss_after < 1e-6
        assert (len(residuals["equation"]) > 8) == adapts
    assert errors[1] < 1e-2 * errors[0]


def test_wrong_arguments_are_named():
    network, residual = perceptron([2, 3, 1]), Residual(value, points(3))
    with pytest.raises(ValueError, match="growth must be a finite number above 0, got 0"):
        AdaptivePoints(network, residual, uniform(), growth=0)
    with pytest.raises(ValueError, match="most must be an integer of at least 1"):
        AdaptivePoints(network, residual, uniform(), most=0)
    with pytest.raises(ValueError, match="some of the parts 'residual', got 'edge'"):
        AdaptivePoints(network, residual, {"edge": uniform()})
    with pytest.raises(ValueError, match="must return points for 3 points, got 2 points"):
        AdaptivePoints(network, residual, lambda count: points(count - 1))
    with pytest.raises(ValueError, match="return points for 3 points, got 3 points and data"):
        AdaptivePoints(network, residual, lambda count: (points(count), points(count)))
    known = Residual(lambda u, x, y: u(x) - y, points(3), torch.zeros(3, 1).double())
    with pytest.raises(ValueError, match="must return a pair of points and data for 3"):
        AdaptivePoints(network, known, uniform())
