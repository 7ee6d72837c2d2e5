"""Random layers in random layouts, batch after batch: rows are those that autograd finds."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import natgrad
from natgrad.capture import Capture
from tests.cases import normal
from tests.situations import Calls, weights

pytestmark = pytest.mark.filterwarnings("ignore")

Function = Callable[[Tensor], Tensor]


def turned(function: Function, x: Tensor, left: int, right: int) -> Tensor:
    """Apply a function to a tensor with two dimensions exchanged."""
    return function(x.transpose(left, right)).transpose(left, right)


def packed(m: Any, x: Tensor) -> Tensor:
    """A packed batch whose sequences are of unlike lengths."""
    lengths = 1 + torch.arange(len(x)) % x.shape[1]
    given = pack_padded_sequence(x, lengths, True, enforce_sorted=False)
    return pad_packed_sequence(m.inner(given)[0], True, total_length=x.shape[1])[0]


def one_step_after_the_other(m: Any, x: Tensor) -> Tensor:
    states: list[Tensor] = []
    for step in x.unbind(1):
        states.append(m.inner(step, states[-1] if states else None))
    return torch.stack(states, 1)


def numbers(x: Tensor) -> Tensor:
    """Return a token of four for every position."""
    return (3 * x[..., 0].detach()).round().long() % 4


def routed(m: Any, x: Tensor) -> Tensor:
    chosen = torch.where(x.detach()[..., 0] > 0)
    return torch.zeros_like(x).index_put(chosen, m.inner(x[chosen]))


def stacked(m: Any, x: Tensor) -> Tensor:
    flat = torch.bmm(x.reshape(-1, 2).expand(2, -1, -1), m.w)
    return torch.tanh(flat).sum(0).reshape(x.shape)


#: What maps ``(N, T, 2)`` to the same shape.
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(2, 2),
    "a function": lambda: Calls(
        lambda m, x: functional.linear(x, m.inner.weight, m.inner.bias), inner=nn.Linear(2, 2)
    ),
    "both ways": lambda: Calls(
        lambda m, x: torch.tanh(m.inner(x)) @ m.inner.weight, inner=nn.Linear(2, 2)
    ),
    "its power": lambda: Calls(
        lambda m, x: functional.linear(x, m.inner.weight @ m.inner.weight), inner=nn.Linear(2, 2)
    ),
    "a matrix": lambda: Calls(lambda m, x: x @ m.w + m.b, w=weights(2, 2), b=weights(2)),
    "a stack": lambda: Calls(stacked, w=weights(2, 2, 2)),
    "a scale": lambda: Calls(lambda m, x: torch.sin(x * m.w) + m.w, w=weights(2)),
    "a convolution": lambda: Calls(
        lambda m, x: turned(m.inner, x, 1, 2),
        inner=nn.Conv1d(2, 2, 3, padding="same", groups=2, padding_mode="circular"),
    ),
    "a norm": lambda: nn.LayerNorm(2, eps=0.1),
    "a bilinear map": lambda: Calls(
        lambda m, x: m.inner(x, torch.cos(x)), inner=nn.Bilinear(2, 2, 2)
    ),
    "attention": lambda: Calls(
        lambda m, x: m.inner(x, x, torch.sin(x))[0],
        inner=nn.MultiheadAttention(2, 1, batch_first=True),
    ),
    "a transformer": lambda: Calls(
        lambda m, x: turned(m.inner, x, 0, 1),
        inner=nn.TransformerEncoderLayer(2, 1, 3, dropout=0.0, layer_norm_eps=0.1),
    ),
    "recurrent": lambda: Calls(
        lambda m, x: m.inner(x)[0], inner=nn.LSTM(2, 1, batch_first=True, bidirectional=True)
    ),
    "packed": lambda: Calls(packed, inner=nn.GRU(2, 2, batch_first=True)),
    "a cell": lambda: Calls(one_step_after_the_other, inner=nn.GRUCell(2, 2)),
    "positions": lambda: Calls(
        lambda m, x: x + m.inner(torch.arange(x.shape[1])), inner=nn.Embedding(8, 2)
    ),
    "tokens": lambda: Calls(lambda m, x: x + m.inner(numbers(x)), inner=nn.Embedding(4, 2)),
    "a bag": lambda: Calls(
        lambda m, x: x + m.inner(numbers(x)).unsqueeze(1), inner=nn.EmbeddingBag(4, 2)
    ),
    "picked": lambda: Calls(lambda m, x: x * m.w[numbers(x)], w=weights(4, 2)),
    "a weight norm": lambda: parametrizations.weight_norm(nn.Linear(2, 2)),
    "routed": lambda: Calls(routed, inner=nn.Linear(2, 2)),
    "batched": lambda: Calls(lambda m, x: torch.vmap(m.inner)(x), inner=nn.Linear(2, 2)),
    "centred": lambda: Calls(lambda m, x: (x - x.mean(0)) * m.w, w=weights(2)),
    "a graph": lambda: Calls(lambda m, x: x + m.inner(x).cumsum(0), inner=nn.Linear(2, 2)),
}


def in_views(function: Function, x: Tensor) -> Tensor:
    left, right = function(torch.cat([x, torch.cos(x)])).chunk(2)
    return left * torch.tanh(right)


def interleaved(function: Function, x: Tensor) -> Tensor:
    several = x.repeat_interleave(2, 0)
    several = several + torch.arange(len(several)).reshape(-1, 1, 1) % 2
    return function(several).unflatten(0, (-1, 2)).prod(1)


#: Ways to apply what maps ``(N, T, 2)`` to the same shape.
LAYOUTS: dict[str, Callable[[Function, Tensor], Tensor]] = {
    "time first": lambda f, x: turned(f, x, 0, 1),
    "flat": lambda f, x: f(x.reshape(1, -1, 2)).reshape(x.shape),
    "flat in the batch": lambda f, x: f(x.reshape(-1, 1, 2)).reshape(x.shape),
    "in views": in_views,
    "interleaved": interleaved,
    "step by step": lambda f, x: torch.cat([f(step) for step in x.split(1, 1)], 1),
    "sample by sample": lambda f, x: torch.cat([f(sample) for sample in x.split(1)]),
    "the other way round": lambda f, x: f(x.flip(0)).flip(0),
    "padded": lambda f, x: f(functional.pad(x, (0, 0, 1, 1)))[:, 1:-1],
    "among more": lambda f, x: f(functional.pad(x, (0, 0, 0, 0, 0, 1)))[:-1],
    "checkpointed": lambda f, x: checkpoint(f, x, use_reentrant=False),
    "in place": lambda f, x: f(torch.sin(x)).add_(1),
    "twice": lambda f, x: f(torch.tanh(f(x))),
    "masked": lambda f, x: f(x) * (x[..., :1].detach() > 0),
    "with others": lambda f, x: f(x.roll(1, 0)) + x,
}

ENDINGS: dict[str, Function] = {
    "tokens": lambda x: x,
    "the mean": lambda x: x.mean(1),
    "the last": lambda x: x[:, -1],
    "a number": lambda x: x.sum((1, 2)),
}


class Network(nn.Module):
    """Layers in layouts, one after the other, a linear one, and an ending."""

    def __init__(self, parts: Sequence[tuple[str, Sequence[str]]], ending: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(LAYERS[name]() for name, _ in parts)
        self.layouts = [[LAYOUTS[one] for one in layouts] for _, layouts in parts]
        self.head, self.ending = nn.Linear(2, 2), ENDINGS[ending]

    def forward(self, x: Tensor) -> Tensor:
        for layer, layouts in zip(self.layers, self.layouts, strict=True):
            function: Function = layer
            for layout in layouts:
                function = lambda x, f=function, layout=layout: layout(f, x)  # noqa: E731
            x = torch.tanh(function(x))
        return self.ending(self.head(x))


part = st.tuples(
    st.sampled_from(sorted(LAYERS)), st.lists(st.sampled_from(sorted(LAYOUTS)), max_size=2)
)
programs = {
    "parts": st.lists(part, min_size=1, max_size=3),
    "ending": st.sampled_from(sorted(ENDINGS)),
    "batches": st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=3),
}


def jacobian_of(model: nn.Module, output: Tensor) -> Tensor:
    """Return ``(N, C, P)``, differentiated entry by entry."""
    rows, leaves = [], list(model.parameters())
    for entry in output.flatten():
        found = torch.autograd.grad(
            entry, leaves, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        rows.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(rows).unflatten(0, (len(output), -1))


def columns_of(model: nn.Module, rows: Tensor, names: Sequence[str]) -> Tensor:
    """Return the columns of rows, the last dimension, that belong to some parameters."""
    sizes = [p.numel() for p in model.parameters()]
    found = dict(zip(dict(model.named_parameters()), rows.split(sizes, -1), strict=True))
    return torch.cat([found[name] for name in names], -1)


@settings(max_examples=50)
@given(independent=st.booleans(), **programs)
def test_rows_are_those_of_autograd(independent, parts, ending, batches):
    model = Network(parts, ending).double()
    with Capture(model, batch_dim=0) as capture:
        for number, (samples, time) in enumerate(batches):
            z = model(normal(samples, time, 2, seed=number))
            vectors = normal(2, *z.shape, seed=9)
            flat = vectors.reshape(2, samples, -1)
            expected = torch.einsum("kne,nep->nkp", flat, jacobian_of(model, z))
            rows = capture.pull_back(z, vectors, independent=independent)
            for name, block in capture.blocks.items():
                true = columns_of(model, expected, block.layout.names)
                if name in rows:
                    if rows[name].summed:  # Of samples that something couples.
                        true = true.sum(0)
                    true = true.reshape(-1, true.shape[-1])
                    torch.testing.assert_close(rows[name].to_dense(), true, rtol=1e-9, atol=1e-10)
                else:
                    assert not true.any()
            capture.clear()


@settings(max_examples=25)
@given(fisher=st.sampled_from(["exact", "empirical"]), **programs)
def test_matrices_are_those_of_autograd_or_refused_by_name(fisher, parts, ending, batches):
    model = Network(parts, ending).double()
    optimizer = natgrad.NaturalGradient(
        model, "gaussian", structure="block_diagonal", fisher=fisher, lr=0.0, damping=0.1,
        refresh=natgrad.Refresh(decay=0.0), batch_dim=0,
    )  # fmt: skip
    preconditioner, told = optimizer.preconditioner, ""
    for number, (samples, time) in enumerate(batches):
        x = normal(samples, time, 2, seed=number)
        with preconditioner.observer.paused():
            rows = jacobian_of(model, model(x))
        optimizer.zero_grad()
        z = model(x)
        (0.5 * z.square().sum() / samples).backward()
        with warnings.catch_warnings(record=True) as sentences:
            warnings.simplefilter("always")
            optimizer.step()
        told += " ".join(str(one.message) for one in sentences)
        names = {name for name, _ in model.named_parameters()}
        assert names - preconditioner.covered == set(preconditioner.untrusted)
        assert all(name in told for name in preconditioner.untrusted)
        if fisher == "empirical":
            rows = torch.einsum("ne,nep->np", z.detach().reshape(samples, -1), rows)
        for name, part in preconditioner.curvature.parts.items():
            true = columns_of(model, rows.flatten(0, -2), part.block.names)
            if true.any():  # What no gradient reaches keeps what it was.
                found = preconditioner.curvature.operator(name).to_dense()
                torch.testing.assert_close(found, true.T @ true / samples, rtol=1e-8, atol=1e-10)
