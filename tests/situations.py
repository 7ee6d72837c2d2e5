"""Networks whose rows are easily taken wrongly, each with inputs: name → function making both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import pack_padded_sequence

from tests.cases import generator, normal

Situation = tuple[nn.Module, Any]
SITUATIONS: dict[str, Callable[[], Situation]] = {}

#: Dimension of the output that holds the samples, where that is not the first.
BATCH_DIM = {"time_first_transformer": 1, "time_first_lstm": 1}


def situation(build: Callable[[], Situation]) -> Callable[[], Situation]:
    """Register a situation under its function's name."""

    def seeded() -> Situation:
        torch.manual_seed(0)
        model, inputs = build()
        return model.double(), inputs

    SITUATIONS[build.__name__] = seeded
    return seeded


class Calls(nn.Module):
    """A network of named parts and a function of them and the inputs."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        return self.function(self, *inputs, **named)


def weights(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) / shape[-1] ** 0.5)


@situation
def time_first_transformer() -> Situation:
    layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0)
    return Calls(lambda m, x: m.head(m.layer(x)), layer=layer, head=nn.Linear(4, 2)), normal(
        3, 5, 4
    )


@situation
def pooled_transformer() -> Situation:
    layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0)
    model = Calls(lambda m, x: m.head(m.layer(x).mean(0)), layer=layer, head=nn.Linear(4, 2))
    return model, normal(3, 5, 4)


@situation
def time_first_lstm() -> Situation:
    model = Calls(
        lambda m, t: m.out(m.lstm(m.table(t))[0]),
        table=nn.Embedding(5, 3), lstm=nn.LSTM(3, 4), out=nn.Linear(4, 2),
    )  # fmt: skip
    return model, torch.randint(0, 5, (4, 3), generator=generator(1))


@situation
def packed_sequences() -> Situation:
    def forward(m: Calls, x: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, torch.tensor([4, 2, 3]), True, enforce_sorted=False)
        return m.out(m.gru(packed)[1][-1])

    gru = nn.GRU(3, 4, batch_first=True)
    return Calls(forward, gru=gru, out=nn.Linear(4, 2)), normal(3, 4, 3)


@situation
def two_views_chunked() -> Situation:
    def forward(m: Calls, x: Tensor, y: Tensor) -> Tensor:
        a, b = torch.tanh(m.body(torch.cat([x, y]))).chunk(2)
        return m.head(a * b)

    model = Calls(forward, body=nn.Linear(3, 4), head=nn.Linear(4, 2))
    return model, (normal(5, 3), normal(5, 3, seed=1))


@situation
def graph_convolution() -> Situation:
    links = (torch.rand(5, 5, generator=generator(2)) < 0.5).double() + torch.eye(5)
    mixing = links / links.sum(1, keepdim=True)
    model = Calls(
        lambda m, x: mixing @ m.second(torch.tanh(mixing @ m.first(x))),
        first=nn.Linear(3, 4), second=nn.Linear(4, 2),
    )  # fmt: skip
    return model, normal(5, 3)


@situation
def functional_tying() -> Situation:
    def forward(m: Calls, t: Tensor) -> Tensor:
        return functional.linear(torch.tanh(m.body(m.table(t))), m.table.weight).mean(1)

    model = Calls(forward, table=nn.Embedding(4, 3), body=nn.Linear(3, 3))
    return model, torch.randint(0, 4, (5, 3), generator=generator(1))


@situation
def parameter_lists() -> Situation:
    def forward(m: Calls, x: Tensor) -> Tensor:
        for weight in m.weights:
            x = torch.tanh(x @ weight)
        return x + m.shifts["last"]

    lists = nn.ParameterList([weights(3, 4), weights(4, 2)])
    return Calls(forward, weights=lists, shifts=nn.ParameterDict({"last": weights(2)})), normal(
        5, 3
    )


@situation
def forward_called_directly() -> Situation:
    model = Calls(
        lambda m, x: m.second(torch.tanh(m.first.forward(x))),
        first=nn.Linear(3, 4), second=nn.Linear(4, 2),
    )  # fmt: skip
    return model, normal(5, 3)


@situation
def both_ways_at_once() -> Situation:
    def forward(m: Calls, x: Tensor) -> Tensor:
        return m.layer(torch.tanh(m.layer(x))) + functional.linear(x, m.layer.weight.T)

    return Calls(forward, layer=nn.Linear(3, 3)), normal(5, 3)


@situation
def traced_module() -> Situation:
    inner = nn.Sequential(nn.Linear(3, 4), nn.Tanh()).double()
    traced = torch.jit.trace(inner, normal(2, 3), check_trace=False)
    return Calls(lambda m, x: m.head(m.inner(x)), inner=traced, head=nn.Linear(4, 2)), normal(5, 3)


def parametrized(change: Callable[[nn.Linear], Any]) -> Situation:
    layer = nn.Linear(3, 4)
    change(layer)
    return Calls(lambda m, x: m.head(torch.tanh(m.layer(x))), layer=layer, head=nn.Linear(4, 2)), (
        normal(5, 3)
    )


@situation
def weight_norm() -> Situation:
    return parametrized(parametrizations.weight_norm)


@situation
def spectral_norm() -> Situation:
    model, x = parametrized(parametrizations.spectral_norm)
    return model.eval(), x


@situation
def orthogonal() -> Situation:
    return parametrized(lambda layer: parametrizations.orthogonal(layer, use_trivialization=False))


@situation
def pruned() -> Situation:
    def half(layer: nn.Linear) -> None:
        prune.custom_from_mask(layer, "weight", torch.arange(12).reshape(4, 3) % 2)

    return parametrized(half)


@situation
def low_rank_adapter() -> Situation:
    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = weights(2, 3), weights(4, 2)

        def forward(self, weight: Tensor) -> Tensor:
            return weight + self.b @ self.a

    def adapt(layer: nn.Linear) -> None:
        layer.weight.requires_grad_(False)
        parametrize.register_parametrization(layer, "weight", Adapter(), unsafe=True)

    return parametrized(adapt)


class Scale(nn.Module):
    """Root mean square norm on tokens however they come."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + torch.randn(features) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return x * x.square().mean(-1, keepdim=True).add(1e-3).rsqrt() * self.weight


