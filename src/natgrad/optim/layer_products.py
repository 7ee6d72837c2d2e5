"""The products of which the backward pass of a linear map is made, layer by layer type."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, cast

import torch
from torch import Tensor, nn

from natgrad.capture.convolution import ConvolutionKind
from natgrad.capture.embedding import EmbeddingKind
from natgrad.capture.kinds import LayerKind
from natgrad.capture.linear import LinearKind, TransposedLinearKind

__all__ = [
    "ConvolutionProduct",
    "EmbeddingProduct",
    "LayerProduct",
    "LinearProduct",
    "find_product",
]


class LayerProduct(ABC):
    """How one layer's backward pass is computed from a, δ and the weight."""

    def input_gradient(self, inputs: Tensor, weight: Tensor, delta: Tensor) -> Tensor:
        """Return the gradient at the input, of the input's shape.

        Args:
            inputs: ``a``.
            weight: The layer's weight.
            delta: ``δ``.

        Raises:
            NotImplementedError: If inputs have no gradient, as indices of a table.
        """
        raise NotImplementedError

    @abstractmethod
    def weighted(
        self, inputs: Tensor, weight: Tensor, delta: Tensor, factors: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return the gradients of weight and bias, each sample's share times a factor.

        Args:
            inputs: ``a``, ``(n·r, ...)``.
            weight: The layer's weight.
            delta: ``δ``, ``(n·r, ...)``.
            factors: One factor per sample, ``(n,)``.
        """


#: One scratch tensor per dtype and device: fresh memory for every layer would cost page faults.
_scratch: dict[tuple[torch.dtype, torch.device], Tensor] = {}


def _scaled_copy(rows: Tensor, factors: Tensor) -> Tensor:
    """Return ``rows`` times one factor per entry of the first dimension, in scratch memory."""
    key, size = (rows.dtype, rows.device), rows.numel()
    room = _scratch.get(key)
    if room is None or room.numel() < size:
        room = _scratch[key] = rows.new_empty(size)
    out = room[:size].view(rows.shape)
    return torch.mul(rows, factors.view(-1, *[1] * (rows.dim() - 1)), out=out)


def _per_row(factors: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """Repeat the factors of ``n`` samples for ``n·r`` rows."""
    factors = factors.to(dtype)
    return factors if len(factors) == rows else factors.repeat_interleave(rows // len(factors))


class LinearProduct(LayerProduct):
    """``y = x Wᵀ + b``, or ``y = x W + b``.

    Args:
        transposed: Whether the weight is stored as ``(in, out)``.
    """

    def __init__(self, transposed: bool = False) -> None:
        self.transposed = transposed

    def input_gradient(self, inputs: Tensor, weight: Tensor, delta: Tensor) -> Tensor:
        """Return ``δ W``."""
        weight = weight.to(delta.dtype)
        return delta @ (weight.T if self.transposed else weight)

    def weighted(
        self, inputs: Tensor, weight: Tensor, delta: Tensor, factors: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Scale the smaller one of a and δ."""
        a, d = inputs.flatten(0, -2).to(delta.dtype), delta.flatten(0, -2)
        factors = _per_row(factors, len(d), d.dtype)
        if a.shape[1] < d.shape[1]:
            a, bias = _scaled_copy(a, factors), factors @ d
        else:
            d = _scaled_copy(d, factors)
            bias = d.sum(0)
        return (a.T @ d if self.transposed else d.T @ a), bias


class ConvolutionProduct(LayerProduct):
    """Conv1d, Conv2d and Conv3d with zero padding.

    Args:
        module: The layer.
    """

    def __init__(self, module: nn.Module) -> None:
        convolution = cast(nn.Conv2d, module)
        padding = convolution._reversed_padding_repeated_twice[::-2]
        self.has_bias = convolution.bias is not None
        self.options = (
            list(convolution.stride), list(padding), list(convolution.dilation), False,
            [0] * len(padding), convolution.groups,
        )  # fmt: skip

    def input_gradient(self, inputs: Tensor, weight: Tensor, delta: Tensor) -> Tensor:
        """Return the transposed convolution of δ."""
        weight = weight.to(delta.dtype)
        mask = [True, False, False]
        return self._backward(delta, inputs.to(delta.dtype), weight, None, mask)[0]

    def weighted(
        self, inputs: Tensor, weight: Tensor, delta: Tensor, factors: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Scale the smaller one of a and δ, where there is a bias δ."""
        a, weight = inputs.to(delta.dtype), weight.to(delta.dtype)
        factors = _per_row(factors, len(delta), delta.dtype)
        if a.numel() < delta.numel() and not self.has_bias:
            a = _scaled_copy(a, factors)
        else:
            delta = _scaled_copy(delta, factors)
        sizes = [delta.shape[1]] if self.has_bias else None
        mask = [False, True, self.has_bias]
        _, to_weight, to_bias = self._backward(delta, a, weight, sizes, mask)
        return to_weight, to_bias if self.has_bias else None

    def _backward(self, delta: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        *tensors, mask = rest
        convolution_backward = torch.ops.aten.convolution_backward
        return cast(
            "tuple[Tensor, Tensor, Tensor]",
            convolution_backward(delta, *tensors, *self.options, mask),
        )


class EmbeddingProduct(LayerProduct):
    """A table of vectors.

    Args:
        module: The layer.
    """

    def __init__(self, module: nn.Module) -> None:
        table = cast(nn.Embedding, module)
        self.size = table.num_embeddings
        self.padding = -1 if table.padding_idx is None else table.padding_idx

    def weighted(
        self, inputs: Tensor, weight: Tensor, delta: Tensor, factors: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Scale δ."""
        scaled = _scaled_copy(delta, _per_row(factors, len(delta), delta.dtype))
        backward = torch.ops.aten.embedding_dense_backward
        return backward(scaled, inputs, self.size, self.padding, False), None


def find_product(module: nn.Module, kind: LayerKind) -> LayerProduct | None:
    """Return how a layer's products are made, or None where that is not known."""
    if type(kind) is LinearKind:
        return LinearProduct()
    if type(kind) is TransposedLinearKind:
        return LinearProduct(transposed=True)
    if isinstance(kind, ConvolutionKind):
        padding = cast(nn.Conv2d, module)._reversed_padding_repeated_twice
        symmetric = list(padding[::2]) == list(padding[1::2])
        plain = cast(nn.Conv2d, module).padding_mode == "zeros"
        return ConvolutionProduct(module) if plain and symmetric else None
    if isinstance(kind, EmbeddingKind):
        return None if cast(nn.Embedding, module).sparse else EmbeddingProduct(module)
    return None
