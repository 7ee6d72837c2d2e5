"""Layers whose backward pass weighs the samples with kept coefficients.

The weights enter the product that makes the weight's gradient, ``Σ_n c_n δ_nᵀ a_n``, by scaling the
smaller one of its two factors: no gradient per sample is formed and no second pass is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from natgrad.capture.blocks import Use
from natgrad.capture.hooks import ModelHook, inside_backward, outside_graphs
from natgrad.fngd.coefficients import Coefficients
from natgrad.fngd.layer_products import WeightedProduct, find_product
from natgrad.layouts import BlockLayout, inner_product
from natgrad.optim.fused.own_backward import Gradients, LayerProduct, OwnBackward

__all__ = ["CoefficientClock", "WeightedGradient", "weighable_layers"]


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
        model.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)

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
