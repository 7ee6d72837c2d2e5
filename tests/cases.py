"""Small float64 models of every layer kind, with the blocks that structures should see."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests import dense
from tests.dense import BlockSpec


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def labels(count: int, classes: int, seed: int) -> Tensor:
    """Return reproducible class labels."""
    return torch.randint(0, classes, (count,), generator=generator(seed))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def whole(*names: str, layer: str = "") -> BlockSpec:
    return BlockSpec(names, layer, "whole")


def rows(layer: str, *names: str) -> BlockSpec:
    names = names or ("weight", "bias")
    return BlockSpec(tuple(f"{layer}.{name}" for name in names), layer)


def columns(layer: str) -> BlockSpec:
    return BlockSpec((f"{layer}.weight",), layer, "columns")


@dataclass(frozen=True)
class Case:
    """A model, its input, and the blocks in order of first call.

    Attributes:
        model: The model, float64.
        x: Its input.
        blocks: Expected blocks; those the output does not depend on come last.
        output: Picks the output tensor.
        has_kfac: Whether the reference can form Kronecker factors of every block.
    """

    model: nn.Module
    x: Any
    blocks: tuple[BlockSpec, ...]
    output: Callable[[Any], Tensor] | None = None
    has_kfac: bool = True

    @functools.cached_property
    def jacobian(self) -> tuple[Tensor, Tensor]:
        """The output and its dense Jacobian."""
        return dense.jacobian(self.model, self.x, self.output)

    @property
    def z(self) -> Tensor:
        return self.jacobian[0]

    def target(self, likelihood: str, seed: int = 7) -> Tensor:
        """Draw a target for this output."""
        z, g = self.z, generator(seed)
        if likelihood in ("gaussian", "mse"):
            return torch.randn(z.shape, generator=g, dtype=z.dtype)
        if likelihood == "bernoulli":
            return torch.randint(0, 2, z.shape, generator=g).to(z.dtype)
        if likelihood == "poisson":
            return torch.randint(0, 4, z.shape, generator=g).to(z.dtype)
        dim = self.class_dim
        shape = (*z.shape[:dim], *z.shape[dim + 1 :])
        return torch.randint(0, z.shape[dim], shape, generator=g)

    @property
    def class_dim(self) -> int:
        return 2 if self.z.dim() == 3 else 1

    def loss(self, likelihood: str) -> dense.Loss:
        """Return the reference loss of a likelihood's name."""
        if likelihood == "categorical":
            return dense.categorical(self.class_dim)
        return {
            "gaussian": dense.gaussian,
            "mse": dense.mse,
            "bernoulli": dense.bernoulli,
            "poisson": dense.poisson,
        }[likelihood]()

    def fisher(self, likelihood: str, kind: str) -> tuple[Tensor, Tensor]:
        """Return a target and the dense Fisher matrix."""
        y = self.target(likelihood)
        f = dense.fisher(self.model, self.x, y, self.loss(likelihood), kind, computed=self.jacobian)
        return y, f


CASES: dict[str, Callable[[], Case]] = {}


def case(make: Callable[[], Case]) -> Callable[[], Case]:
    """Register a case under its function's name; it is built once, from a fixed seed."""

    @functools.cache
    @functools.wraps(make)
    def build() -> Case:
        state = torch.get_rng_state()
        torch.manual_seed(0)
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            made = make()
            perturb(made.model)
            made.jacobian  # noqa: B018
            return made
        finally:
            torch.set_default_dtype(dtype)
            torch.set_rng_state(state)

    CASES[make.__name__] = build
    return build


def perturb(model: nn.Module) -> None:
    """Move parameters and running statistics away from special values such as 0 and 1."""
    g = generator(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=g, dtype=parameter.dtype))
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(0.3 * torch.rand(buffer.shape, generator=g, dtype=buffer.dtype))


# -- linear ----------------------------------------------------------------------------------------


