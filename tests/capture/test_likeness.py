"""Modules of other authors that compute as torch's layers do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from natgrad.capture.kinds import BlockRecord, LayerCall, LayerKind
from natgrad.capture.likeness import kind_alike, kind_by_trial
from natgrad.capture.linear import LinearKind, TransposedLinearKind
from natgrad.capture.normalization import NormalizationKind
from tests import dense
from tests.cases import normal


class Affine(nn.Module):
    """A matrix and a vector, used by a function."""

    def __init__(self, function, shape: tuple[int, ...], bias: int | None = None) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(normal(*shape, seed=1))
        self.bias = None if bias is None else nn.Parameter(normal(bias, seed=2))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, self.bias)


def llama(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-6) -> Tensor:
    return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))


LINEAR = {
    "linear": Affine(functional.linear, (3, 4), 3),
    "square": Affine(functional.linear, (4, 4)),
    "transposed": Affine(lambda x, w, b: x @ w + b, (4, 3), 3),
    "transposed square": Affine(lambda x, w, b: x @ w, (4, 4)),
    "einsum": Affine(lambda x, w, b: torch.einsum("...i,oi->...o", x, w) + b, (3, 4), 3),
    "with a frozen part": Affine(lambda x, w, b: functional.linear(x, w + 1) + x.sum(), (3, 4)),
}
NORMS = {
    "layer norm": Affine(lambda x, w, b: functional.layer_norm(x, (4,), w, b, 1e-5), (4,), 4),
    "other epsilon": Affine(lambda x, w, b: functional.layer_norm(x, (4,), w, b, 1e-3), (4,), 4),
    "rms norm": Affine(llama, (4,)),
    "one plus weight": Affine(lambda x, w, b: llama(x, 1 + w, b, 1e-5), (4,)),
    "without epsilon": Affine(lambda x, w, b: llama(x, w, b, 0.0), (4,)),
}


def over_channels(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    mean = x.mean(1, keepdim=True)
    x = (x - mean) / ((x - mean).square().mean(1, keepdim=True) + eps).sqrt()
    return weight[:, None, None] * x + bias[:, None, None]


class OneGroup(nn.GroupNorm):
    """A group norm with a forward of its own, as in libraries of image models."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


IMAGE_NORMS = {
    "over channels": Affine(over_channels, (4,), 4),
    "rms norm over channels": Affine(
        lambda x, w, b: llama(x.movedim(1, -1), w, b).movedim(-1, 1), (4,)
    ),
    "as many rows as channels": Affine(over_channels, (4,), 4),
    "one group": OneGroup(1, 4).double(),
    "two groups": OneGroup(2, 4, eps=1e-3).double(),
}
OTHERS = {
    "squared": Affine(lambda x, w, b: functional.linear(x, w**2), (3, 4)),
    "normalized": Affine(lambda x, w, b: functional.linear(x, w / w.norm()), (3, 4)),
    "saturated": Affine(lambda x, w, b: functional.linear(x, w).tanh(), (3, 4)),
    "subtracted": Affine(lambda x, w, b: functional.linear(x, w) - b, (3, 4), 3),
    "scaled": Affine(lambda x, w, b: x * w + b, (4,), 4),
    "softmax": Affine(lambda x, w, b: x.softmax(-1) * w, (4,)),
    "over the batch": Affine(lambda x, w, b: (x - x.mean(0)) / x.std(0) * w, (4,)),
    "random": Affine(lambda x, w, b: functional.dropout(functional.linear(x, w)), (3, 4)),
}


def kind_of(module: nn.Module, x: Tensor) -> LayerKind | None:
    return kind_alike(module, x, module(x).detach())


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("name", LINEAR)
def test_linear_maps(name, zero):
    module = LINEAR[name]
    x = normal(5, 2, 4)
    before = torch.get_rng_state()
    if zero:
        saved, module.weight.data = module.weight.data, torch.zeros_like(module.weight)
    kind = kind_of(module, x)
    if zero:
        module.weight.data = saved
    assert type(kind) is (TransposedLinearKind if "transposed" in name else LinearKind)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", [*NORMS, *IMAGE_NORMS])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_norms(name, scale):
    module = (NORMS | IMAGE_NORMS)[name]
    shape = (5, 2, 4)
    if name in IMAGE_NORMS:
        shape = (5, 4, 2, 4) if "as many" in name else (5, 4, 2, 3)
    x = scale * normal(*shape)
    kind = kind_of(module, x)
    assert type(kind_by_trial(module)) is NormalizationKind
    assert type(kind) is NormalizationKind
    names = tuple(n for n, _ in module.named_parameters())
    layout = kind.layout(module, names, names)
    delta = normal(2, *shape, seed=3)
    call = LayerCall(module, "", (x,), (module(x),))
    rows = kind.jacobian(BlockRecord(layout, names, [(call, [delta])], 5, None)).to_dense()
    output = module(x)
    expected = []
    for n in range(5):
        for vector in delta:
            picked = torch.zeros_like(vector)
            picked[n] = vector[n]
            grads = torch.autograd.grad(
                output, list(module.parameters()), picked, retain_graph=True
            )
            expected.append(torch.cat([g.flatten() for g in grads]))
    dense.assert_same(rows, torch.stack(expected), 1e-8)


@pytest.mark.parametrize("name", OTHERS)
def test_other_modules(name):
    assert kind_of(OTHERS[name], normal(5, 2, 4)) is None


def test_modules_with_more_parameters_or_other_inputs():
    module = nn.Bilinear(2, 3, 4)
    assert kind_alike(module, normal(5, 2), normal(5, 4)) is None
    assert kind_alike(nn.Linear(2, 3), torch.ones(5, 2).long(), normal(5, 3)) is None
    assert kind_alike(nn.Sequential(nn.Linear(2, 3)), normal(5, 2), normal(5, 3)) is None


def test_half_precision():
    module = Affine(functional.linear, (3, 4), 3).bfloat16()
    assert type(kind_of(module, normal(8, 4).bfloat16())) is LinearKind
    norm = Affine(lambda x, w, b: llama(x.float(), w, b).to(x.dtype), (4,)).bfloat16()
    assert type(kind_of(norm, normal(8, 4).bfloat16())) is NormalizationKind
