"""What Capture records, on random layers and in every way a model may be run."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import threading
import types
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

import natgrad
from natgrad.capture import Capture, kinds, register_layer
from natgrad.capture.convolution import ConvolutionInputs
from natgrad.capture.hooks import own_backward
from natgrad.fisher import fisher_matrix
from tests import dense
from tests.cases import CASES, Case, generator, normal, rows


def check(model: nn.Module, x, output=None, directions: int = 2) -> None:
    """Compare a model's captured Jacobian with the dense one, as rows and as a Gram matrix."""
    z, jac = dense.jacobian(model, x, output)
    vectors = normal(directions, *z.shape, seed=5)
    with Capture(model, output) as capture:
        result = capture.pull_back(dense.call(model, x, output), vectors)
        assert not capture.uncovered
    expected = dense.rows(jac, vectors).flatten(0, 1)
    v = normal(expected.shape[1], seed=7)  # Before inputs are rearranged for anything else.
    found = result.matvec(v).flatten()
    torch.testing.assert_close(found, expected @ v, rtol=1e-9, atol=1e-10)
    for block in result.values():
        columns = normal(block.layout.numel, 2, seed=8)
        found = block.matvec(columns)
        torch.testing.assert_close(found, block.to_dense() @ columns, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(result.to_dense(), expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(result.gram(), expected @ expected.T, rtol=1e-9, atol=1e-10)


def watched_by_layers(capture: Capture, model: nn.Module, x: Tensor) -> Tensor:
    """Return the output of a pass whose rows, all made of layers, were pulled back."""
    capture.watching = True
    out: Tensor = model(x)
    capture.pull_back(out, normal(1, *out.shape))
    assert not capture.sources.direct
    return out


def check_kfac(model: nn.Module, x, specs, output=None) -> None:
    """Compare K-FAC in both settings with explicit sums."""
    z, _ = dense.jacobian(model, x, output)
    y = normal(*z.shape, seed=6)
    for sharing in ("expand", "reduce", "split"):
        f = fisher_matrix(
            model, (x, y), "gaussian", "kfac", "empirical", output=output, weight_sharing=sharing
        )
        expected = dense.kfac(
            model, x, y, dense.gaussian(), specs, "empirical", sharing=sharing, output=output
        )
        torch.testing.assert_close(f.to_dense(), expected, rtol=1e-9, atol=1e-12)


# -- random layers ---------------------------------------------------------------------------------

PADDING_MODES = ["zeros", "reflect", "replicate", "circular"]


class Mixed(nn.Module):
    """A layer between an elementwise square and a fixed mixing of its outputs."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x).flatten(1)
        weights = torch.linspace(-1, 2, 2 * out.shape[1], dtype=out.dtype).view(out.shape[1], 2)
        return torch.tanh(out) @ weights.cos()


def seeded(make, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return Mixed(make()).double()


@st.composite
def convolutions(draw):
    dims = draw(st.integers(1, 3))
    limit = 3 if dims < 3 else 2

    def per_dim(strategy):
        return tuple(draw(strategy) for _ in range(dims))

    groups = draw(st.integers(1, 3))
    kernel, stride = per_dim(st.integers(1, limit)), per_dim(st.integers(1, 2))
    dilation = per_dim(st.integers(1, 2))
    mode = draw(st.sampled_from(PADDING_MODES))
    padding = draw(st.sampled_from(["same", "valid", "numbers"]))
    if padding == "same":
        stride = (1,) * dims
    elif padding == "numbers":
        padding = per_dim(st.integers(0, 1 if dims < 3 else 1))
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    size = [max(span, 2) + draw(st.integers(0, 2 if dims < 3 else 1)) for span in spans]
    if mode in ("reflect", "circular", "replicate") and padding == "same":
        assume(all(span - 1 < s for span, s in zip(spans, size, strict=True)))
    channels_in = groups * draw(st.integers(1, 2))
    channels_out = groups * draw(st.integers(1, 2))
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    bias = draw(st.booleans())

    def make() -> nn.Module:
        return kind(
            channels_in, channels_out, kernel, stride, padding, dilation, groups, bias, mode
        )

    model = seeded(make, draw(st.integers(0, 99)))
    names = ["weight", "bias"] if bias else ["weight"]
    return model, normal(draw(st.integers(1, 3)), channels_in, *size), (rows("layer", *names),)


@given(convolutions())
def test_convolutions(case):
    model, x, specs = case
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch on padding="same"
        check(model, x)
        check_kfac(model, x, specs)


class DepthwiseTwice(nn.Module):
    """Two images per sample, and one of them once more in part, through one layer."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.layer = nn.Conv2d(
            4, 2, (2, 3), stride=(2, 1), padding=1, dilation=(1, 2), groups=2, bias=bias
        )

    def forward(self, x: Tensor) -> Tensor:
        both = self.layer(x.flatten(0, 1)).unflatten(0, (len(x), 2))
        part = self.layer(x[:, 0, :, 1:])
        return torch.cat([both.flatten(1), part.flatten(1)], dim=1)


@pytest.mark.parametrize("bias", [False, True])
def test_gradients_of_samples_of_depthwise_convolutions_need_no_patches(bias, monkeypatch):
    """Which take many times the memory of the images."""
    torch.manual_seed(0)
    model = DepthwiseTwice(bias).double()
    x = normal(3, 2, 4, 7, 6).float().double()  # To be the same in single precision.
    model.load_state_dict({k: v.float().double() for k, v in model.state_dict().items()})
    z, jac = dense.jacobian(model, x)
    vectors = normal(1, *z.shape, seed=5).float()
    expected = dense.rows(jac, vectors.double())
    monkeypatch.setattr(ConvolutionInputs, "__call__", lambda *_: pytest.fail("patches are made"))
    model.float()
    with Capture(model) as capture:
        (found,) = capture.pull_back(model(x.float()), vectors).values()
    v, w = normal(expected.shape[2], 3, seed=7), normal(3, 3, seed=8)
    for one, other in (
        (found.to_dense(), expected[:, 0]),
        (found.layout.flat(found.per_sample_gradients(1, 3)), expected[1:]),
        (found.matvec(v.float()), expected[:, 0] @ v),
        (found.rmatvec(w.float()), expected[:, 0].T @ w),
        (found.diagonal(), expected.square().sum((0, 1))),
    ):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


@given(convolutions(), st.integers(1, 2))
def test_gradients_of_samples_without_patches_are_those_of_patches(case, directions):
    model, x, _ = case
    layer = model.layer
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch on padding="same"
        out = layer(x)
    kind = kinds.find_kind(layer)
    names = tuple(name for name, _ in layer.named_parameters())
    layout = kind.layout(layer, names, names)
    inputs = ConvolutionInputs([kinds.LayerCall(layer, "", (x,), (out,))], layout, len(x))
    patches = inputs(None, None)  # (N, T, G, d_in)
    delta = normal(len(x), directions, patches.shape[1], layout.groups, layout.d_out)
    expected = torch.einsum("nktgo,ntgi->nkgoi", delta, patches)
    torch.testing.assert_close(inputs.sample_gradients(delta, 0), expected)
    last = inputs.sample_gradients(delta[-1:], len(x) - 1)
    torch.testing.assert_close(last, expected[-1:])
    mean = patches.mean(1, keepdim=True)
    torch.testing.assert_close(inputs.mean(), mean)


@st.composite
def transposed_convolutions(draw):
    dims = draw(st.integers(1, 3))

    def per_dim(strategy):
        return tuple(draw(strategy) for _ in range(dims))

    groups = draw(st.integers(1, 2))
    kernel, stride = per_dim(st.integers(1, 3 if dims < 3 else 2)), per_dim(st.integers(1, 2))
    dilation, padding = per_dim(st.integers(1, 2)), per_dim(st.integers(0, 1))
    extra = tuple(
        draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
    )
    size = per_dim(st.integers(1, 3))
    for k, d, p, s, n, e in zip(kernel, dilation, padding, stride, size, extra, strict=True):
        assume((n - 1) * s - 2 * p + d * (k - 1) + e + 1 > 0)
    channels_in = groups * draw(st.integers(1, 2))
    channels_out = groups * draw(st.integers(1, 2))
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    bias = draw(st.booleans())

    def make() -> nn.Module:
        return kind(
            channels_in, channels_out, kernel, stride, padding, extra, groups, bias, dilation
        )

    model = seeded(make, draw(st.integers(0, 99)))
    names = ("layer.weight", "layer.bias") if bias else ("layer.weight",)
    specs = [dense.BlockSpec(names, "layer", "transposed")]
    return model, normal(draw(st.integers(1, 3)), channels_in, *size), specs


@given(transposed_convolutions())
def test_transposed_convolutions(case):
    model, x, specs = case
    check(model, x)
    check_kfac(model, x, specs)


def test_transposed_convolution_with_a_given_output_size():
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.ConvTranspose1d(2, 2, 3, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x, output_size=[8]).flatten(1)

    torch.manual_seed(0)
    check(Sized().double(), normal(2, 2, 3))


@given(
    st.integers(1, 4), st.integers(1, 4), st.booleans(),
    st.sampled_from([(), (1,), (3,), (2, 2), (1, 2, 2)]), st.integers(1, 4), st.integers(0, 99),
)  # fmt: skip
def test_linear_of_any_rank(d_in, d_out, bias, lead, samples, seed):
    model = seeded(lambda: nn.Linear(d_in, d_out, bias), seed)
    x = normal(samples, *lead, d_in, seed=seed)
    check(model, x)
    check_kfac(model, x, (rows("layer", *(["weight", "bias"] if bias else ["weight"])),))


@st.composite
def norms(draw):
    samples, channels = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    spatial = tuple(draw(st.integers(1, 3)) for _ in range(draw(st.integers(0, 3))))
    kind = draw(
        st.sampled_from(["layer", "layer2", "rms", "group", "batch", "batch eval", "instance"])
    )
    bias = True
    if kind == "layer":
        shape, make = (samples, *spatial, channels), lambda: nn.LayerNorm(channels)
    elif kind == "layer2":
        bias = draw(st.booleans())
        shape = (samples, *spatial, channels, 2)
        make = lambda: nn.LayerNorm((channels, 2), bias=bias)  # noqa: E731
    elif kind == "rms":
        bias = False
        shape, make = (samples, *spatial, channels), lambda: nn.RMSNorm(channels, eps=1e-2)
    elif kind == "group":
        groups = draw(st.integers(1, 3))
        assume(samples * channels * int(torch.Size(spatial).numel()) > 1)  # torch insists
        shape = (samples, groups * channels, *spatial)
        make = lambda: nn.GroupNorm(groups, groups * channels)  # noqa: E731
    elif kind.startswith("batch"):
        shape = (samples, channels, *spatial)
        layer = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
        track = draw(st.booleans())
        make = lambda: layer[len(spatial)](channels, track_running_stats=track)  # noqa: E731
        assume(samples * int(torch.Size(spatial).numel()) > 1)
    else:
        assume(spatial and torch.Size(spatial).numel() > 1)
        shape = (samples, channels, *spatial)
        layer = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
        track = draw(st.booleans())
        make = lambda: layer[len(spatial)](  # noqa: E731
            channels, affine=True, track_running_stats=track
        )
    model = seeded(make, 0)
    model.train(kind != "batch eval" and draw(st.booleans()) or kind == "batch")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * normal(*parameter.shape, seed=1))
    unit = "entries" if kind == "layer2" else "rows"
    names = tuple(f"layer.{name}" for name in (["weight", "bias"] if bias else ["weight"]))
    specs = (dense.BlockSpec(names, "layer", unit),)
    return model, normal(*shape, seed=draw(st.integers(0, 99))), specs


