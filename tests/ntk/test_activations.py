"""Gaussian expectations of activations against two-dimensional quadrature."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate
from torch import Tensor, nn

from natgrad.ntk.activations import (
    ACTIVATIONS,
    Activation,
    LeakyReLUActivation,
    QuadratureActivation,
    activation_of,
    as_activation,
)
from tests.cases import normal

SMOOTH = ["erf", "gelu", "linear", "tanh", "silu"]
KINKED = [as_activation("relu"), as_activation("leaky_relu"), LeakyReLUActivation(-0.4)]
ALL = [*(as_activation(name) for name in SMOOTH), *KINKED]

variances = st.floats(0.05, 6.0)
correlations = st.one_of(
    st.floats(-1, 1), st.sampled_from([-1.0, -1 + 1e-9, -0.999, 0.0, 0.999, 1 - 1e-9, 1.0])
)


def tensor(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def value_and_slope(activation: Activation, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    value = activation.module()(x)
    (slope,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), slope


def plane(activation: Activation, q1: float, q2: float, rho: float) -> tuple[float, float]:
    """Both expectations by the product trapezoid rule, exponentially accurate for smooth φ."""
    z = torch.linspace(-11, 11, 401, dtype=torch.float64)
    w = torch.exp(-(z**2) / 2) * (z[1] - z[0]) / math.sqrt(2 * math.pi)
    u = math.sqrt(q1) * z
    v = math.sqrt(q2) * (rho * z.unsqueeze(1) + math.sqrt(1 - rho**2) * z)
    (fu, du), (fv, dv) = value_and_slope(activation, u), value_and_slope(activation, v)
    return float(w @ (fu.unsqueeze(1) * fv) @ w), float(w @ (du.unsqueeze(1) * dv) @ w)


def polar(activation: Activation, q1: float, q2: float, rho: float) -> tuple[float, float]:
    """Both expectations for φ(rx) = rφ(x), r > 0: the radius drops out, the angle is adaptive."""
    angle = math.acos(rho)
    kinks = [math.pi / 2, -math.pi / 2, angle - math.pi / 2, angle + math.pi / 2]
    bounds = sorted({-math.pi, math.pi, *((k + math.pi) % (2 * math.pi) - math.pi for k in kinks)})

    def integral(which: int) -> float:
        def integrand(t: float) -> float:
            first = value_and_slope(activation, tensor(math.cos(t)))[which]
            second = value_and_slope(activation, tensor(math.cos(t - angle)))[which]
            return float(first * second)

        pieces = zip(bounds[:-1], bounds[1:], strict=True)
        # Pieces this short count for nothing, and rounding puts points beyond their kinks.
        return sum(
            integrate.fixed_quad(lambda t: [integrand(s) for s in t], a, b, n=14)[0]
            for a, b in pieces
            if b - a > 1e-13
        )

    return math.sqrt(q1 * q2) * integral(0) / math.pi, integral(1) / (2 * math.pi)


def computed(activation: Activation, q1: float, q2: float, rho: float) -> tuple[float, float]:
    c = tensor(rho * math.sqrt(q1 * q2)).unsqueeze(1)
    args = tensor(q1), tensor(q2), c
    return float(activation.covariance(*args)), float(activation.derivative_covariance(*args))


@pytest.mark.parametrize("name", SMOOTH)
@given(q1=variances, q2=variances, rho=correlations)
def test_smooth_activations_match_quadrature(name, q1, q2, rho):
    activation = as_activation(name)
    for found, expected in zip(
        computed(activation, q1, q2, rho), plane(activation, q1, q2, rho), strict=True
    ):
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("activation", KINKED, ids=repr)
@given(q1=variances, q2=variances, rho=correlations)
def test_kinked_activations_match_quadrature(activation, q1, q2, rho):
    found, expected = computed(activation, q1, q2, rho), polar(activation, q1, q2, rho)
    assert found[0] == pytest.approx(expected[0], rel=1e-9, abs=1e-9)
    # arccos amplifies the rounding of ρ near ±1.
    assert found[1] == pytest.approx(expected[1], rel=1e-9, abs=2e-8 if abs(rho) > 0.99 else 1e-9)


@pytest.mark.parametrize("activation", ALL, ids=repr)
def test_diagonals_are_the_limits_of_full_correlation(activation):
    q = torch.linspace(0.1, 5, 7, dtype=torch.float64)
    covariance = activation.covariance(q, q, q.outer(q).sqrt()).diagonal()
    torch.testing.assert_close(activation.variance(q), covariance, rtol=1e-10, atol=0)
    slopes = activation.derivative_covariance(q, q, q.outer(q).sqrt()).diagonal()
    torch.testing.assert_close(activation.derivative_variance(q), slopes, rtol=2e-8, atol=0)


@pytest.mark.parametrize("activation", ALL, ids=repr)
def test_slopes_are_the_derivative_by_the_covariance(activation):
    """Price's theorem: ∂E[φφ]/∂c = E[φ'φ'], by central differences with one extrapolation."""
    q1, q2 = normal(4).abs() + 0.5, normal(3, seed=1).abs() + 0.5
    c = 0.9 * (2 * torch.rand(4, 3, dtype=torch.float64) - 1) * q1.outer(q2).sqrt()

    def difference(h: float) -> Tensor:
        above, below = activation.covariance(q1, q2, c + h), activation.covariance(q1, q2, c - h)
        return (above - below) / (2 * h)

    expected = (4 * difference(1e-4) - difference(2e-4)) / 3
    torch.testing.assert_close(
        activation.derivative_covariance(q1, q2, c), expected, rtol=1e-8, atol=1e-9
    )


