"""The linear layer in NTK parameterisation, against a standard layer of scaled parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from natgrad import fisher_matrix
from natgrad.ntk import NTKLinear
from tests import dense
from tests.cases import normal
from tests.ntk.reference import STRUCTURES


def network(depth: int, inputs: int, width: int, outputs: int = 1, **options) -> nn.Sequential:
    torch.manual_seed(depth)
    sizes = [inputs, *[width] * (depth - 1), outputs]
    layers: list[nn.Module] = []
    for a, b in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [NTKLinear(a, b, **options), nn.Tanh()]
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
    layer = NTKLinear(300, 300)
    for values in (layer.weight.detach(), layer.bias.detach()):
        assert abs(float(values.mean())) < 5 / values.numel() ** 0.5
        assert abs(float(values.var()) - 1) < 5 * (2 / values.numel()) ** 0.5
    assert NTKLinear(3, 2, bias=False).bias is None
    for options in ({"weight_variance": 0.0}, {"bias_variance": -1.0}):
        with pytest.raises(ValueError, match="variance"):
            NTKLinear(3, 2, **options)