@situation
def flattened_tokens() -> Situation:
    def forward(m: Calls, x: Tensor) -> Tensor:
        tokens = m.norm(torch.tanh(m.body(x)).reshape(-1, 4))
        return m.head(tokens).reshape(*x.shape[:2], 2).sum(1)

    model = Calls(forward, body=nn.Linear(3, 4), norm=Scale(4), head=nn.Linear(4, 2))
    return model, normal(5, 3, 3)


@situation
def flat_tokens() -> Situation:
    def forward(m: Calls, x: Tensor) -> Tensor:
        return m.head(m.attention(x, x, x)[0].reshape(-1, 4))

    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    return Calls(forward, attention=attention, head=nn.Linear(4, 2)), normal(3, 2, 4)


@situation
def own_batch_norm() -> Situation:
    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = weights(4), weights(4)

        def forward(self, x: Tensor) -> Tensor:
            centred = x - x.mean(0)
            return centred / (x.var(0) + 1e-3).sqrt() * self.weight + self.bias

    model = Calls(
        lambda m, x: m.head(torch.tanh(m.norm(m.body(x)))),
        body=nn.Linear(3, 4), norm=Normalised(), head=nn.Linear(4, 2),
    )  # fmt: skip
    return model, normal(5, 3)


@situation
def contrastive() -> Situation:
    class Temperature(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.log_scale = nn.Parameter(torch.tensor(0.3))

        def forward(self, similarity: Tensor) -> Tensor:
            return similarity * self.log_scale.exp()

    def forward(m: Calls, x: Tensor, y: Tensor) -> Tensor:
        a, b = functional.normalize(m.left(x), dim=1), functional.normalize(m.right(y), dim=1)
        return m.temperature(a @ b.T)

    model = Calls(forward, left=nn.Linear(3, 2), right=nn.Linear(4, 2), temperature=Temperature())
    return model, (normal(4, 3), normal(4, 4, seed=1))


@situation
def experts() -> Situation:
    def forward(m: Calls, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 3)
        shares = torch.softmax(m.gate(flat), 1)
        best = shares.argmax(1)
        result = torch.zeros_like(flat)
        for number, expert in enumerate(m.experts):
            (chosen,) = torch.where(best == number)
            part = torch.tanh(expert(flat[chosen])) * shares[chosen, number, None]
            result = result.index_add(0, chosen, part)
        return m.head(result.reshape(x.shape).sum(1))

    experts = nn.ModuleList([nn.Linear(3, 3) for _ in range(3)])
    return Calls(forward, gate=nn.Linear(3, 3), experts=experts, head=nn.Linear(3, 2)), (
        normal(3, 2, 3)
    )


@situation
def mask_as_large_as_the_batch() -> Situation:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = weights(2, 3)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return torch.tanh(mask @ x @ self.weight.T)

    mask = torch.ones(4, 4).tril().double()
    return Calls(lambda m, x: m.layer(x, mask).sum(1), layer=Masked()), normal(4, 4, 3)


@situation
def window_biases() -> Situation:
    class Windows(nn.Module):
        """Attention in windows, with a table of biases by relative position."""

        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.table = nn.Linear(4, 12), weights(3, 1)

        def forward(self, x: Tensor) -> Tensor:  # (windows, 2, 4)
            q, k, v = self.qkv(x).chunk(3, -1)
            bias = self.table[torch.tensor([[1, 2], [0, 1]])].squeeze(-1)
            return torch.softmax(q @ k.mT / 2 + bias, -1) @ v

    def forward(m: Calls, x: Tensor) -> Tensor:  # (N, 4, 4) in two windows each
        return m.head(m.windows(x.reshape(-1, 2, 4)).reshape(len(x), -1))

    return Calls(forward, windows=Windows(), head=nn.Linear(16, 2)), normal(3, 4, 4)


@situation
def own_linear() -> Situation:
    class Own(nn.Module):
        def __init__(self, d_in: int, d_out: int) -> None:
            super().__init__()
            self.weight, self.bias = weights(d_out, d_in), weights(d_out)

        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x, self.weight, self.bias)

    model = Calls(lambda m, x: m.head(torch.tanh(m.own(x))).sum(1), own=Own(3, 4), head=Own(4, 2))
    return model, normal(5, 2, 3)