@given(norms())
def test_norms(case):
    model, x, specs = case
    check(model, x)
    check_kfac(model, x, specs)


@given(
    st.integers(1, 5), st.integers(1, 3), st.sampled_from([(), (1,), (4,), (2, 3)]),
    st.booleans(), st.integers(1, 3), st.integers(0, 99),
)  # fmt: skip
def test_embeddings(vocabulary, width, lead, padded, samples, seed):
    padding = seed % vocabulary if padded else None
    model = seeded(lambda: nn.Embedding(vocabulary, width, padding_idx=padding), seed)
    tokens = torch.randint(0, vocabulary, (samples, *lead), generator=generator(seed))
    check(model, tokens)
    z, _ = dense.jacobian(model, tokens)
    y = normal(*z.shape, seed=6)
    specs = (dense.BlockSpec(("layer.weight",), "layer", "columns"),)
    f = fisher_matrix(model, (tokens, y), "gaussian", "kfac", "empirical")
    expected = dense.kfac(model, tokens, y, dense.gaussian(), specs, "empirical")
    torch.testing.assert_close(f.to_dense(), expected, rtol=1e-9, atol=1e-12)


@st.composite
def attentions(draw):
    heads = draw(st.integers(1, 2))
    width = heads * draw(st.integers(1, 2))
    batch_first, bias = draw(st.booleans()), draw(st.booleans())
    samples, queries = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kind = draw(st.sampled_from(["self", "memory", "key and value", "other sizes"]))
    keys = queries if kind == "self" else draw(st.integers(1, 3))
    sizes = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    kdim, vdim = sizes if kind == "other sizes" else (None, None)
    torch.manual_seed(draw(st.integers(0, 99)))
    layer = nn.MultiheadAttention(
        width, heads, bias=bias, kdim=kdim, vdim=vdim, batch_first=batch_first
    )
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = normal(samples, queries, width)
    memory = normal(samples, keys, kdim or width, seed=1)
    value = normal(samples, keys, vdim or width, seed=2)
    options = {
        "need_weights": draw(st.booleans()),
        "average_attn_weights": draw(st.booleans()),
    }
    if draw(st.booleans()):
        mask = torch.rand(samples, keys, generator=generator(3)) < 0.4
        mask[:, 0] = False
        options["key_padding_mask"] = mask
    if draw(st.booleans()):
        options["attn_mask"] = normal(queries, keys, seed=4)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = layer

        def forward(self, x: Tensor, memory: Tensor, value: Tensor) -> Tensor:
            x = torch.sin(x)
            key = x if kind == "self" else memory
            val = {"self": x, "memory": memory}.get(kind, value)
            inputs = [x, key, val]
            if not batch_first:
                flipped = {id(t): t.transpose(0, 1) for t in inputs}
                inputs = [flipped[id(t)] for t in inputs]
            out, _ = self.attention(*inputs, **options)
            return torch.tanh(out if batch_first else out.transpose(0, 1))

    return Model().double(), (x, memory, value)