@case
def mlp() -> Case:
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    return Case(model, normal(4, 3), (rows("0"), rows("2"), rows("4")))


@case
def mlp_without_bias() -> Case:
    model = nn.Sequential(
        nn.Linear(4, 3, bias=False), nn.ReLU(inplace=True), nn.Linear(3, 2), nn.Sigmoid(),
        nn.Linear(2, 2, bias=False), nn.Softplus(), nn.Linear(2, 2),
    )  # fmt: skip
    blocks = (rows("0", "weight"), rows("2"), rows("4", "weight"), rows("6"))
    return Case(model, normal(5, 4), blocks)


@case
def one_layer() -> Case:
    return Case(nn.Sequential(nn.Linear(4, 3)), normal(5, 4), (rows("0"),))


@case
def adapter() -> Case:
    """Many outputs of one input."""
    net = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Linear(1, 9, bias=False))
    return Case(net, normal(6, 4), (rows("0", "weight"), rows("1", "weight")))


@case
def single_module() -> Case:
    return Case(nn.Linear(4, 3), normal(5, 4), (BlockSpec(("weight", "bias"), ""),))


@case
def batch_of_one() -> Case:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    return Case(model, normal(1, 3), (rows("0"), rows("2")))


@case
def tokens() -> Case:
    """Inputs of rank 3, token-wise output."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    return Case(model, normal(3, 4, 3), (rows("0"), rows("2")))


class MeanPool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1, -2).mean(1)


@case
def pooled_tokens() -> Case:
    """Inputs of rank 4, one output per sample."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), MeanPool(), nn.Linear(4, 3))
    return Case(model, normal(3, 2, 3, 3), (rows("0"), rows("3")))


class OutOfOrder(nn.Module):
    """Layers are called in another order than they are registered in, and one never is."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 2)
        self.last = nn.Linear(3, 2)
        self.middle = nn.Linear(3, 3)
        self.first = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.middle(torch.tanh(self.first(x)))))


@case
def out_of_order() -> Case:
    blocks = (rows("first"), rows("middle"), rows("last"), rows("unused"))
    return Case(OutOfOrder(), normal(4, 2), blocks)


class Detached(nn.Module):
    """One layer is called but the output does not depend on it."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.side = nn.Linear(3, 2)
        self.b = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        self.side(h)
        return self.b(h) + self.side(h).detach()


@case
def detached() -> Case:
    return Case(Detached(), normal(4, 3), (rows("a"), rows("b"), rows("side")))


@case
def frozen() -> Case:
    model = nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(),
        nn.Linear(3, 3),
    )  # fmt: skip
    model[0].weight.requires_grad_(False)
    model[2].requires_grad_(False)
    model[4].bias.requires_grad_(False)
    return Case(model, normal(4, 3), (rows("0", "bias"), rows("4", "weight"), rows("6")))


# -- reuse and tying -------------------------------------------------------------------------------


class Repeated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.outer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.inner(x))
        return self.outer(x)


@case
def repeated() -> Case:
    return Case(Repeated(), normal(4, 3), (rows("inner"), rows("outer")))


class TiedEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.hidden = nn.Linear(3, 3)
        self.head = nn.Linear(3, 5)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.embedding(tokens))))


@case
def tied_embedding() -> Case:
    tokens = torch.randint(0, 5, (3, 2), generator=generator(1))
    blocks = (
        BlockSpec(("embedding.weight",), "head"),
        rows("hidden"),
        rows("head", "bias"),
    )
    return Case(TiedEmbedding(), tokens, blocks, has_kfac=False)


