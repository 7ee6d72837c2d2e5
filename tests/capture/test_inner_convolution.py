"""Convolutions with a forward of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import natgrad
from natgrad.capture import Capture
from natgrad.capture.convolution import InnerConvolutionKind
from natgrad.capture.generic import GenericKind
from tests.cases import normal


class Causal(nn.Conv1d):
    """Pads before."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(functional.pad(x, (self.dilation[0] * (self.kernel_size[0] - 1), 0)))


class Cropped(nn.Conv1d):
    """Crops after."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., : x.shape[-1]]


class Same(nn.Conv2d):
    """Pads the lower right, and calls the function."""

    def forward(self, x: Tensor) -> Tensor:
        x = functional.pad(x, [0, self.kernel_size[1] - 1, 0, self.kernel_size[0] - 1])
        return functional.conv2d(x, self.weight, self.bias, self.stride, groups=self.groups)


class Activated(nn.Conv2d):
    """Goes on with an activation in place."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu_(super().forward(x))


class Standardized(nn.Conv2d):
    """Computes its weight."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return functional.conv2d(x, w, self.bias)


class Twice(nn.Conv2d):
    """Convolves twice."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + functional.conv2d(x.flip(2), self.weight)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "causal": (
        lambda: nn.Sequential(
            Causal(4, 6, 3, dilation=2), nn.Tanh(), Causal(6, 6, 2, groups=3, stride=2)
        ),
        (3, 4, 7),
    ),
    "cropped": (
        lambda: nn.Sequential(Cropped(4, 6, 3, padding=2), nn.Tanh(), Cropped(6, 2, 2, padding=1)),
        (3, 4, 7),
    ),
    "same": (
        lambda: nn.Sequential(
            Same(3, 4, 3, stride=2), nn.Tanh(), Same(4, 4, 2, groups=4, bias=False)
        ),
        (3, 3, 5, 6),
    ),
    "activated": (
        lambda: nn.Sequential(
            Activated(3, 4, 3, padding=1, padding_mode="circular"), Activated(4, 3, 2)
        ),
        (3, 3, 5, 6),
    ),
}


def make(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    create, shape = MODELS[name]
    return create().double(), normal(*shape)


def rows(model: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with Capture(model) as capture:
        kinds = [type(use.kind) for block in capture.blocks.values() for use in block.uses]
        assert set(kinds) == {InnerConvolutionKind}
        out = call(x)
        vectors = normal(2, *out.shape, seed=3).to(out.dtype)
        found = capture.pull_back(out, vectors)
        assert not capture.sources.direct
        return found.to_dense()


def expected(
    model: nn.Module, x: Tensor, parameters: Sequence[nn.Parameter] | None = None
) -> Tensor:
    out, parameters = model(x), parameters or list(model.parameters())
    vectors = normal(2, *out.shape, seed=3)
    found = []
    for n in range(len(x)):
        for vector in vectors:
            own = torch.zeros_like(out)
            own[n] = vector[n]
            grads = torch.autograd.grad(out, parameters, own, retain_graph=True)
            found.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(found)


@pytest.mark.parametrize("name", MODELS)
def test_rows(name):
    model, x = make(name)
    torch.testing.assert_close(rows(model, model, x), expected(model, x))


def test_rows_inside_checkpoints():
    model, x = make("causal")
    found = rows(model, lambda x: checkpoint(model, x, use_reentrant=False), x)
    torch.testing.assert_close(found, expected(model, x))


def test_rows_under_autocast():
    model, x = make("same")
    wanted = expected(model, x)

    def call(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x.float())

    torch.testing.assert_close(rows(model.float(), call, x).double(), wanted, rtol=0.1, atol=0.3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cropped", "activated"])
def test_rows_of_compiled_models(name):
    torch._dynamo.reset()
    model, x = make(name)
    compiled: Any = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(rows(model, compiled, x), expected(model, x))
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", [Standardized, Twice])
def test_what_is_no_such_convolution_stays_of_unknown_kind(kind):
    with Capture(kind(3, 4, 2)) as capture:
        (block,) = capture.blocks.values()
        assert type(block.uses[0].kind) is GenericKind


class Functional(nn.Module):
    """Convolves with the kernels of a layer by the function, as state space models do."""

    def __init__(self, again: bool, bias: bool = True) -> None:
        super().__init__()
        self.first, self.again = nn.Conv1d(4, 6, 1), again
        self.layer = nn.Conv1d(6, 6, 3, groups=6, padding=2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        weight = self.layer.weight.squeeze(1).unsqueeze(1)
        out = functional.conv1d(h, weight, bias=self.layer.bias, padding=2, groups=6)
        out = out + self.layer(torch.tanh(h)) if self.again else out
        return out[..., : x.shape[-1]]


@pytest.mark.parametrize("frozen", ["", "weight", "bias"])
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_kernels_used_outside_of_their_layer(again, bias, frozen):
    torch.manual_seed(0)
    model, x = Functional(again, bias).double(), normal(3, 4, 7)
    if frozen and getattr(model.layer, frozen) is not None:
        getattr(model.layer, frozen).requires_grad_(False)
    with Capture(model) as capture:
        out = model(x)
        found = capture.pull_back(out, normal(2, *out.shape, seed=3))
        by_products = bool(capture.sources.by_products)
        names = capture.layout.names
    trained = [dict(model.named_parameters())[name] for name in names]
    assert by_products == model.layer.weight.requires_grad
    torch.testing.assert_close(found.to_dense(), expected(model, x, trained))


@pytest.mark.parametrize("method", [natgrad.KFAC, natgrad.FNGD])
def test_training(method):
    torch.manual_seed(0)
    own = nn.Sequential(Causal(4, 6, 3), nn.Tanh(), Causal(6, 2, 2)).double()
    x = normal(3, 4, 7)
    plain = nn.Sequential(
        nn.ConstantPad1d((2, 0), 0.0), nn.Conv1d(4, 6, 3), nn.Tanh(),
        nn.ConstantPad1d((1, 0), 0.0), nn.Conv1d(6, 2, 2),
    ).double()  # fmt: skip
    for mine, other in ((0, 1), (2, 4)):
        plain[other].load_state_dict(own[mine].state_dict())
    losses = []
    for network in (own, plain):
        torch.manual_seed(1)
        optimizer = method(network)
        for _ in range(4):
            optimizer.zero_grad()
            loss = functional.cross_entropy(network(x), torch.arange(21).reshape(3, 7) % 2)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