@situation
def shared_table() -> Situation:
    def forward(m: Calls, x: Tensor) -> Tensor:
        return m.head(torch.tanh(m.body(x) + m.positions(torch.arange(3)))).sum(1)

    model = Calls(forward, body=nn.Linear(2, 4), positions=nn.Embedding(3, 4), head=nn.Linear(4, 2))
    return model, normal(3, 3, 2)


@situation
def bags_of_tokens() -> Situation:
    model = Calls(
        lambda m, t, offsets: m.head(torch.tanh(m.bag(t, offsets))),
        bag=nn.EmbeddingBag(6, 4, mode="mean"), head=nn.Linear(4, 2),
    )  # fmt: skip
    return model, (torch.tensor([0, 3, 3, 5, 1, 2, 4]), torch.tensor([0, 2, 3, 6]))


@situation
def named_inputs() -> Situation:
    model = Calls(
        lambda m, *, left, right: m.head(torch.tanh(m.body(left) * right)),
        body=nn.Linear(3, 4), head=nn.Linear(4, 2),
    )  # fmt: skip
    return model, {"left": normal(5, 3), "right": normal(5, 4, seed=1)}


@situation
def transposed_input() -> Situation:
    return Calls(lambda m, x: m.layer(x.transpose(0, 1)).tanh().sum(0), layer=nn.Linear(2, 2)), (
        normal(4, 3, 2)
    )


@situation
def interleaved_views() -> Situation:
    def forward(m: Calls, x: Tensor) -> Tensor:
        repeated = x.repeat(3, 1) + torch.arange(15).unsqueeze(1) / 10
        return torch.tanh(m.body(repeated)).unflatten(0, (3, 5)).sum(0)

    return Calls(forward, body=nn.Linear(3, 2)), normal(5, 3)