class TiedLinear(nn.Module):
    """Two layers with one weight and one bias."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = nn.Linear(3, 3)
        self.b.weight, self.b.bias = self.a.weight, self.a.bias
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))


@case
def tied_linear() -> Case:
    blocks = (BlockSpec(("a.weight",), "a"), BlockSpec(("a.bias",), "a"), rows("head"))
    return Case(TiedLinear(), normal(4, 3), blocks, has_kfac=False)


# -- convolutions ----------------------------------------------------------------------------------


@case
def conv1d() -> Case:
    model = nn.Sequential(
        nn.Conv1d(2, 4, 3, stride=2, padding=1, dilation=2, groups=2, padding_mode="circular"),
        nn.Tanh(),
        nn.Conv1d(4, 2, 2, padding="same", bias=False),
        nn.Flatten(),
        nn.Linear(6, 3),
    )
    return Case(model, normal(3, 2, 7), (rows("0"), rows("2", "weight"), rows("4")))


@case
def conv2d() -> Case:
    model = nn.Sequential(
        nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0), padding_mode="reflect"),
        nn.ReLU(inplace=True),
        nn.Conv2d(3, 3, 2, groups=3, padding=1, padding_mode="replicate"),
        nn.Tanh(),
        MeanPoolImages(),
        nn.Linear(3, 3),
    )
    return Case(model, normal(3, 2, 5, 4), (rows("0"), rows("2"), rows("5")))


@case
def conv3d() -> Case:
    model = nn.Sequential(
        nn.Conv3d(1, 2, (2, 1, 2), padding=(0, 1, 0)), nn.Tanh(), MeanPoolImages(), nn.Linear(2, 2)
    )
    return Case(model, normal(3, 1, 3, 2, 3), (rows("0"), rows("3")))


@case
def pixels() -> Case:
    """Pixel-wise output."""
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Conv2d(2, 3, 1))
    return Case(model, normal(2, 1, 3, 3), (rows("0"), rows("2")))


@case
def mixed_pixels() -> Case:
    """Pixel-wise output in which every prediction sees several positions of the first layer."""
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Conv2d(2, 3, 2, padding=1))
    return Case(model, normal(2, 1, 3, 3), (rows("0"), rows("2")))


class MeanPoolImages(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2)


@case
def transposed_convolution() -> Case:
    model = nn.Sequential(
        nn.ConvTranspose2d(
            2, 4, (2, 3), stride=2, padding=1, output_padding=1, groups=2, dilation=(1, 2)
        ),
        nn.Tanh(),
        MeanPoolImages(),
        nn.Linear(4, 3),
    )
    blocks = (
        BlockSpec(("0.weight", "0.bias"), "0", "transposed"),
        rows("3"),
    )
    return Case(model, normal(2, 2, 3, 2), blocks)


# -- embeddings and norms --------------------------------------------------------------------------


@case
def embedding() -> Case:
    model = nn.Sequential(nn.Embedding(6, 3, padding_idx=1), nn.Tanh(), MeanPool(), nn.Linear(3, 3))
    tokens = torch.randint(0, 6, (4, 3), generator=generator(2))
    tokens[0, 0] = tokens[2, 1] = 1
    return Case(model, tokens, (columns("0"), rows("3")))


@case
def language_model() -> Case:
    model = nn.Sequential(nn.Embedding(5, 3), nn.LayerNorm(3, eps=0.1), nn.Linear(3, 5))
    tokens = torch.randint(0, 5, (3, 2), generator=generator(3))
    return Case(model, tokens, (columns("0"), rows("1"), rows("2")))


@case
def layer_norm() -> Case:
    model = nn.Sequential(
        nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Unflatten(1, (2, 2)),
        nn.LayerNorm((2, 2), bias=False), nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip
    blocks = (rows("0"), rows("1"), BlockSpec(("4.weight",), "4", "entries"), rows("6"))
    return Case(model, normal(4, 3), blocks)


@case
def rms_norm() -> Case:
    model = nn.Sequential(nn.Linear(3, 4), nn.RMSNorm(4, eps=1e-3), nn.Tanh(), nn.Linear(4, 3))
    return Case(model, normal(2, 3, 3), (rows("0"), rows("1", "weight"), rows("3")))


@case
def group_norm() -> Case:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 2), nn.GroupNorm(2, 4), nn.Tanh(), MeanPoolImages(), nn.Linear(4, 3)
    )
    return Case(model, normal(3, 1, 3, 3), (rows("0"), rows("1"), rows("4")))


@case
def instance_norm() -> Case:
    model = nn.Sequential(
        nn.Conv1d(1, 3, 2), nn.InstanceNorm1d(3, affine=True), nn.Tanh(), MeanPoolImages(),
        nn.Linear(3, 3),
    )  # fmt: skip
    return Case(model, normal(3, 1, 5), (rows("0"), rows("1"), rows("4")))


def _batch_norm_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Flatten(),
        nn.Linear(12, 4), nn.BatchNorm1d(4, affine=False), nn.Tanh(), nn.Linear(4, 3),
        nn.BatchNorm1d(3),
    )  # fmt: skip


_BATCH_NORM_BLOCKS = (rows("0"), rows("1"), rows("4"), rows("7"), rows("8"))


@case
def batch_norm_train() -> Case:
    return Case(_batch_norm_net(), normal(4, 1, 3, 3), _BATCH_NORM_BLOCKS)


@case
def batch_norm_eval() -> Case:
    return Case(_batch_norm_net().eval(), normal(4, 1, 3, 3), _BATCH_NORM_BLOCKS)


# -- attention -------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Attention between a sequence and itself or another one, then a mean over time."""

    def __init__(self, cross: bool, batch_first: bool = True, **options: Any) -> None:
        super().__init__()
        self.cross, self.batch_first = cross, batch_first
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first, **options)
        self.head = nn.Linear(4, 3)

    def forward(
        self, x: Tensor, other: Tensor | None = None, value: Tensor | None = None, **masks: Any
    ) -> Tensor:
        key = x if other is None else other
        value = key if value is None else value
        sequences = [x, key, value]
        if not self.batch_first:
            same = key is x and value is x
            x = x.transpose(0, 1)
            key = x if same else key.transpose(0, 1)
            value = x if same else value.transpose(0, 1)
            sequences = [x, key, value]
        mixed, _ = self.attention(*sequences, need_weights=False, **masks)
        return self.head(mixed.mean(1 if self.batch_first else 0))