@given(attentions())
def test_attention(case):
    model, x = case
    check(model, x)


def test_attention_called_twice_and_nested():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(2, 1, batch_first=True)
            self.decoder = nn.TransformerDecoderLayer(2, 1, 3, dropout=0.0, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x, _ = self.attention(x, x, x)
            x, _ = self.attention(x, torch.sin(x), x)
            return self.decoder(x, torch.cos(x)).mean(1)

    torch.manual_seed(0)
    check(Twice().double(), normal(2, 3, 2))


def test_attention_with_bias_tokens():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(2, 1, add_bias_kv=True, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, torch.sin(x), x)[0]

    torch.manual_seed(0)
    check(Model().double(), normal(3, 2, 2))


@given(
    st.sampled_from([nn.LSTM, nn.GRU, nn.RNN]), st.booleans(), st.booleans(), st.integers(1, 2),
    st.integers(1, 3),
)  # fmt: skip
def test_recurrent_layers(kind, batch_first, bidirectional, depth, samples):
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = kind(2, 2, depth, batch_first=batch_first, bidirectional=bidirectional)

        def forward(self, x: Tensor) -> Tensor:
            out, state = self.layer(x if batch_first else x.transpose(0, 1))
            state = state[0] if isinstance(state, tuple) else state
            out = out if batch_first else out.transpose(0, 1)
            return torch.cat([out.flatten(1), state.transpose(0, 1).flatten(1)], 1)

    torch.manual_seed(0)
    check(Last().double().eval(), normal(samples, 3, 2))


def test_recurrent_layers_with_an_initial_state():
    class Stateful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.GRU(2, 2, batch_first=True)

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            return self.layer(x, h)[0].flatten(1)

    torch.manual_seed(0)
    check(Stateful().double(), (normal(3, 2, 2), normal(1, 3, 2, seed=1)))


# -- modules natgrad does not know -----------------------------------------------------------------


def test_an_overridden_forward_is_not_taken_for_its_parents():
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x) ** 2

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), Doubled(3, 2), nn.Tanh()).double()
    check(model, normal(4, 3))
    patched = nn.Sequential(nn.Linear(3, 2)).double()
    layer = patched[0]
    layer.forward = types.MethodType(
        lambda self, x: functional.linear(x, self.weight.square(), self.bias), layer
    )
    check(patched, normal(4, 3))


class NormAndMore(nn.BatchNorm2d):
    """A batch norm that applies an activation, too, as timm's do."""

    def __init__(self, channels: int, act: nn.Module, affine: bool = True) -> None:
        super().__init__(channels, affine=affine)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        x = functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training
        )
        return self.act(x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norms_that_go_on(training, affine):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 2), NormAndMore(3, nn.ReLU(inplace=True), affine),
        nn.Conv2d(3, 3, 1), NormAndMore(3, nn.PReLU(3), affine), NormAndMore(3, nn.Identity()),
        nn.Conv2d(3, 2, 2), NormAndMore(2, nn.Sequential(nn.SiLU(), nn.Sigmoid())), nn.Flatten(),
    ).double().train(training)  # fmt: skip
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    x = normal(5, 1, 3, 3)
    check(model, x)
    with Capture(model) as capture:
        out = watched_by_layers(capture, model, x)
        assert all(axis is not None for axis in capture.sources.axes.values())
        if not training:  # In training the loss's own gradient flows through the statistics.
            out.square().sum().backward()
            found = capture.user_jacobians(capture.passes[-1])
            total = found.rmatvec(torch.ones(found.rows, 1, dtype=torch.float64)).flatten()
            gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
            torch.testing.assert_close(total, gradient)


def test_rectifiers_with_slopes():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 2), nn.PReLU(3), nn.Conv2d(3, 2, 1), nn.PReLU(), nn.Flatten(),
        nn.Linear(8, 4), nn.PReLU(4), nn.Linear(4, 2), nn.PReLU(),
    ).double()  # fmt: skip
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([0.2, -0.5, 2.0]))
    check(model, normal(5, 1, 3, 3))
    with Capture(model) as capture:
        out = model(normal(5, 1, 3, 3))
        capture.pull_back(out, normal(1, *out.shape))
        assert all(axis is not None for axis in capture.sources.axes.values())


def test_batch_norms_of_ones_own():
    class Twice(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(2 * x + 1)

    class ByHand(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            return (x - x.mean(0)) * self.weight + self.bias

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), Twice(4), nn.Tanh(), nn.Linear(4, 2)).double()
    with Capture(model) as capture:  # Its input is not that of the norm: rows are not the norm's.
        out = model(normal(5, 3))
        capture.pull_back(out, normal(1, *out.shape), independent=True)
        assert set(capture.sources.direct) == {"1"}
    model = nn.Sequential(nn.Linear(3, 4), ByHand(4), nn.Tanh(), nn.Linear(4, 2)).double()
    with Capture(model) as capture:
        out = model(normal(5, 3))
        capture.pull_back(out, normal(1, *out.shape), independent=True)
        assert set(capture.sources.direct) == {"1"}
        assert capture.sources.axes[capture.passes[-1].calls[0].place] is None


