"""Layers whose backward pass weighs the samples with kept coefficients.

The weights enter the product that makes the weight's gradient, ``Σ_n c_n δ_nᵀ a_n``, by scaling the
smaller one of its two factors: no gradient per sample is formed and no second pass is made.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from natgrad.capture.blocks import Use
from natgrad.capture.convolution import ConvolutionKind, padding_of
from natgrad.capture.embedding import EmbeddingKind
from natgrad.capture.hooks import ModelHook, inside_backward, leave_with, outside_graphs
from natgrad.capture.kinds import LayerKind
from natgrad.capture.linear import LinearKind, TransposedLinearKind
from natgrad.fngd.coefficients import Coefficients
from natgrad.layouts import BlockLayout, inner_product
from natgrad.optim.fused.own_backward import (
    Gradients,
    LayerProduct,
    LinearProduct,
    OwnBackward,
)

# The products of which a backward pass is made, with a weight per sample.


class WeightedProduct(LayerProduct):
    """Products in which every sample's share has a weight."""

    @abstractmethod
    def weighted(
        self, inputs: Tensor, weight: Tensor, delta: Tensor, factors: Tensor, needs_inputs: bool
    ) -> Gradients:
        """Return gradients, where those of weight and bias have each sample's share times a factor.

        ``a`` and ``δ`` are ``(n·r, ...)``, the factors ``(n,)``; the gradient at the input is made
        if it is asked for.
        """


_CONVOLUTION_BACKWARD = torch.ops.aten.convolution_backward.default
_EMBEDDING_BACKWARD = torch.ops.aten.embedding_dense_backward.default

#: Views remembered at most; batches of many lengths would fill memory with them.
MAX_VIEWS = 1024


class _Scratch(threading.local):
    """One tensor per dtype and the views of it that were used, for every thread its own.

    On the CPU fresh memory for every layer would cost page faults.
    """

    def __init__(self) -> None:
        self.tensors: dict[torch.dtype, Tensor] = {}
        self.views: dict[tuple[torch.dtype, torch.Size, int], tuple[Tensor, Tensor]] = {}

    def like(self, rows: Tensor, samples: int) -> tuple[Tensor, Tensor]:
        """Return memory in the shape of the rows, and the same as ``(samples, ...)``."""
        key, size = (rows.dtype, rows.shape, samples), rows.numel()
        found = self.views.get(key)
        if found is None:
            if rows.dtype not in self.tensors or self.tensors[rows.dtype].numel() < size:
                self.tensors[rows.dtype] = rows.new_empty(size)
                self.views.clear()
            if len(self.views) >= MAX_VIEWS:
                self.views.clear()
            out = self.tensors[rows.dtype][:size]
            found = self.views[key] = out.view(rows.shape), out.view(samples, -1)
        return found


_scratch = _Scratch()


def _scaled_copy(rows: Tensor, factors: Tensor) -> Tensor:
    """Return rows ``(n·r, ...)`` times one factor per sample; on the CPU until the next call."""
    samples = len(factors)
    by_sample, column = rows.reshape(samples, -1), factors.to(rows.dtype).view(-1, 1)
    if rows.device.type != "cpu":
        return (by_sample * column).view(rows.shape)
    shaped, out = _scratch.like(rows, samples)
    torch.mul(by_sample, column, out=out)
    return shaped


def _weighted_sum(rows: Tensor, factors: Tensor) -> Tensor:
    """Return the sum of rows ``(n·r, d)``, each sample's times its factor."""
    total = factors.to(rows.dtype) @ rows.reshape(len(factors), -1)
    return total.view(-1, rows.shape[-1]).sum(0)


class WeightedLinear(WeightedProduct, LinearProduct):
    """``y = x Wᵀ + b``, or ``y = x W + b`` where the weight is stored as ``(in, out)``."""

    def __init__(self, has_bias: bool, transposed: bool = False) -> None:
        super().__init__(transposed)
        self.has_bias = has_bias

    def weighted(
        self, inputs: Tensor, weight: Tensor, delta: Tensor, factors: Tensor, needs_inputs: bool
    ) -> Gradients:
        """Scale δ, which has just been made and is in the cache, or a if it is much smaller."""
        to_inputs = self.input_gradient(inputs, weight, delta) if needs_inputs else None
        a = inputs.reshape(-1, inputs.shape[-1]).to(delta.dtype)
        d = delta.reshape(-1, delta.shape[-1])
        bias: Tensor | None = None
        if 2 * a.shape[1] < d.shape[1]:
            bias = _weighted_sum(d, factors) if self.has_bias else None
            a = _scaled_copy(a, factors)
        else:
            d = _scaled_copy(d, factors)
            bias = d.sum(0) if self.has_bias else None
        return to_inputs, (a.T @ d if self.transposed else d.T @ a), bias