ATTENTION = (
    rows("attention", "in_proj_weight", "in_proj_bias"),
    rows("attention.out_proj"),
    rows("head"),
)


@case
def self_attention() -> Case:
    return Case(Attention(False), normal(3, 3, 4), ATTENTION, has_kfac=False)


@case
def self_attention_time_first_masked() -> Case:
    padding = torch.zeros(3, 3, dtype=torch.bool)
    padding[0, 2] = padding[1, 1] = True
    causal = torch.triu(torch.ones(3, 3, dtype=torch.bool), 1)
    x = {"x": normal(3, 3, 4), "key_padding_mask": padding, "attn_mask": causal}
    model = Attention(False, batch_first=False, bias=False)
    blocks = (
        rows("attention", "in_proj_weight"),
        rows("attention.out_proj", "weight"),
        rows("head"),
    )
    return Case(model, x, blocks, has_kfac=False)


@case
def cross_attention() -> Case:
    return Case(
        Attention(True), (normal(3, 2, 4), normal(3, 3, 4, seed=1)), ATTENTION, has_kfac=False
    )


@case
def cross_attention_other_sizes() -> Case:
    model = Attention(True, kdim=3, vdim=2)
    x = (normal(3, 2, 4), normal(3, 3, 3, seed=1), normal(3, 3, 2, seed=2))
    blocks = (
        rows("attention", "q_proj_weight"),
        rows("attention", "k_proj_weight"),
        rows("attention", "v_proj_weight"),
        rows("attention", "in_proj_bias"),
        rows("attention.out_proj"),
        rows("head"),
    )
    return Case(model, x, blocks, has_kfac=False)