def test_a_subclass_that_keeps_forward_is_its_parent():
    class Named(nn.Linear):
        pass

    model = nn.Sequential(Named(3, 2)).double()
    check(model, normal(4, 3))
    check_kfac(model, normal(4, 3), (rows("0"),))


def test_parameters_of_the_root_module():
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.5))
            self.layer = nn.Linear(3, 2)
            self.power = nn.Parameter(torch.tensor([0.5, 2.0]))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.layer(x)) * self.power + self.scale * x[:, :2]

    check(Root().double(), normal(4, 3))


def test_parameters_named_alike():
    class Alike(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_weight = nn.Parameter(torch.randn(31, 33))  # Too many for a dense block.
            self.q_bias, self.q = nn.Parameter(torch.randn(31)), nn.Linear(3, 33)
            self.up, self.up_bias = nn.Parameter(torch.randn(31, 2)), nn.Parameter(torch.randn(2))

        def forward(self, x: Tensor) -> Tensor:
            hidden = functional.linear(torch.tanh(self.q(x)), self.q_weight, self.q_bias)
            return torch.tanh(hidden) @ self.up + self.up_bias

    torch.manual_seed(0)
    model = nn.Sequential(Alike()).double()
    check(model, normal(4, 3))
    with Capture(model) as capture:
        names = [n for block in capture.blocks.values() for n in block.layout.names]
        assert sorted(names) == sorted(n for n, _ in model.named_parameters())
        assert set(capture.blocks) == {
            "0.q_weight", "0.q_bias", "0.q", "0.up", "0.up_bias",
        }  # fmt: skip


def test_generic_modules_with_masks_and_options():
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 3))

        def forward(self, x: Tensor, mask: Tensor, *, scale: float = 1.0) -> Tensor:
            return scale * torch.sin(x @ self.weight) * mask

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Masked()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, torch.tensor([1.0, 0.0, 2.0], dtype=x.dtype), scale=3.0)

    torch.manual_seed(0)
    check(Model().double(), normal(4, 3))


class Coupled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(3))
        self.norm = nn.BatchNorm1d(3, affine=False)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.norm(x + self.shift.exp()))


@pytest.mark.parametrize("frozen", [(), ("norm",), ("norm", "drop")])
def test_modules_that_cannot_run_again_get_rows_from_the_gradient_at_their_parameters(frozen):
    model = Coupled().double()
    for name in frozen:
        model.get_submodule(name).eval()
    with Capture(model) as capture:
        assert not capture.uncovered
        assert set(capture.sources.direct) == (set() if len(frozen) == 2 else {"Coupled"})
        out = model(normal(4, 3))
        vectors = normal(2, *out.shape, seed=1)
        rows = capture.pull_back(out, vectors)
    for direction, vector in enumerate(vectors):
        for sample in range(4):
            alone = torch.zeros_like(vector)
            alone[sample] = vector[sample]
            with own_backward(out) as root:  # Batch statistics are constants.
                (wanted,) = torch.autograd.grad(root, model.shift, alone, retain_graph=True)
            torch.testing.assert_close(
                rows.to_dense().unflatten(0, (4, 2))[sample, direction], wanted
            )


def test_a_module_that_becomes_random_is_not_run_again():
    model = Coupled().double()
    model.norm.eval()
    model.drop.eval()
    with Capture(model) as capture:
        assert capture.sources.direct == {}
        out = model(normal(4, 3))
        capture.pull_back(out, normal(1, *out.shape))
        assert capture.sources.direct == {}
        model.drop.train()
        out = model(normal(4, 3))
        vector = normal(1, *out.shape, seed=1)
        rows = capture.pull_back(out, vector)
        assert "dropout" in capture.sources.direct["Coupled"]
    (wanted,) = torch.autograd.grad(out, model.shift, vector[0])
    torch.testing.assert_close(rows.to_dense().sum(0), wanted)


def test_a_layer_whose_gradient_is_no_sum_of_rows_is_reported():
    with Capture(nn.Embedding(3, 2, scale_grad_by_freq=True)) as capture:
        assert "frequency" in capture.uncovered["weight"]


