r"""Linear layers whose backward pass makes the natural gradient itself.

A layer's gradient is ``G = δᵀa`` and its natural gradient ``B⁻¹ G A⁻¹ = (δB⁻¹)ᵀ(aA⁻¹)``: the same
product of preconditioned rows. Making it in the backward pass saves the plain weight-gradient
product. It is linear in the rows, so sums over micro-batches and averages over data-parallel
replicas of such gradients are the natural gradients of the sums and averages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from natgrad.capture.hooks import ModelHook, is_pulling_back, outside_graphs

if TYPE_CHECKING:
    from natgrad.curvature.kfac import KroneckerPart

__all__ = ["FusedGradient"]

#: Random vectors that estimate ``⟨Δ, ∇L⟩``, which the KL bound needs and no gradient is left for.
PROBES = 16


class FusedGradient:
    """Makes one linear layer's ``.grad`` its natural gradient.

    The inverses are those of the last step. Whether they are used is decided at the first
    backward pass after a step and kept for all that accumulate with it: not before there are
    inverses, and not where a batch has so many rows that the plain product is cheaper.

    Args:
        module: The layer.
        part: Its Kronecker factors.
    """

    def __init__(self, module: nn.Linear, part: KroneckerPart) -> None:
        self.part = part
        #: Whether ``.grad`` holds a natural gradient; None before the first backward pass.
        self.active: bool | None = None
        self._products: Tensor | None = None
        self._probes: Tensor | None = None
        hook = ModelHook(self, FusedGradient._after_forward)
        self.handle = module.register_forward_hook(hook, prepend=True)

    def remove(self) -> None:
        """Give the layer its own backward pass back."""
        self.handle.remove()

    def reset(self) -> None:
        """Forget what was accumulated."""
        self.active, self._products = None, None

    def inner_product(self, natural: dict[str, Tensor]) -> Tensor:
        """Return an unbiased estimate of ``⟨Δ, ∇L⟩`` over the layer.

        ``E[(Δz)·(∇L z)]`` over random signs z is exact, and ``∇L z = δᵀ(az)`` costs little.
        """
        weight, *rest = (natural[name] for name in self.part.names)
        assert self._products is not None and self._probes is not None
        moved = weight.to(self._probes.dtype) @ self._probes[: weight.shape[1]]
        if rest:
            moved = moved + rest[0].unsqueeze(1) * self._probes[-1]
        return (moved * self._products).sum() / PROBES

    @outside_graphs
    def _after_forward(self, module: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> Any:
        if not (torch.is_grad_enabled() and output.requires_grad and module.weight.requires_grad):
            return None
        alias = output.detach()
        return _FusedLinear.apply(alias, inputs[0], module.weight, module.bias, self)

    def gradients(self, inputs: Tensor, delta: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return gradients of weight and bias, natural or plain.

        Args:
            inputs: ``a``, ``(R, d_in)``.
            delta: ``δ``, ``(R, d_out)``.
        """
        if self.active is None:
            self.active = self.part.can_fuse(delta.shape[0])
        if not self.active:
            return delta.T @ inputs, delta.sum(0)
        a, d = self.part.cast(inputs), self.part.cast(delta)
        self._observe(a, d)
        return self.part.precondition_rows(a, d)

    def _observe(self, a: Tensor, delta: Tensor) -> None:
        width = a.shape[1]
        if self._probes is None or (self._probes.device, self._probes.dtype) != (a.device, a.dtype):
            generator = torch.Generator().manual_seed(width)
            signs = torch.randint(0, 2, (width + 1, PROBES), generator=generator)
            self._probes = (2.0 * signs - 1.0).to(a)
        scores = a @ self._probes[:width]
        if self.part.layout.has_bias:
            scores = scores + self._probes[-1]
        products = delta.T @ scores
        self._products = products if self._products is None else self._products + products


class _FusedLinear(torch.autograd.Function):
    """The identity on a linear layer's output, with the layer's backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        fused: FusedGradient,
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.fused, ctx.has_bias = fused, bias is not None
        ctx.mark_dirty(output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Any) -> Any:
        delta: Tensor = cotangents[0]
        inputs, weight = ctx.saved_tensors
        _, needs_inputs, needs_weight, needs_bias, _ = ctx.needs_input_grad
        to_inputs = (delta @ weight.to(delta.dtype)).to(inputs.dtype) if needs_inputs else None
        if is_pulling_back(delta) or not needs_weight:
            return None, to_inputs, None, None, None
        a, d = inputs.flatten(0, -2), delta.flatten(0, -2)
        to_weight, to_bias = ctx.fused.gradients(a.to(d.dtype), d)
        to_weight = to_weight.to(weight.dtype)
        if not ctx.has_bias or not needs_bias or to_bias is None:
            return None, to_inputs, to_weight, None, None
        return None, to_inputs, to_weight, to_bias.to(weight.dtype), None
