"""Infinite-width kernels against hand-written formulas and random wide networks."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from natgrad.ntk.activations import ACTIVATIONS, as_activation
from natgrad.ntk.infinite import InfiniteKernel, infinite_kernel
from natgrad.ntk.networks import MLP, Architecture
from tests.cases import normal

BIASES = (0.0, 0.3)
CASES = [(name, bias) for name in ("relu", "erf", "tanh") for bias in BIASES]


def architecture(name: str, depth: int, weight: float = 1.7, bias: float = 0.0) -> Architecture:
    widths = (5, *[1] * (depth - 1), 1)
    return Architecture(widths, as_activation(name), (weight,) * depth, (bias,) * depth)


def finite_layers(model: MLP, x: Tensor) -> list[Tensor]:
    """The tangent kernels of a network's layers, by hand from inputs and output gradients."""
    *hidden, last = [module for module in model if isinstance(module, nn.Linear)]
    phi = next(m for m in model if not isinstance(m, (nn.Flatten, nn.Linear)))
    shape = model.architecture
    variances = zip(shape.widths, shape.weight_variances, shape.bias_variances, strict=False)
    inputs, outputs, h = [], [], x
    with torch.enable_grad():
        for layer, (width, weight, bias) in zip((*hidden, last), variances, strict=True):
            inputs.append((weight / width) * h.detach() @ h.detach().T + bias)
            u = (weight / width) ** 0.5 * h @ layer.weight.detach().T
            if layer.bias is not None:
                u = u + bias**0.5 * layer.bias.detach()
            outputs.append(u.requires_grad_())
            h = phi(u)
        gradients = torch.autograd.grad(outputs[-1][:, 0].sum(), outputs)
    return [(d @ d.T) * q for d, q in zip(gradients, inputs, strict=True)]


def test_finite_layers_are_products_of_jacobians():
    """The reference of this file, against torch.func."""
    model = MLP((5, 6, 7, 2), "erf", (1.5, 2.0, 0.7), (0.2, 0.0, 0.4), dtype=torch.float64)
    x = normal(4, 5)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    rows = jacrev(lambda p: functional_call(model, p, (x,))[:, 0])(parameters)
    for index, kernel in zip((1, 3, 5), finite_layers(model, x), strict=True):
        own = [j.flatten(1) for name, j in rows.items() if name.startswith(f"{index}.")]
        torch.testing.assert_close(kernel, sum(j @ j.T for j in own))


def test_two_relu_layers_by_hand():
    x = normal(4, 3)
    shape = Architecture((3, 9, 1), as_activation("relu"), (1.4, 0.8), (0.3, 0.2))
    kernel = infinite_kernel(shape, x)
    q = 1.4 * x @ x.T / 3 + 0.3
    size = q.diagonal().sqrt()
    angle = (q / size.outer(size)).clamp(-1, 1).acos()
    angle.fill_diagonal_(0)
    expected = size.outer(size) * (angle.sin() + (math.pi - angle) * angle.cos()) / (2 * math.pi)
    torch.testing.assert_close(kernel.forward[0], x @ x.T / 3)
    torch.testing.assert_close(kernel.preactivation[0], q)
    torch.testing.assert_close(kernel.forward[1], expected)
    torch.testing.assert_close(kernel.preactivation[1], 0.8 * expected + 0.2)
    torch.testing.assert_close(kernel.backward[0], 0.8 * (math.pi - angle) / (2 * math.pi))
    torch.testing.assert_close(kernel.backward[1], torch.ones_like(q))
    torch.testing.assert_close(kernel.layers[0], kernel.backward[0] * q)
    torch.testing.assert_close(kernel.total, kernel.layers[0] + kernel.layers[1])
    assert kernel.error == 0 and kernel.depth == 2 and kernel.architecture is shape


def test_deep_linear_networks_have_equal_layers():
    """Every layer's kernel is Π σ_w² · XXᵀ/M_0 without biases."""
    x = normal(4, 3)
    shape = Architecture((3, 1, 1, 1), as_activation("linear"), (1.4, 0.8, 2.5), (0.0,) * 3)
    for layer in infinite_kernel(shape, x).layers:
        torch.testing.assert_close(layer, 1.4 * 0.8 * 2.5 * x @ x.T / 3)


def test_relu_keeps_the_scale_of_unit_inputs():
    x = nn.functional.normalize(normal(5, 7)) * 7**0.5
    shape = Architecture((7, *[1] * 6), as_activation("relu"), (2.0,) * 6, (0.0,) * 6)
    kernel = infinite_kernel(shape, x)
    for q, b in zip(kernel.preactivation, kernel.backward, strict=True):
        torch.testing.assert_close(q.diagonal(), torch.full((5,), 2.0).double())
        torch.testing.assert_close(b.diagonal(), torch.ones(5).double())