@pytest.fixture
def registry():
    """Forget layers registered in a test."""
    before = dict(kinds._KINDS)
    yield
    kinds._KINDS.clear()
    kinds._KINDS.update(before)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class PerChannel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(3))
        self.shift = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_what_costs_nothing_is_not_told(fisher):
    """Parameters used elsewhere, and weight norm, which has no rule for batches in torch."""

    class Powers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(40, 40)
            conv = nn.Conv1d(1, 36, 31, padding="same")
            self.b, self.c = nn.utils.parametrizations.weight_norm(conv), nn.Linear(40, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = functional.linear(torch.tanh(self.a(x)), self.a.weight.square())
            return self.c(torch.tanh(self.b(h.unsqueeze(1))).mean(1))

    torch.manual_seed(0)
    model = Powers()
    x, y = torch.randn(6, 40), torch.tensor([0, 1, 1, 0, 1, 0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = natgrad.KFAC(model, fisher=fisher)
        for _ in range(3):
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    told = [str(one.message) for one in caught]
    if fisher == "mc":
        assert not told
    else:
        assert any(
            "block of 'a.weight' and 'a.bias' (Linear) is used outside" in one for one in told
        )
        assert any("is of a kind without a formula" in one for one in told)


class Mapped(nn.Module):
    """A model that maps layers over the samples itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(self.layers)(x)


def test_layers_inside_of_vmap():
    torch.manual_seed(0)
    model, x = Mapped().double(), normal(5, 3)
    with Capture(model) as capture, pytest.warns(UserWarning, match="without a call"):
        found = capture.pull_back(model(x), normal(2, 5, 2, seed=3)).to_dense()
    with Capture(model.layers) as capture:
        wanted = capture.pull_back(model.layers(x), normal(2, 5, 2, seed=3)).to_dense()
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("function", [torch.func.jacrev, torch.func.jacfwd, torch.func.hessian])
def test_transforms_of_a_model_in_training(function):
    x, y, losses = normal(5, 3).float(), torch.tensor([0, 1, 1, 0, 1]), []
    for looks in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
        optimizer = natgrad.KFAC(model)
        for _ in range(3):
            optimizer.zero_grad()
            if looks:
                state = {name: p.detach() for name, p in model.eval().named_parameters()}
                call = functools.partial(torch.func.functional_call, model)
                torch.vmap(function(call), (None, 0))(state, x.unsqueeze(1))
                model.train()
            loss = functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == losses[1]


class Scale(nn.Module):
    """A linear layer of one's own, which torch.fx looks into."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight)


EXPORTS = {
    "export": lambda model, x: torch.export.export(model, (x,)).module()(x),
    "fx": lambda model, x: torch.fx.symbolic_trace(model)(x),
    "trace": lambda model, x: torch.jit.trace(model, x, check_trace=False)(x),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_exports_of_a_model_in_training(name):
    x, y, losses = normal(5, 3).float(), torch.tensor([0, 1, 1, 0, 1]), []
    for exports in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), Scale(), nn.Tanh(), nn.Linear(4, 2))
        optimizer = natgrad.KFAC(model)
        for _ in range(3):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            if exports:
                torch.testing.assert_close(EXPORTS[name](model, x), model(x))
        losses.append(loss.item())
    assert losses[0] == losses[1]


def test_gradients_at_inputs_alone_are_not_those_of_training():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    with Capture(model) as capture:
        capture.on_backward = lambda recorded: None
        x = normal(5, 3).requires_grad_()
        out, vectors = model(x), normal(2, 5, 2)
        (recorded,) = capture.passes
        torch.autograd.grad(out, x, vectors[0], create_graph=True)
        assert recorded.cotangent is None and not recorded.retained
        for wanted in ([x, *model.parameters()], list(model.parameters())):
            torch.autograd.grad(out, wanted, vectors[1], create_graph=True)
            torch.testing.assert_close(recorded.cotangent, vectors[1])
            assert recorded.retained
            recorded.cotangent = None


@pytest.mark.parametrize("kind", [natgrad.KFAC, natgrad.ExactNGD])
def test_a_loss_of_derivatives_whose_graph_is_kept(kind):
    x, y, found = normal(16, 3).float(), normal(16, 3, seed=1).float(), []
    for keeps in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
        optimizer = kind(model, "gaussian")
        with pytest.warns(UserWarning, match="saw no backward pass") as told:
            for _ in range(3):
                optimizer.zero_grad()
                inputs = x.clone().requires_grad_()
                (score,) = torch.autograd.grad(model(inputs).sum(), inputs, create_graph=True)
                (score - y).square().sum(1).mean().backward(retain_graph=keeps)
                optimizer.step()
        assert len(told) == 1
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*found)


class Pooled(nn.Module):
    """Sums nodes of graphs, which lie one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor, sizes: list[int]) -> Tensor:
        graph = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        pooled = x.new_zeros(len(sizes), 5).index_add(0, graph, torch.tanh(self.first(x)))
        return self.last(pooled)


@pytest.mark.parametrize("odd", [[2, 4, 5, 5], [2, 4, 3, 4]])
def test_graphs_that_are_equally_large_at_first(odd):
    """Whether or not their nodes could be shared out equally among them."""
    model = Pooled().double()
    with Capture(model) as capture:
        for sizes in ([3] * 4, [3] * 4, [3] * 4, [3] * 4, odd, [2, 4, 3, 3], [5, 1, 4, 2], [3] * 4):
            out = model(normal(sum(sizes), 3), sizes)
            vectors = normal(2, *out.shape)
            found = capture.pull_back(out, vectors).to_dense()
            each = [out[n] @ vectors[k, n] for n in range(len(out)) for k in range(2)]
            rows = [
                torch.autograd.grad(z, list(model.parameters()), retain_graph=True) for z in each
            ]
            truth = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
            torch.testing.assert_close(found, truth)


class Interrupted(nn.Module):
    """A model that runs in other threads, too, in the middle of a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.weight = nn.Linear(3, 4), nn.Parameter(normal(4, 2).float())
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.meanwhile = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).unsqueeze(1)
        h = torch.cat([h, h.roll(1, -1)], 1)
        h = self.attention(h, h, h, need_weights=False)[0].sum(1)
        if self.meanwhile is not None and threading.current_thread() is threading.main_thread():
            with ThreadPoolExecutor(1) as pool:
                pool.submit(self.meanwhile).result()
        return torch.tanh(h) @ self.weight


@pytest.mark.parametrize("with_gradients", [False, True])
def test_passes_of_other_threads(with_gradients):
    x, y, found = normal(5, 3).float(), torch.tensor([0, 1, 1, 0, 1]), []
    for interrupted in (False, True):
        torch.manual_seed(0)
        model = Interrupted()
        optimizer = natgrad.KFAC(model)

        def evaluate(model=model):
            with torch.set_grad_enabled(with_gradients):
                model(x[:2])

        model.meanwhile = evaluate if interrupted else None
        for _ in range(3):
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*found)


def test_hooks_go_with_their_owner():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    capture = Capture(model)
    assert any(module._forward_hooks for module in model.modules())
    del capture
    gc.collect()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    torch.jit.script(model)


