"""NTK parameterisation and isotropic natural gradients, against dense linear algebra."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from natgrad import fisher_matrix, ntk
from tests import dense
from tests.cases import normal

STRUCTURES = ["full", "block_diagonal", "block_tridiagonal", "unit_wise", "diagonal", "kfac"]


def network(depth: int, inputs: int, width: int, outputs: int = 1, **options) -> nn.Sequential:
    torch.manual_seed(depth)
    sizes = [inputs, *[width] * (depth - 1), outputs]
    layers: list[nn.Module] = []
    for a, b in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [ntk.NTKLinear(a, b, **options), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


def test_ntk_linear_is_a_scaled_linear_layer():
    """With standard layers of scaled parameters f is the same, and F is scaled on both sides."""
    model = network(3, 3, 4, 2, weight_variance=1.5, bias_variance=0.3)
    plain = nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)
    ).double()
    scales = []
    for layer, standard in zip(model[::2], plain[::2], strict=True):
        weight, bias = (1.5 / layer.in_features) ** 0.5, 0.3**0.5
        with torch.no_grad():
            standard.weight.copy_(weight * layer.weight)
            standard.bias.copy_(bias * layer.bias)
        scales += [
            torch.full((layer.weight.numel(),), weight, dtype=torch.float64),
            torch.full((layer.out_features,), bias, dtype=torch.float64),
        ]
    scale = torch.cat(scales)
    x, y = normal(5, 3), normal(5, 2, seed=1)
    torch.testing.assert_close(model(x), plain(x))
    for structure in STRUCTURES:
        f = fisher_matrix(model, (x, y), "gaussian", structure).to_dense()
        standard = fisher_matrix(plain, (x, y), "gaussian", structure).to_dense()
        dense.assert_same(f, scale.unsqueeze(1) * standard * scale)


def test_ntk_linear_draws_standard_normal_parameters():
    torch.manual_seed(0)
    layer = ntk.NTKLinear(300, 300)
    for values in (layer.weight.detach(), layer.bias.detach()):
        assert abs(float(values.mean())) < 5 / values.numel() ** 0.5
        assert abs(float(values.var()) - 1) < 5 * (2 / values.numel()) ** 0.5
    assert ntk.NTKLinear(3, 2, bias=False).bias is None
    for options in ({"weight_variance": 0.0}, {"bias_variance": -1.0}):
        with pytest.raises(ValueError, match="variance"):
            ntk.NTKLinear(3, 2, **options)


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("depth", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("structure", ["full", "block_diagonal", "block_tridiagonal", "kfac"])
def test_function_space_map_is_alpha_times_the_identity(structure, depth, outputs):
    """J F̂⁺ Jᵀ/N = αI where every layer has more parameters, and width, than rows."""
    if structure == "block_tridiagonal" and depth % 3 == 2:
        with pytest.raises(ValueError, match=str(depth)):
            ntk.isotropic_constant(structure, depth, 4)
        return
    samples = 4
    model = network(depth, 6, 10, outputs)
    for layer in model[::2]:
        layer.bias.requires_grad_(False)
    x = normal(samples, 6, seed=depth)
    _, jac = dense.jacobian(model, x)
    jac = jac.flatten(0, 1)
    f = fisher_matrix(model, (x, normal(samples, outputs)), "gaussian", structure)
    residual = normal(samples * outputs, seed=7)
    moved = jac @ f.solve(jac.T @ residual / samples)
    alpha = ntk.isotropic_constant(structure, depth, samples)
    dense.assert_same(moved, alpha * residual, 1e-6)


def test_unit_wise_map_is_nearly_isotropic_in_wide_networks():
    samples, depth, width = 3, 3, 600
    torch.manual_seed(0)
    layers = [
        ntk.NTKLinear(5, width, bias=False),
        nn.ReLU(),
        ntk.NTKLinear(width, width, bias=False),
    ]
    model = nn.Sequential(*layers, nn.ReLU(), ntk.NTKLinear(width, 1, bias=False)).double()
    x = functional_normalize(normal(samples, 5))
    _, jac = dense.jacobian(model, x)
    jac = jac.flatten(0, 1)
    f = fisher_matrix(model, (x, normal(samples, 1)), "gaussian", "unit_wise")
    kernel = jac @ f.solve(jac.T / samples)
    alpha = ntk.isotropic_constant("unit_wise", depth, samples, width=width)
    relative = kernel / alpha - torch.eye(samples).double()
    assert relative.abs().max() < 0.15


def functional_normalize(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm(dim=1, keepdim=True)


def test_isotropic_constants():
    constants = [
        ntk.isotropic_constant("block_tridiagonal", depth, 5) for depth in (1, 3, 4, 6, 7, 9)
    ]
    assert constants == [1, 1, 2, 2, 3, 3]
    assert ntk.isotropic_constant("full", 9, 5) == 1
    assert ntk.isotropic_constant("block_diagonal", 9, 5) == 9
    assert ntk.isotropic_constant("kfac", 4, 50) == 151
    assert ntk.isotropic_constant("kfac", 4, 50, input_dim=20) == 121
    for structure, depth in (("diagonal", 3), ("block_tridiagonal", 5), ("unit_wise", 3), ("x", 2)):
        with pytest.raises(ValueError):
            ntk.isotropic_constant(structure, depth, 5)
    with pytest.raises(ValueError):
        ntk.isotropic_constant("full", 0, 5)