class WeightedConvolution(WeightedProduct):
    """Conv1d, Conv2d and Conv3d with zero padding."""

    def __init__(self, module: nn.Module) -> None:
        self.module: nn.Conv2d = cast(nn.Conv2d, module)
        self.has_bias: bool = self.module.bias is not None

    @property
    def options(self) -> tuple[Any, ...]:
        """The geometry of the module as it is now."""
        one, padding = self.module, padding_of(self.module)[::-2]
        return (
            list(one.stride), list(padding), list(one.dilation), False, [0] * len(padding),
            one.groups,
        )  # fmt: skip

    def input_gradient(self, inputs: Tensor, weight: Tensor, delta: Tensor) -> Tensor:
        """Return the transposed convolution of δ."""
        weight = weight.to(delta.dtype)
        mask = [True, False, False]
        return self._backward(delta, inputs.to(delta.dtype), weight, None, mask)[0]

    def weighted(
        self, inputs: Tensor, weight: Tensor, delta: Tensor, factors: Tensor, needs_inputs: bool
    ) -> Gradients:
        """Scale a: the gradient at the input does not depend on it, so one call makes both."""
        a = _scaled_copy(inputs.to(delta.dtype), factors)
        mask = [needs_inputs, True, False]
        found = self._backward(delta, a, weight.to(delta.dtype), None, mask)
        bias = None
        if self.has_bias:
            samples = factors.to(delta.dtype) @ delta.reshape(len(factors), -1)
            bias = samples.view(-1, *delta.shape[1:]).transpose(0, 1).flatten(1).sum(1)
        return found[0] if needs_inputs else None, found[1], bias

    def _backward(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        *tensors, mask = arguments
        return cast(
            "tuple[Tensor, Tensor, Tensor]", _CONVOLUTION_BACKWARD(*tensors, *self.options, mask)
        )


class WeightedEmbedding(WeightedProduct):
    """A table of vectors."""

    def __init__(self, module: nn.Module) -> None:
        table = cast(nn.Embedding, module)
        self.size: int = table.num_embeddings
        self.padding: int = -1 if table.padding_idx is None else table.padding_idx

    def weighted(
        self, inputs: Tensor, weight: Tensor, delta: Tensor, factors: Tensor, needs_inputs: bool
    ) -> Gradients:
        """Scale δ."""
        scaled = _scaled_copy(delta, factors)
        return None, _EMBEDDING_BACKWARD(scaled, inputs, self.size, self.padding, False), None


def find_product(module: nn.Module, kind: LayerKind) -> WeightedProduct | None:
    """Return how a layer's products are made, or None where that is not known."""
    if type(kind) in (LinearKind, TransposedLinearKind):
        has_bias = isinstance(getattr(module, "bias", None), Tensor)  # Own layers may have none.
        return WeightedLinear(has_bias, transposed=type(kind) is TransposedLinearKind)
    if type(kind) is ConvolutionKind:
        padding = padding_of(cast(nn.Conv2d, module))
        symmetric = list(padding[::2]) == list(padding[1::2])
        plain = cast(nn.Conv2d, module).padding_mode == "zeros"
        return WeightedConvolution(module) if plain and symmetric else None
    if isinstance(kind, EmbeddingKind):
        return None if cast(nn.Embedding, module).sparse else WeightedEmbedding(module)
    return None


# Where they take place.


class CoefficientClock:
    """Knows which samples the present forward pass of a model is about.

    Kept coefficients are in use while ``weighing``; ``passes`` are the forward passes since, where
    they are counted; ``samples`` is the first dimension of the model's first tensor, and
    ``indices`` are those in the data set, where the user gave them.
    """

    def __init__(self, model: nn.Module, counts: bool) -> None:
        self.counts = counts
        self.weighing = False
        self.passes: int = 0
        self.samples: int = 0
        self.indices: Tensor | None = None
        hook = ModelHook(self, CoefficientClock._before_model)
        handle = model.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
        leave_with(self, [handle])

    @outside_graphs
    def _before_model(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not torch.is_grad_enabled() or inside_backward():
            return
        if self.weighing and self.counts:
            self.passes += 1
        given = (t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim())
        self.samples = next(map(len, given), 0)


class WeightedGradient(OwnBackward):
    """Makes the ``.grad`` of one block the weighted sum of its samples' gradients.

    The layers that use the block come with how their products are made; the clock knows the present
    batch.
    """

    def __init__(
        self,
        layout: BlockLayout,
        coefficients: Callable[[], Coefficients],
        layers: Iterable[tuple[nn.Module, WeightedProduct]],
        clock: CoefficientClock,
    ) -> None:
        super().__init__(layout.names, layers)
        self.coefficients: Callable[[], Coefficients] = coefficients
        self.clock: CoefficientClock = clock

    def call(self, module: nn.Module, inputs: Tensor) -> Tensor | None:
        """Return the coefficients of the batch, or None while there are none."""
        clock = self.clock
        if not clock.weighing:
            return None
        return self.coefficients().of_batch(clock.samples, clock.passes - 1, clock.indices)

    def gradients(
        self,
        product: LayerProduct,
        inputs: Tensor,
        weight: Tensor,
        delta: Tensor,
        call: Tensor,
        needs_inputs: bool,
    ) -> Gradients:
        """Return weighted gradients; see :class:`OwnBackward`."""
        assert isinstance(product, WeightedProduct)
        self.active: bool = True
        factors = call
        if len(delta) % len(factors):
            factors = factors.mean().reshape(1)
        return product.weighted(inputs, weight, delta, factors, needs_inputs)

    def inner_product(self, natural: dict[str, Tensor]) -> Tensor:
        """Return ``‖Δ‖²``: the plain gradient is not known, and only finiteness is asked for."""
        own = {name: natural[name] for name in self.names}
        return inner_product(own, own)


def weighable_layers(uses: Iterable[Use]) -> list[tuple[nn.Module, WeightedProduct]] | None:
    """Return a block's layers with their products, or None if one of them has none."""
    result: list[tuple[nn.Module, WeightedProduct]] = []
    for use in uses:
        own = {name for name, p in use.module.named_parameters(recurse=False) if p.requires_grad}
        product = find_product(use.module, use.kind)
        if product is None or own != set(use.names):
            return None
        result.append((use.module, product))
    return result