@pytest.mark.parametrize("name", list(ACTIVATIONS))
@given(
    samples=st.integers(1, 12),
    depth=st.integers(1, 5),
    bias=st.sampled_from(BIASES),
    scale=st.floats(0.1, 3.0),
)
def test_kernels_are_symmetric_and_positive(name, samples, depth, bias, scale):
    x = scale * normal(samples, 5, seed=samples)
    kernel = infinite_kernel(architecture(name, depth, bias=bias), x)
    for matrix in (*kernel.preactivation, *kernel.backward, *kernel.layers, kernel.total):
        torch.testing.assert_close(matrix, matrix.T, rtol=1e-12, atol=1e-12)
        values = torch.linalg.eigvalsh(matrix)
        assert values[0] >= -1e-11 * samples * values[-1]
    # tanh of a large variance is nearly a step, whose series converges slowly.
    if float(kernel.preactivation[0].max()) < 5:
        assert 0 <= kernel.error < 1e-8


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_rectangular_blocks_are_parts_of_the_symmetric_kernel(name, bias):
    shape, x = architecture(name, 4, bias=bias), normal(9, 5)
    whole = infinite_kernel(shape, x)
    # Slopes of ReLU at equal inputs see the rounding of ρ at 1, where the diagonal does not.
    for first, second, rtol in ((slice(0, 4), slice(4, 9), 1e-10), (slice(9), slice(9), 1e-7)):
        block = infinite_kernel(shape, x[first], x[second])
        for key in ("forward", "preactivation", "backward", "layers"):
            for found, expected in zip(getattr(block, key), getattr(whole, key), strict=True):
                torch.testing.assert_close(found, expected[first, second], rtol=rtol, atol=1e-10)
        torch.testing.assert_close(block.total, whole.total[first, second], rtol=rtol, atol=1e-10)


def test_inputs_are_flattened_and_models_are_read():
    model = MLP((12, 4, 4, 2), "gelu", 1.5, 0.1)
    x = normal(3, 3, 4)
    kernel = infinite_kernel(model, x)
    assert isinstance(kernel, InfiniteKernel) and kernel.architecture == model.architecture
    torch.testing.assert_close(
        kernel.total, infinite_kernel(model.architecture, x.flatten(1)).total
    )
    low = infinite_kernel(model, x.float())
    assert low.total.dtype == torch.float64
    torch.testing.assert_close(low.total, kernel.total, rtol=1e-5, atol=1e-5)


def test_stated_error_covers_a_cut_series_in_deep_networks():
    x = normal(6, 5)
    exact = infinite_kernel(architecture("tanh", 4), x, x)
    for terms in (6, 12, 24):
        cut = dataclasses.replace(as_activation("tanh"), max_terms=terms)
        shape = dataclasses.replace(exact.architecture, activation=cut)
        kernel = infinite_kernel(shape, x, x)
        for found, expected in zip(kernel.layers, exact.layers, strict=True):
            measured = float((found - expected).abs().max() / expected.abs().max())
            assert measured <= 1.01 * kernel.error + exact.error
    assert 0 < exact.error < 1e-9 < kernel.error


@pytest.mark.parametrize(("name", "bias"), CASES)
def test_wide_networks_have_these_kernels(name, bias):
    """Means over random networks of width 2048, within six standard errors."""
    seeds, width = 10, 2048
    x = normal(6, 5)
    expected = infinite_kernel(architecture(name, 3, bias=bias), x).layers
    found: list[list[Tensor]] = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        model = MLP((5, width, width, 1), name, 1.7, bias)
        found.append([kernel.double() for kernel in finite_layers(model, x.float())])
    for layer, theory in enumerate(expected):
        sample = torch.stack([kernels[layer] for kernels in found])
        # Entries share their noise level, which ten seeds each would not pin down.
        noise = float(sample.var(0).mean().sqrt()) + 1e-6
        assert float((sample.mean(0) - theory).abs().max()) < 6 * noise / seeds**0.5
        assert noise < 0.1 * float(theory.abs().max())


@pytest.mark.parametrize(("name", "bias"), CASES)
def test_errors_fall_with_the_root_of_the_width(name, bias):
    widths, seeds = (64, 256, 1024), 30
    x = normal(6, 5)
    expected = infinite_kernel(architecture(name, 3, bias=bias), x).layers
    errors = torch.zeros(len(widths), 3, dtype=torch.float64)
    for row, width in enumerate(widths):
        for seed in range(seeds):
            torch.manual_seed(seed)
            model = MLP((5, width, width, 1), name, 1.7, bias)
            for layer, kernel in enumerate(finite_layers(model, x.float())):
                errors[row, layer] += (kernel - expected[layer]).square().mean()
    logarithms = errors.log() / 2
    steps = torch.tensor(widths, dtype=torch.float64).log()
    slopes = (steps - steps.mean()) @ logarithms / (steps - steps.mean()).square().sum()
    assert (slopes + 0.5).abs().max() < 0.15, slopes


def test_bad_inputs():
    shape, x = architecture("relu", 3), normal(4, 5)
    zero = x.clone()
    zero[2] = 0
    nan = x.clone()
    nan[1, 1] = float("nan")
    for bad, message in (
        (x[:, :4], r"dimension 5.*\(4, 4\)"),
        (x[:0], "at least one sample"),
        (x[0], "at least one sample"),
        (nan, "not finite"),
        (zero, "sample 2 of x1 is all zero"),
    ):
        with pytest.raises(ValueError, match=message):
            infinite_kernel(shape, bad)
    with pytest.raises(ValueError, match="sample 2 of x2 is all zero"):
        infinite_kernel(shape, x, zero)
    assert infinite_kernel(architecture("relu", 3, bias=0.1), zero).total.isfinite().all()
    with pytest.raises(TypeError, match="int64"):
        infinite_kernel(shape, x.long())
    with pytest.raises(ValueError, match="nn.Linear"):
        infinite_kernel(nn.Sequential(nn.Linear(5, 2)), x)