class Standardized(nn.Conv2d):
    """A convolution whose weight is standardised first, as in networks without batch norm."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
        return functional.conv2d(x, w, self.bias)


def test_many_layers_without_a_formula_are_named_in_one_sentence():
    model = nn.Sequential(*[Standardized(12, 12, 3) for _ in range(8)], nn.Flatten())
    with pytest.warns(UserWarning, match=r"'0.weight' \(Standardized\)") as caught:
        Capture(model).remove()
    (told,) = [str(one.message) for one in caught]
    assert "and 2 more are each of a kind without a formula: rows of 10,368 parameters" in told
    assert "take 5.1 MiB" in told


@pytest.mark.parametrize("make", ["script", "trace"])
@pytest.mark.parametrize("width", [4, 400])
def test_modules_that_are_programs(make, width):
    part: nn.Module = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.LayerNorm(width)).double()
    part = torch.jit.script(part) if make == "script" else torch.jit.trace(part, normal(2, 3))
    model = nn.Sequential(nn.Linear(2, 3), part, nn.Linear(width, 2)).double()
    with pytest.warns(UserWarning, match=r"a program that torch.jit made \('1'\)") as caught:
        capture = Capture(model)
    assert len(caught) == 1
    with capture:
        assert not capture.uncovered
        vectors = normal(2, 5, 2)
        for _ in range(3):
            out = model(normal(5, 2))
            found = capture.pull_back(out, vectors).to_dense()
            each = [(out[n] @ vectors[k, n]) for n in range(5) for k in range(2)]
            rows = [
                torch.autograd.grad(z, list(model.parameters()), retain_graph=True) for z in each
            ]
            truth = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
            torch.testing.assert_close(found, truth)


def test_a_program_that_shares_a_weight():
    table = nn.Linear(3, 3).double()
    traced = torch.jit.trace(nn.Sequential(table), normal(2, 3))
    model = nn.Sequential(nn.Linear(3, 3, bias=True).double(), traced, nn.Tanh())
    model[0].weight = next(traced.parameters())
    with pytest.warns(UserWarning, match="a program that torch.jit made"):
        capture = Capture(model)
    with capture:
        assert not capture.uncovered
        out, vectors = model(normal(5, 3)), normal(1, 5, 3)
        found = capture.pull_back(out, vectors).to_dense().sum(0)
        truth = torch.autograd.grad((out * vectors[0]).sum(), list(model.parameters()))
        torch.testing.assert_close(found, torch.cat([g.flatten() for g in truth]))


def test_a_model_that_is_a_program():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh()).double()
    with pytest.raises(ValueError, match="hand it over as it was before it was scripted"):
        Capture(torch.jit.script(model))
    traced = torch.jit.trace(model, normal(2, 3))
    with pytest.warns(UserWarning, match=r"a program that torch.jit made \(the model\)"):
        capture = Capture(traced)
    with capture:
        out, vectors = traced(normal(5, 3)), normal(1, 5, 4)
        found = capture.pull_back(out, vectors).to_dense().sum(0)
        truth = torch.autograd.grad((out * vectors[0]).sum(), list(traced.parameters()))
        torch.testing.assert_close(found, torch.cat([g.flatten() for g in truth]))


def test_layers_of_ones_own(registry):
    calls = []

    def scaled_rows(module, inputs, gradients):
        calls.append("scaled")
        return inputs[0].unsqueeze(1), 2 * gradients.transpose(0, 1).unsqueeze(2)

    def channel_rows(module, inputs, gradients):
        calls.append("channel")
        gradients = gradients.transpose(0, 1)
        return {"scale": gradients * inputs[0].unsqueeze(1), "shift": gradients}

    register_layer(Scaled, scaled_rows)
    register_layer(PerChannel, channel_rows, parameters=("scale", "shift"))
    torch.manual_seed(0)
    model = nn.Sequential(Scaled(2, 3), nn.Tanh(), PerChannel(), nn.Tanh(), Scaled(3, 2)).double()
    check(model, normal(4, 2))
    assert set(calls) == {"scaled", "channel"}
    with pytest.raises(TypeError, match="subclass"):
        register_layer(PerChannel(), channel_rows)


# -- ways to run a model ---------------------------------------------------------------------------

MODELS = [
    "mlp", "conv2d", "batch_norm_train", "self_attention", "lstm", "checkpointed", "tied_embedding",
]  # fmt: skip


def hook_count(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("name", list(CASES))
def test_hooks_do_not_change_what_a_model_computes(name):
    case = CASES[name]()
    model, plain = copy.deepcopy(case.model), copy.deepcopy(case.model)
    expected = dense.call(plain, case.x, case.output)
    expected.square().sum().backward()
    with Capture(model, case.output) as capture:
        assert hook_count(model) > 0
        out = dense.call(model, case.x, case.output)
        assert torch.equal(out, expected)
        capture.pull_back(out, normal(2, *out.shape))
        assert all(p.grad is None for p in model.parameters())
        out.square().sum().backward()
    assert hook_count(model) == 0
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        if theirs.grad is None:
            assert mine.grad is None
        else:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-12, atol=1e-14)
    for mine, theirs in zip(model.buffers(), plain.buffers(), strict=True):
        assert torch.equal(mine, theirs)


def pulled(capture: Capture, model: nn.Module, case: Case) -> Tensor:
    out = dense.call(model, case.x, case.output)
    return capture.pull_back(out, normal(2, *out.shape, seed=5)).to_dense()


def expected_rows(case: Case) -> Tensor:
    z, jac = case.jacobian
    return dense.rows(jac, normal(2, *z.shape, seed=5)).flatten(0, 1)


@pytest.mark.parametrize("name", MODELS)
def test_recording_again_and_after_the_users_backward(name):
    case = CASES[name]()
    model = copy.deepcopy(case.model)
    with Capture(model, case.output) as capture:
        for _ in range(3):
            dense.assert_same(pulled(capture, model, case), expected_rows(case))
            out = dense.call(model, case.x, case.output)
            vectors = normal(2, *out.shape, seed=5)
            first = capture.pull_back(out, vectors).to_dense()
            out.sum().backward(retain_graph=True)
            second = capture.pull_back(out, vectors).to_dense()
            dense.assert_same(first, expected_rows(case))
            dense.assert_same(second, first)
            capture.clear()


def test_two_forward_passes_are_kept_apart():
    case = CASES["mlp"]()
    x2 = normal(2, 3, seed=8)
    with Capture(case.model) as capture:
        first, second = case.model(case.x), case.model(x2)
        rows_of_first = capture.pull_back(first, normal(2, *first.shape, seed=5)).to_dense()
        rows_of_second = capture.pull_back(second, normal(2, *second.shape, seed=5)).to_dense()
    dense.assert_same(rows_of_first, expected_rows(case))
    z, jac = dense.jacobian(case.model, x2)
    expected = dense.rows(jac, normal(2, *z.shape, seed=5)).flatten(0, 1)
    dense.assert_same(rows_of_second, expected)


def test_nothing_is_recorded_without_gradients_or_when_idle():
    case = CASES["mlp"]()
    with Capture(case.model) as capture:
        with torch.no_grad():
            out = case.model(case.x)
        with torch.inference_mode():
            case.model(case.x)
        assert not capture.passes
        capture.recording = False
        idle = case.model(case.x)
        assert not capture.passes
        with pytest.raises(RuntimeError, match="recorded"):
            capture.pull_back(idle, normal(1, *idle.shape))
        assert not out.requires_grad
        capture.recording = True
        dense.assert_same(pulled(capture, case.model, case), expected_rows(case))
        capture.remove()
        case.model(case.x)
        assert not capture.passes


def test_passes_that_are_never_pulled_back_do_not_pile_up(monkeypatch):
    case = CASES["mlp"]()
    with Capture(case.model) as capture:
        for _ in range(50):
            case.model(case.x)
        assert len(capture.passes) == 50
        monkeypatch.setattr("natgrad.capture.capture.WAITING_ELEMENTS", 0)
        case.model(case.x)
        assert len(capture.passes) == 51
        monkeypatch.setitem(capture.__class__.__init__.__globals__["WAITING_PASSES"], True, 4)
        case.model(case.x)
        assert len(capture.passes) == 4


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_of_a_captured_model(name, way):
    case = CASES[name]()
    with Capture(case.model, case.output) as capture:
        if way == "deepcopy":
            twin = copy.deepcopy(case.model)
        else:
            twin = pickle.loads(pickle.dumps(case.model))
        out = dense.call(twin, case.x, case.output)
        torch.testing.assert_close(out, dense.call(case.model, case.x, case.output))
        capture.clear()
        dense.call(twin, case.x, case.output)
        assert not capture.passes, "a copy must not be recorded"
        with Capture(twin, case.output) as second:
            dense.assert_same(pulled(second, twin, case), expected_rows(case))
        dense.assert_same(pulled(capture, case.model, case), expected_rows(case))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, backend",
    [
        ("repeated", "eager"),
        ("mlp", "aot_eager"),
        ("conv2d", "aot_eager"),
        ("batch_norm_train", "aot_eager"),
        ("self_attention", "aot_eager"),
        ("cross_attention_other_sizes", "eager"),
    ],
)
def test_compiled_models(name, backend):
    case = CASES[name]()
    model = copy.deepcopy(case.model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    with Capture(compiled, case.output) as capture:
        assert set(capture.layout.names) == set(dense.parameters(model))
        for _ in range(2):
            dense.assert_same(pulled(capture, compiled, case), expected_rows(case))
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["mlp", "conv2d", "layer_norm", "embedding", "rms_norm"])
def test_autocast(name):
    case = CASES[name]()
    model = copy.deepcopy(case.model).float()
    x = case.x.float() if case.x.is_floating_point() else case.x
    with Capture(model) as capture:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
            with torch.autocast("cpu", enabled=False):
                pass
        result = capture.pull_back(out, normal(2, *out.shape, seed=5).to(out.dtype))
    actual = result.to_dense()
    assert actual.dtype == torch.float32
    error = (actual.double() - expected_rows(case)).norm() / expected_rows(case).norm()
    assert error < 0.05


def test_in_place_operations_after_a_layer():
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Conv1d(1, 2, 2)
            self.norm, self.c = nn.BatchNorm1d(2), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x).relu_().unsqueeze(1)
            h = self.norm(functional.silu(self.b(h), inplace=True)).sigmoid_()
            return self.c(h.flatten(1)).tanh_()

    torch.manual_seed(0)
    check(InPlace().double(), normal(4, 3))


@pytest.mark.parametrize("bias", [True, False])
def test_in_place_operations_after_a_layer_on_tokens(bias):
    """Whose output is a view, of which such an operation makes another."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 4, bias=bias), nn.ReLU(inplace=True),
        nn.Linear(4, 4, bias=bias), nn.SiLU(inplace=True), nn.Linear(4, 2, bias=bias),
    ).double()  # fmt: skip
    x = normal(4, 3, 3)
    check(model, x)
    with Capture(model) as capture:
        out = watched_by_layers(capture, model, x)
        out.square().sum().backward()  # Whose gradients at the layers are rows, too.
        found = capture.user_jacobians(capture.passes[-1])
        total = found.rmatvec(torch.ones(found.rows, 1, dtype=torch.float64)).flatten()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        torch.testing.assert_close(total, gradient)


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("change", ["mask", "division", "addition"])
def test_an_output_that_is_changed_in_place(change, tokens):
    """As by a mask over actions: the loss's own pass has let go of what leads through it."""

    class Changed(nn.Module):
        def forward(self, out: Tensor) -> Tensor:
            if change == "addition":
                return out + 3.0
            return out / 2.0 if change == "division" else out.masked_fill(masked, -1e9)

    def changed(out: Tensor) -> Tensor:
        if change == "mask":
            out[..., masked] = -1e9
            return out
        return out.add_(3.0) if change == "addition" else out.div_(torch.tensor(2.0))

    torch.manual_seed(0)
    masked = torch.tensor([False, False, True])
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    twin = nn.Sequential(*copy.deepcopy(model), Changed())
    x = normal(4, 2, 3) if tokens else normal(8, 3)
    y = torch.tensor([0, 1, 1, 0, 0, 1, 0, 1])
    found = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for one in (model, twin):
            optimizer = natgrad.KFAC(one, fisher="exact")
            out = changed(one(x)) if one is model else one(x)
            functional.cross_entropy(out.reshape(8, 3), y).backward()
            optimizer.preconditioner.update_curvature()
            found.append(optimizer.preconditioner.curvature.matrix().to_dense())
    told = [str(one.message) for one in caught if "changed in place" in str(one.message)]
    assert len(told) == (tokens or change != "addition")  # Nothing is needed to lead through it.
    if change != "division":  # There the new values have the Jacobian of the old ones.
        torch.testing.assert_close(found[0], found[1])
    assert found[0].any()