@case
def attention_with_extra_keys() -> Case:
    """``add_bias_kv`` has parameters of its own; they are one block or reported."""
    model = Attention(False, add_zero_attn=True)
    return Case(model, normal(3, 2, 4), ATTENTION, has_kfac=False)


@case
def transformer_layer() -> Case:
    layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True)
    model = nn.Sequential(layer, MeanPool(), nn.Linear(4, 2))
    blocks = (
        rows("0.self_attn", "in_proj_weight", "in_proj_bias"),
        rows("0.self_attn.out_proj"),
        rows("0.norm1"),
        rows("0.linear1"),
        rows("0.linear2"),
        rows("0.norm2"),
        rows("2"),
    )
    return Case(model, normal(2, 2, 4), blocks, has_kfac=False)


# -- generic modules -------------------------------------------------------------------------------


class Bilinearish(nn.Module):
    """A module of no known kind, with two parameters and an ordinary layer inside."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(3, 3))
        self.shift = nn.Parameter(torch.randn(2))
        self.inside = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(torch.sin(x @ self.matrix)) * self.shift + self.shift.square()


@case
def generic() -> Case:
    model = nn.Sequential(nn.Linear(2, 3), Bilinearish(), nn.Tanh(), nn.Linear(2, 3))
    blocks = (
        rows("0"),
        rows("1.inside"),
        whole("1.matrix", "1.shift", layer="1"),
        rows("3"),
    )
    return Case(model, normal(4, 2), blocks)


class LastOutput(nn.Module):
    def forward(self, pair: tuple[Tensor, Any]) -> Tensor:
        return pair[0][:, -1]


@case
def lstm() -> Case:
    model = nn.Sequential(nn.LSTM(2, 2, batch_first=True), LastOutput(), nn.Linear(2, 3)).eval()
    maps = (rows("0", f"weight_{part}_l0", f"bias_{part}_l0") for part in ("ih", "hh"))
    return Case(model, normal(3, 3, 2), (*maps, rows("2")), has_kfac=False)


@case
def bilinear() -> Case:
    """A torch layer without a formula, with two inputs."""
    model = Pairwise(nn.Bilinear(2, 3, 3))
    blocks = (whole("layer.weight", "layer.bias", layer="layer"), rows("head"))
    return Case(model, (normal(4, 2), normal(4, 3, seed=1)), blocks)


class Pairwise(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(3, 2)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(a, b)))


# -- outputs and execution -------------------------------------------------------------------------


class Dictionary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.head = nn.Linear(4, 3)
        self.other = nn.Linear(4, 2)

    def forward(self, inputs: Tensor, scale: Tensor) -> dict[str, Tensor]:
        h = torch.tanh(self.body(inputs) * scale)
        return {"other": self.other(h), "logits": self.head(h)}


@case
def dictionary_output() -> Case:
    x = {"inputs": normal(4, 3), "scale": normal(4, 1, seed=1)}
    blocks = (rows("body"), rows("head"), rows("other"))
    return Case(Dictionary(), x, blocks, output=lambda out: out["logits"])


@case
def other_head() -> Case:
    x = {"inputs": normal(4, 3), "scale": normal(4, 1, seed=1)}
    blocks = (rows("body"), rows("other"), rows("head"))
    return Case(Dictionary(), x, blocks, output=lambda out: out["other"])


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 4)
        self.b = nn.Linear(4, 4)
        self.c = nn.Linear(4, 3)

    def middle(self, x: Tensor) -> Tensor:
        return torch.tanh(self.b(torch.tanh(self.a(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(checkpoint(self.middle, x, use_reentrant=False))


@case
def checkpointed() -> Case:
    return Case(Checkpointed(), normal(4, 3), (rows("a"), rows("b"), rows("c")))


class Routed(nn.Module):
    """One of two layers, by the sign of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh((self.left if x[0, 0] > 0 else self.right)(x)))