@pytest.mark.parametrize("terms", [1, 2, 5, 12, 400])
@pytest.mark.parametrize("name", ["tanh", "silu"])
@given(q1=variances, q2=variances, rho=st.floats(-1, 1))
def test_stated_error_bounds_the_truncated_series(name, terms, q1, q2, rho):
    activation = as_activation(name)
    assert isinstance(activation, QuadratureActivation)
    activation = dataclasses.replace(activation, max_terms=terms)
    bounds = activation.error(tensor(q1), tensor(q2))
    found, expected = computed(activation, q1, q2, rho), plane(activation, q1, q2, rho)
    for value, true, bound in zip(found, expected, bounds, strict=True):
        # The reference is exact to 1e-13.
        assert abs(value - true) <= bound + 1e-13
    if terms == 400:
        assert max(bounds) < 1e-9


def test_stated_error_of_the_series_is_sharp_and_grows_with_that_of_the_input():
    tanh = dataclasses.replace(as_activation("tanh"), max_terms=4)
    q = tensor(1.0)
    bound, _ = tanh.error(q, q)
    true = float(tanh.variance(q) - tanh.covariance(q, q, q.unsqueeze(1)))
    assert bound == pytest.approx(true, rel=1e-6)
    for name in ("tanh", "silu"):
        activation = as_activation(name)
        args = tensor(1.3), tensor(1.3)
        moved = [computed(activation, 1.3, 1.3, rho) for rho in (0.95, 0.95 - 1e-3 / 1.3)]
        for a, b, bound in zip(*moved, activation.error(*args, input_error=1e-3), strict=True):
            assert abs(a - b) <= bound < 1e-2
    assert as_activation("erf").error(q, q, 0.1) == (0.0, 0.0)


@pytest.mark.parametrize("name", ["erf", "gelu"])
def test_a_closed_form_is_found_again_by_the_series(name):
    """erf and GELU, which have closed forms, through the machinery of those that do not."""

    def erf_slope(x: Tensor) -> Tensor:
        return 2 / math.sqrt(math.pi) * torch.exp(-(x**2))

    def gelu_slope(x: Tensor) -> Tensor:
        density = torch.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
        return torch.special.ndtr(x) + x * density

    slope = erf_slope if name == "erf" else gelu_slope
    closed = as_activation(name)
    series = QuadratureActivation(name, closed.module(), slope, closed.module)
    q1, q2 = normal(40).abs() + 0.1, normal(30, seed=1).abs() + 0.1
    c = (2 * torch.rand(40, 30, dtype=torch.float64) - 1) * q1.outer(q2).sqrt()
    for method in ("covariance", "derivative_covariance"):
        torch.testing.assert_close(
            getattr(series, method)(q1, q2, c),
            getattr(closed, method)(q1, q2, c),
            rtol=1e-10,
            atol=1e-10,
        )


def test_extreme_variances_stay_finite():
    q = torch.tensor([1e-12, 1.0, 1e6], dtype=torch.float64)
    c = q.outer(q).sqrt() * 0.5
    for activation in ALL:
        for matrix in (activation.covariance(q, q, c), activation.derivative_covariance(q, q, c)):
            assert matrix.isfinite().all()
    # tanh of a huge variance is a step: E[φφ] → (2/π) arcsin ρ. The error is stated.
    tanh = as_activation("tanh")
    big = tensor(1e6)
    found = float(tanh.covariance(big, big, big.unsqueeze(1) * 0.5))
    bound, _ = tanh.error(big, big)
    assert abs(found - 2 / math.pi * math.asin(0.5)) <= bound + 1e-3


def test_active_fraction_is_the_share_of_slopes():
    x = normal(100_000)
    for activation in ALL:
        share = float((value_and_slope(activation, x)[1] != 0).double().mean())
        assert share == pytest.approx(activation.active_fraction, abs=0.01)


def test_names_and_modules():
    for name, activation in ACTIVATIONS.items():
        assert activation.name == name
        assert as_activation(name) is activation and as_activation(activation) is activation
        assert activation_of(activation.module()) == activation
    assert activation_of(nn.LeakyReLU(0.2)) == LeakyReLUActivation(0.2)
    assert activation_of(nn.LeakyReLU(0.0)) == as_activation("relu")
    for module in (nn.GELU(approximate="tanh"), nn.Softplus(), nn.Linear(2, 2)):
        assert activation_of(module) is None
    with pytest.raises(ValueError, match="'swish'.*relu"):
        as_activation("swish")
    with pytest.raises(TypeError, match="relu"):
        as_activation(nn.ReLU)
    for slope in (0.0, math.inf):
        with pytest.raises(ValueError, match="slope"):
            LeakyReLUActivation(slope)
    with pytest.raises(ValueError, match="max_terms"):
        dataclasses.replace(as_activation("tanh"), max_terms=0)