def test_inputs_modified_in_place_after_the_layer():
    """A residual stream written to in place must not change a layer's recorded input."""

    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            h = self.a(x)
            x += 1.0
            return self.b(torch.tanh(h))

    torch.manual_seed(0)
    model, x = Stream().double(), normal(4, 3)
    with Capture(model) as capture:
        out = model(x)
        try:
            capture.pull_back(out, normal(1, *out.shape))
        except RuntimeError as error:
            # Autograd refuses this model's own backward pass too, so refusing is right.
            assert "inplace" in str(error)
        with pytest.raises(RuntimeError, match="inplace"):
            model(x).sum().backward()


@pytest.mark.parametrize(
    "wrap, output",
    [
        (lambda z: z, None),
        (lambda z: (z, z.detach()), None),
        (lambda z: [z], None),
        (lambda z: {"loss": z.sum(), "logits": z}, None),
        (lambda z: types.SimpleNamespace(logits=z, hidden=2 * z), None),
        (lambda z: {"hidden": 2 * z, "answer": z}, lambda out: out["answer"]),
        (lambda z: (2 * z, {"deep": [z]}), lambda out: out[1]["deep"][0]),
    ],
)
def test_outputs_in_containers(wrap, output):
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = copy.deepcopy(CASES["mlp"]().model)

        def forward(self, x: Tensor):
            return wrap(self.model(x))

    case = CASES["mlp"]()
    f = fisher_matrix(
        Wrapped(), (case.x, case.target("categorical")), structure="full", output=output
    )
    dense.assert_same(f.to_dense(), case.fisher("categorical", "exact")[1])


