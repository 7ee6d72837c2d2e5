r"""Linear layers whose backward pass makes the natural gradient of K-FAC itself.

A layer's gradient is ``G = δᵀa`` and its natural gradient ``B⁻¹ G A⁻¹ = (δB⁻¹)ᵀ(aA⁻¹)``: the same
product of preconditioned rows. Making it in the backward pass saves the plain weight-gradient
product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.layouts import BlockLayout
from natgrad.operators import KroneckerOperator, Operator
from natgrad.optim.fused.own_backward import Gradients, LayerProduct, LinearProduct, OwnBackward

#: Random vectors that estimate ``⟨Δ, ∇L⟩``, which the KL bound needs and no gradient is left for.
PROBES = 16


class FusedGradient(OwnBackward):
    """Makes one linear layer's ``.grad`` its natural gradient.

    The inverses are those of the last step. Whether they are used is decided at the first
    backward pass after a step and kept for all that accumulate with it: not before there are
    inverses, and not where a batch has so many rows that the plain product is cheaper.

    Args:
        module: The layer.
        layout: Layout of its block.
        takes_rows: Whether so many rows are cheaper to precondition than the gradient.
        inverse: Returns the present inverse of its Fisher block, or None.
    """

    def __init__(
        self,
        module: nn.Linear,
        layout: BlockLayout,
        takes_rows: Callable[[int], bool],
        inverse: Callable[[], Operator | None],
    ) -> None:
        super().__init__(layout.names, [(module, LinearProduct())])
        self.layout: BlockLayout = layout
        self.takes_rows: Callable[[int], bool] = takes_rows
        self.inverse: Callable[[], Operator | None] = inverse
        self._products: Tensor | None = None
        self._probes: Tensor | None = None
        self._made: Tensor | None = None

    def reset(self) -> None:
        """Forget what was accumulated."""
        super().reset()
        self._products = self._made = None

    def inner_product(self, natural: dict[str, Tensor]) -> Tensor:
        """Return an unbiased estimate of ``⟨Δ, ∇L⟩`` over the layer.

        ``E[(Δz)·(∇L z)]`` over random signs z is exact, and ``∇L z = δᵀ(az)`` costs little.
        """
        assert self._products is not None
        moved = self._along(PROBES, *(natural[name] for name in self.names))
        return (moved * self._products).sum() / PROBES

    def overlap(self, natural: dict[str, Tensor]) -> Tensor:
        """Return ``‖Δz‖²`` and ``⟨Δz, Δ'z⟩`` for a vector of random signs z."""
        if not self.active or self._made is None:
            return super().overlap(natural)
        now = self._along(1, *(natural[name] for name in self.names))
        return torch.stack([now.square().sum(), (now * self._made).sum()])

    def _along(self, probes: int, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return Δz for some of the probes."""
        assert self._probes is not None
        chosen = self._probes[:, :probes]
        moved = weight.to(chosen.dtype) @ chosen[: weight.shape[1]]
        return moved if bias is None else moved + bias.to(chosen.dtype).unsqueeze(1) * chosen[-1]

    def gradients(
        self,
        product: LayerProduct,
        inputs: Tensor,
        weight: Tensor,
        delta: Tensor,
        call: Any,
        needs_inputs: bool,
    ) -> Gradients:
        """Return the gradient at the input, and natural or plain ones of weight and bias."""
        to_inputs = product.input_gradient(inputs, weight, delta) if needs_inputs else None
        a, d = inputs.flatten(0, -2).to(delta.dtype), delta.flatten(0, -2)
        inverse = self.inverse()
        ready = isinstance(inverse, KroneckerOperator)
        if self.active is None:
            self.active: bool = ready and self.takes_rows(d.shape[0])
        if not self.active:
            return to_inputs, d.T @ a, d.sum(0)
        assert isinstance(inverse, KroneckerOperator)
        a, d = inverse.cast(a), inverse.cast(d)
        self._observe(a, d)
        made = inverse.multiply_rows(a, d)
        along = self._along(1, *(one for one in made if one is not None))
        self._made = along if self._made is None else self._made + along
        return to_inputs, *made

    def _observe(self, a: Tensor, delta: Tensor) -> None:
        width = a.shape[1]
        if self._probes is None or (self._probes.device, self._probes.dtype) != (a.device, a.dtype):
            generator = torch.Generator().manual_seed(width)
            signs = torch.randint(0, 2, (width + 1, PROBES), generator=generator)
            self._probes = (2.0 * signs - 1.0).to(a)
        scores = a @ self._probes[:width]
        if self.layout.has_bias:
            scores = scores + self._probes[-1]
        products = delta.T @ scores
        self._products = products if self._products is None else self._products + products
