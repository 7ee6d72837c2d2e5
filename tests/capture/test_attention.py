"""Attention in its layouts: batch first or not, masked, over other keys, without a batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from natgrad import fisher_matrix
from tests import dense
from tests.cases import normal


def check(model: nn.Module, *inputs: Tensor) -> None:
    """Compare with one backward pass per output, in training and in evaluation mode."""
    torch.manual_seed(0)
    model = model.double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    for mode in (True, False):
        model.train(mode)
        _, jacobian = dense.jacobian(model, inputs)
        rows = jacobian.flatten(0, -2)
        expected = rows.T @ rows / len(jacobian)
        found = fisher_matrix(model, (inputs, None), "gaussian", "full")
        dense.assert_same(found.to_dense(), expected, 1e-11)
        found = fisher_matrix(model, (inputs, None), "gaussian", "diagonal")
        dense.assert_same(found.diagonal(), expected.diagonal(), 1e-11)


class Attending(nn.Module):
    """Attention over the input, or over other keys, and a linear layer."""

    def __init__(self, batch_first: bool, padded: bool, **options) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first, **options)
        self.head = nn.Linear(4, 2)
        self.first, self.padded = batch_first, padded

    def _laid_out(self, x: Tensor) -> Tensor:
        return x if self.first else x.transpose(0, 1)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        keys = x if keys is None else keys
        mask = torch.zeros(keys.shape[:2], dtype=torch.bool)
        mask[0, -1] = mask[1, 0] = True
        query, key = self._laid_out(x), self._laid_out(keys)
        out, _ = self.attention(query, key, key, key_padding_mask=mask if self.padded else None)
        return self.head(torch.tanh(self._laid_out(out))).flatten(1)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("keys", [None, 4, 3])
def test_layouts(batch_first, padded, keys):
    sizes = {} if keys in (None, 4) else {"kdim": keys, "vdim": keys}
    inputs = [normal(3, 4, 4)] if keys is None else [normal(3, 4, 4), normal(3, 5, keys, seed=1)]
    check(Attending(batch_first, padded, **sizes), *inputs)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", [{"bias": False}, {"add_zero_attn": True}], ids=str)
def test_options(batch_first, options):
    check(Attending(batch_first, False, **options), normal(3, 4, 4))


class Function(nn.Module):
    """A function of an attention layer, some vectors and the input."""

    def __init__(self, function: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.vectors = nn.Parameter(torch.zeros(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.function(self.attention, self.vectors, x))


def queries(attention: nn.Module, vectors: Tensor, x: Tensor) -> Tensor:
    return attention(vectors.expand(len(x), -1, -1), x, x)[0].flatten(1)


def memory(attention: nn.Module, vectors: Tensor, x: Tensor) -> Tensor:
    every = vectors.expand(len(x), -1, -1)
    return attention(x, every, every)[0].flatten(1)


@pytest.mark.parametrize("function", [queries, memory])
def test_learned_vectors_for_all_samples(function):
    check(Function(function), normal(3, 4, 4))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("views", [2, 3])
def test_views_of_a_batch_behind_each_other(batch_first, views):
    class Views(Attending):
        def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
            several = torch.cat([torch.sin(x + number) for number in range(views)])
            several = super().forward(several).unflatten(0, (views, len(x)))
            return several.cumprod(0).sum(0)

    check(Views(batch_first, False), normal(3, 4, 4))


def test_a_sequence_without_a_batch():
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.attention(x, x, x)[0]).flatten().unsqueeze(0)

    check(Alone(), normal(4, 4))


def test_a_decoder_with_its_encoder():
    class Translating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            options = {"dropout": 0.0, "batch_first": True}
            self.encoder = nn.TransformerEncoder(
                nn.TransformerEncoderLayer(4, 2, 6, **options), 1, enable_nested_tensor=False
            )
            self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, 6, **options), 1)

        def forward(self, x: Tensor, source: Tensor) -> Tensor:
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1]).to(x)
            out = self.decoder(x, self.encoder(source), tgt_mask=mask, tgt_is_causal=True)
            return out[..., :2].flatten(1)

    check(Translating(), normal(3, 4, 4), normal(3, 5, 4, seed=1))
