"""NTK and standard parameterisation: telling them apart and converting."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from natgrad.ntk import NTKLinear
from natgrad.ntk.networks import MLP
from natgrad.ntk.scaling import parameterization, to_ntk
from tests.cases import normal


def plain() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(5, 7), nn.Tanh(), nn.Sequential(nn.Linear(7, 6, bias=False), nn.GELU()),
        nn.Linear(6, 3),
    ).double()  # fmt: skip


def test_to_ntk_keeps_the_function_and_has_unit_entries():
    model = plain()
    before = copy.deepcopy(model.state_dict())
    model[3].weight.requires_grad_(False)
    model[0].register_forward_hook(lambda module, args, output: 2 * output)
    model(normal(4, 5)).sum().backward()
    converted = to_ntk(model).eval()
    x = normal(4, 5)
    torch.testing.assert_close(converted(x), model(x), rtol=1e-13, atol=1e-13)
    for name, module in converted.named_modules():
        assert type(module) is not nn.Linear
        if isinstance(module, NTKLinear):
            for parameter in module.parameters():
                assert float(parameter.detach().square().mean()) == pytest.approx(1.0, rel=1e-12)
                assert parameter.grad is None
            own = model.get_submodule(name).weight
            variance = module.in_features * float(own.detach().square().mean())
            assert module.weight_variance == pytest.approx(variance, rel=1e-12)
            assert module.weight_scale == pytest.approx((variance / module.in_features) ** 0.5)
    assert not converted[3].weight.requires_grad and converted[3].bias.requires_grad
    assert model.training and not converted.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert type(to_ntk(nn.Linear(3, 2))) is NTKLinear


def test_one_step_of_the_ntk_copy_is_a_scaled_step_of_the_standard_model():
    model, rate = plain(), 0.3
    converted, scales = to_ntk(model), parameterization(model)
    x, y = normal(4, 5), normal(4, 3, seed=1)
    for network in (model, converted):
        (network(x) - y).square().mean().backward()
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter -= rate * parameter.grad
        for scale in scales.layers:
            module = model.get_submodule(scale.name)
            module.weight -= rate * scale.learning_rate_scale * module.weight.grad
            if module.bias is not None:
                module.bias -= rate * scale.bias_learning_rate_scale * module.bias.grad
    for scale in scales.layers:
        own, other = model.get_submodule(scale.name), converted.get_submodule(scale.name)
        torch.testing.assert_close(own.weight, scale.weight_scale * other.weight)
        if own.bias is not None:
            torch.testing.assert_close(own.bias, scale.bias_scale * other.bias)
    torch.testing.assert_close(model(x), converted(x))


def test_zero_weights_and_biases_stay_trainable():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    nn.init.zeros_(model[0].bias)
    nn.init.zeros_(model[1].weight)
    converted = to_ntk(model)
    x = normal(5, 3)
    torch.testing.assert_close(converted(x), model(x))
    assert converted[0].bias_variance == converted[0].bias_scale == 1
    assert converted[1].weight_variance == 1
    converted(x).square().sum().backward()
    model(x).square().sum().backward()
    torch.testing.assert_close(converted[0].bias.grad, model[0].bias.grad)
    torch.testing.assert_close(converted[1].weight.grad, model[1].weight.grad / 4**0.5)
    scales = parameterization(model).layers
    assert scales[0].bias_scale == 1 and scales[1].weight_variance == 1


def test_measured_scales_of_ntk_layers():
    torch.manual_seed(0)
    model = MLP((200, 300, 10), "relu", 2.0, (0.0, 0.5))
    found = parameterization(model)
    assert found.kind == "ntk" and found.other == ()
    assert [layer.name for layer in found.layers] == ["1", "3"]
    first, second = found.layers
    assert first.weight_variance == pytest.approx(2.0, rel=0.05)
    assert first.learning_rate_scale == pytest.approx(2.0 / 200, rel=0.05)
    assert first.bias_scale is first.bias_variance is first.bias_learning_rate_scale is None
    assert second.bias_variance == pytest.approx(
        0.5 * float(model[3].bias.detach().square().mean())
    )
    # The standard layer of scaled weights has the same scales.
    standard = nn.Linear(200, 300, bias=False)
    with torch.no_grad():
        standard.weight.copy_(model[1].weight * model[1].weight_scale)
    (other,) = parameterization(standard).layers
    assert other.kind == "standard" and other.name == ""
    assert other.weight_variance == pytest.approx(first.weight_variance, rel=1e-5)
    # A bias of zero variance plays no part.
    assert parameterization(NTKLinear(3, 2)).layers[0].bias_scale == 0


def test_convolutions_and_other_modules():
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), nn.Conv1d(2, 3, 5), nn.Conv3d(1, 2, 2),
        nn.ConvTranspose2d(2, 2, 2), nn.Flatten(), NTKLinear(3, 2),
    )  # fmt: skip
    found = parameterization(model)
    assert found.kind == "mixed" and found.other == ("1", "4")
    assert [layer.fan_in for layer in found.layers] == [2 * 9, 10, 8, 3]
    assert [layer.kind for layer in found.layers] == ["standard"] * 3 + ["ntk"]
    weight = model[0].weight.detach()
    assert found.layers[0].learning_rate_scale == pytest.approx(float(weight.square().mean()))
    lines = str(found).splitlines()
    assert len(lines) == 7 and "fan_in" in lines[0] and "mixes" in lines[5] and "'4'" in lines[6]
    empty = parameterization(nn.Sequential(nn.ReLU(), nn.LayerNorm(3)))
    assert empty.kind == "none" and empty.other == ("1",) and "no linear layer" in str(empty)
    standard = parameterization(plain())
    assert standard.kind == "standard" and "none" in str(standard)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


def test_models_that_cannot_be_converted():
    with pytest.raises(ValueError, match="no nn.Linear"):
        to_ntk(MLP((3, 2)))
    with pytest.raises(ValueError, match="'head' shares"):
        to_ntk(Tied())
    with pytest.raises(ValueError, match="TransformerEncoderLayer"):
        to_ntk(nn.TransformerEncoderLayer(4, 2, 8))
    broken = nn.Linear(3, 2)
    with torch.no_grad():
        broken.weight[0, 0] = float("nan")
    for function in (to_ntk, parameterization):
        with pytest.raises(ValueError, match="not finite"):
            function(broken)
    # A layer that is used twice is converted once.
    shared = nn.Linear(3, 3).double()
    model = nn.Sequential(shared, nn.Tanh(), shared)
    converted = to_ntk(model)
    assert converted[0] is converted[2]
    torch.testing.assert_close(converted(normal(2, 3)), model(normal(2, 3)))