def test_dropout_in_training_mode_uses_the_masks_of_the_pass():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 2)).double()
    x = normal(4, 3)
    with Capture(model) as capture:
        out = model(x)
        result = capture.pull_back(out, normal(2, *out.shape, seed=5))
    leaves = list(model.parameters())
    dense_rows = []
    for n in range(4):
        for vector in normal(2, *out.shape, seed=5):
            mask = torch.zeros_like(vector)
            mask[n] = vector[n]
            grads = torch.autograd.grad(out, leaves, mask, retain_graph=True)
            dense_rows.append(torch.cat([g.flatten() for g in grads]))
    dense.assert_same(result.to_dense(), torch.stack(dense_rows))


@pytest.mark.parametrize("seed", range(8))
def test_modules_that_draw_random_numbers_are_not_run_again(seed):
    """Nor do those of the user change."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor([0.7, 1.3]))

        def forward(self, x: Tensor) -> Tensor:
            return functional.dropout(torch.sin(x * self.scale), 0.5)

    model = nn.Sequential(nn.Linear(3, 2), Noisy(), nn.Linear(2, 2)).double()
    told: list[str] = []
    with Capture(model) as capture:
        capture.on_finding = told.append
        torch.manual_seed(seed)
        z = model(normal(1, 3))
        found = capture.pull_back(z, normal(2, 1, 2, seed=1)).to_dense()
    drawn = torch.rand(3)
    torch.manual_seed(seed)
    z = model(normal(1, 3))
    assert torch.equal(drawn, torch.rand(3))
    for row, vector in zip(found, normal(2, 1, 2, seed=1), strict=True):
        gradients = torch.autograd.grad(z, list(model.parameters()), vector, retain_graph=True)
        dense.assert_same(row, torch.cat([g.flatten() for g in gradients]), 1e-12)
    assert any("it draws random numbers" in sentence for sentence in told)


def test_modules_that_change_their_buffers_are_not_run_again():
    """Power iterations have converged at first, so that a further one is not seen then."""
    torch.manual_seed(0)
    layer = parametrizations.spectral_norm(nn.Linear(3, 4))
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 2)).double()
    told: list[str] = []
    with Capture(model, sums_coupled=True) as capture:
        capture.on_finding = told.append
        for seed in range(3):
            x, vectors = normal(4, 3, seed=seed), normal(1, 4, 2, seed=seed)
            z = model(x)
            found = capture.pull_back(z, vectors, independent=True)
            name = "0.parametrizations.weight"
            (parameter,) = capture.blocks[name].layout.names
            (expected,) = torch.autograd.grad(z, model.get_parameter(parameter), vectors[0])
            dense.assert_same(found[name].to_dense(), expected.reshape(1, -1), 1e-12)
            with torch.no_grad():
                model.get_parameter(parameter).add_(normal(4, 3, seed=9))
    assert not told  # It costs nothing where rows are only ever added up.


@pytest.mark.parametrize("padding", [1, (2, 1), "same", "valid"])
def test_convolutions_are_as_they_are_now(padding):
    """Programs change the geometry of a layer that is made, as dilated backbones do."""
    torch.manual_seed(0)
    layer = nn.Conv2d(1, 2, 3, padding=1, stride=2)
    pool = nn.AdaptiveAvgPool2d(2)
    model = nn.Sequential(layer, nn.Tanh(), pool, nn.Flatten(), nn.Linear(8, 2)).double()
    layer.stride, layer.dilation, layer.padding = (1, 1), (2, 1), padding
    x = normal(3, 1, 5, 4)
    check(model, x)
    with Capture(model) as capture:
        watched_by_layers(capture, model, x)


def test_rows_of_samples_that_are_coupled_along_the_first_dimension_alone():
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor([0.7, 1.3]))

        def forward(self, x: Tensor) -> Tensor:
            return (x - x.mean(0)) / x.square().mean(0).sqrt() * self.scale

    model = nn.Sequential(nn.Linear(3, 2), Centred(), nn.Tanh(), nn.Linear(2, 2)).double()
    check(model, normal(4, 2, 3))


def test_frozen_layers_below_and_above():
    torch.manual_seed(0)
    for frozen in range(3):
        model = nn.Sequential(
            nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)
        ).double()
        model[2 * frozen].requires_grad_(False)
        check(model, normal(4, 3))


def test_errors():
    case = CASES["mlp"]()
    with Capture(case.model) as capture:
        out = case.model(case.x)
        for shape in ((2, 4, 2), out.shape, (2, 5, 3)):
            with pytest.raises(ValueError, match="shape"):
                capture.pull_back(out, normal(*shape))
    with pytest.raises(TypeError, match="tensor"):
        with Capture(case.model, output=lambda out: [out]) as capture:
            case.model(case.x)


def test_blocks_and_uncovered():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Conv1d(1, 1, 1, bias=False))
    with Capture(model) as capture:
        assert list(capture.blocks) == ["0", "1", "2"]
        assert [b.layout.names for b in capture.blocks.values()] == [
            ("0.weight", "0.bias"), ("1.weight", "1.bias"), ("2.weight",),
        ]  # fmt: skip
        assert capture.uncovered == {}
    with Capture(CASES["tied_embedding"]().model) as capture:
        assert set(capture.blocks) == {"embedding.weight", "hidden", "head.bias"}
        assert capture.blocks["embedding.weight"].kind == "Embedding+Linear"
    with Capture(nn.Linear(2, 2)) as capture:
        assert len(capture.blocks) == 1


class ScaledLayers(nn.Module):
    """Layers with a bare parameter between them, and a count of the passes that come back."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.ones(4))
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.scale * self.first(x).tanh()
        hidden.register_hook(self.count)
        return self.last(hidden)

    def count(self, gradient: Tensor) -> None:
        self.passes += 1


def test_layers_and_bare_parameters_are_reached_in_one_pass():
    model, x, passes = ScaledLayers().double(), normal(5, 3), []
    with Capture(model) as capture:
        for seed in range(6):  # Some of them look at where rows are had, too.
            before, out, vectors = model.passes, model(x), normal(1, 5, 2, seed=seed)
            (expected,) = torch.autograd.grad(out, model.scale, vectors[0], retain_graph=True)
            after = model.passes
            found = capture.pull_back(out, vectors, independent=True)
            passes.append(model.passes - after)
            assert after == before + 1
        (name,) = capture.sources.direct
    assert capture.blocks[name].layout.names == ("scale",)
    torch.testing.assert_close(found[name].to_dense()[0], expected, rtol=1e-12, atol=1e-13)
    assert min(passes) == 1
