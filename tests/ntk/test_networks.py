"""Architectures read off models, and the networks made for them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from natgrad.ntk import NTKLinear
from natgrad.ntk.activations import Erf, LinearActivation, QuadratureActivation, as_activation
from natgrad.ntk.networks import MLP, Architecture
from tests.cases import normal


def layer(inputs: int, outputs: int, weight: float = 2.0, bias: float = 0.0) -> NTKLinear:
    return NTKLinear(inputs, outputs, bias > 0, weight_variance=weight, bias_variance=bias)


def test_architecture_of_nested_chains():
    shared = nn.Tanh()
    model = nn.Sequential(
        nn.Flatten(),
        nn.Sequential(layer(6, 5, 1.5, 0.1), shared),
        nn.Sequential(nn.Identity(), nn.Sequential(layer(5, 4, 1.2), shared)),
        layer(4, 3, 0.7, 0.2),
        nn.Identity(),
    )
    found = Architecture.of(model)
    assert found == Architecture(
        (6, 5, 4, 3), as_activation("tanh"), (1.5, 1.2, 0.7), (0.1, 0, 0.2)
    )
    assert (found.depth, found.input_dim, found.outputs) == (3, 6, 3)
    linear = Architecture.of(nn.Sequential(layer(3, 4), layer(4, 2)))
    assert linear.activation == LinearActivation() and linear.widths == (3, 4, 2)
    assert Architecture.of(NTKLinear(3, 2)).bias_variances == (0.0,)


def test_mlp_and_its_architecture():
    model = MLP((6, 5, 4, 2), "erf", (2.0, 1.0, 0.5), (0.3, 0.0, 0.1), dtype=torch.float64)
    expected = Architecture((6, 5, 4, 2), as_activation("erf"), (2.0, 1.0, 0.5), (0.3, 0.0, 0.1))
    assert model.architecture == Architecture.of(nn.Sequential(model)) == expected
    assert [type(m) for m in model] == [nn.Flatten, NTKLinear, Erf, NTKLinear, Erf, NTKLinear]
    assert [m.bias is not None for m in model[1::2]] == [True, False, True]
    assert model(normal(3, 2, 3)).dtype == torch.float64
    x = normal(3, 6)
    hidden = torch.erf((2 / 6) ** 0.5 * x @ model[1].weight.T + 0.3**0.5 * model[1].bias)
    hidden = torch.erf((1 / 5) ** 0.5 * hidden @ model[3].weight.T)
    output = (0.5 / 4) ** 0.5 * hidden @ model[5].weight.T + 0.1**0.5 * model[5].bias
    torch.testing.assert_close(model(x), output)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x)) and other.architecture == expected
    assert MLP((3, 4, 2)).architecture.weight_variances == (2.0, 2.0)
    assert MLP((3, 2)).architecture.depth == 1


def test_mlp_draws_standard_normal_parameters():
    model = MLP((300, 400, 200), "tanh", 1.7, 0.5)
    for parameter in model.parameters():
        parameter, count = parameter.detach(), parameter.numel()
        assert abs(float(parameter.mean())) < 5 / count**0.5
        assert abs(float(parameter.var()) - 1) < 5 * (2 / count) ** 0.5


def test_custom_activations_are_known_within_their_mlp():
    def cosine(x):
        return -x.sin()

    class Cosine(nn.Module):
        def forward(self, x):
            return x.cos()

    activation = QuadratureActivation("cos", torch.cos, cosine, Cosine)
    model = MLP((3, 4, 4, 1), activation)
    assert model.architecture.activation is activation
    assert Architecture.of(nn.Sequential(model)).activation is activation
    with pytest.raises(ValueError, match="'2'.*Cosine"):
        Architecture.of(nn.Sequential(*model))


class Skip(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


SHARED = layer(4, 4)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ([layer(3, 4), nn.ReLU(), nn.Linear(4, 2)], "'2' is an nn.Linear in standard.*MLP"),
        ([layer(3, 4), nn.Dropout(), layer(4, 2)], "'1'.*Dropout.*remove"),
        ([layer(3, 4), nn.LayerNorm(4), nn.ReLU(), layer(4, 2)], "'1'.*LayerNorm"),
        ([nn.Conv2d(3, 4, 3), nn.ReLU()], "'0'.*Conv2d"),
        ([layer(3, 4), nn.GELU("tanh"), layer(4, 2)], "'1'.*tanh approximation"),
        (
            [layer(3, 4), nn.ReLU(), layer(4, 4), nn.Tanh(), layer(4, 2)],
            "before layer '4' is tanh.*same",
        ),
        ([layer(3, 4), layer(4, 4), nn.Tanh(), layer(4, 2)], "before layer '3' is tanh"),
        ([layer(3, 4), nn.ReLU(), layer(4, 2), nn.ReLU()], "'3' is an activation after the last"),
        ([nn.ReLU(), layer(3, 4)], "'0' is an activation before the first"),
        ([layer(3, 4), nn.ReLU(), nn.ReLU(), layer(4, 2)], "'2' is an activation after another"),
        ([layer(3, 4), nn.ReLU(), layer(5, 2)], "'2' takes 5 inputs.*4 outputs"),
        ([SHARED, nn.ReLU(), SHARED], "'2' shares its weight"),
        ([layer(3, 4), nn.Flatten(), layer(4, 2)], "'1'.*Flatten"),
        ([nn.Flatten(0), layer(3, 4)], "'0' flattens"),
        ([Skip(layer(3, 3))], "'0'.*Skip"),
        ([nn.Identity()], "no NTKLinear"),
    ],
)
def test_other_models_are_refused_by_name(modules, message):
    with pytest.raises(ValueError, match=message):
        Architecture.of(nn.Sequential(*modules))


def test_bad_arguments():
    relu = as_activation("relu")
    for arguments, message in (
        (((3,), (), ()), "widths"),
        (((3, 0), (1.0,), (0.0,)), "widths"),
        (((3, 2), (1.0, 1.0), (0.0,)), "weight_variances.*1 layers"),
        (((3, 2), (1.0,), ()), "bias_variances"),
        (((3, 2), (0.0,), (0.0,)), "positive"),
        (((3, 2), (float("nan"),), (0.0,)), "finite"),
        (((3, 2), (1.0,), (-1.0,)), "negative"),
    ):
        widths, weights, biases = arguments
        with pytest.raises(ValueError, match=message):
            Architecture(widths, relu, weights, biases)
    with pytest.raises(ValueError, match="weight_variances"):
        MLP((3, 4, 2), weight_variance=(1.0,))
    with pytest.raises(ValueError, match="swish"):
        MLP((3, 4, 2), "swish")
    with pytest.raises(TypeError, match="module"):
        Architecture.of("relu")
