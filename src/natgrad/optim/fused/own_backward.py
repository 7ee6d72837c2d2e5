"""Layers whose backward pass makes another gradient of their parameters than autograd would.

The gradient of a linear map is a product of two tensors that the backward pass holds anyway, its
inputs a and the gradients δ at its outputs. Whoever wants a modified product, preconditioned or
weighted, can make it there and then instead of the plain one, and it arrives in ``.grad``. It is
linear in the rows, so sums over micro-batches and averages over data-parallel replicas of such
gradients are the modified gradients of the sums and averages.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from natgrad.capture.hooks import (
    ModelHook,
    holds_statistics,
    is_pulling_back,
    leave_with,
    outside_graphs,
    remove_hooks,
)
from natgrad.distributed.replicas import Replicas
from natgrad.layouts import inner_product

#: Gradients at the input (if it is asked for), of the weight and of the bias (if there is one).
Gradients = tuple["Tensor | None", Tensor, "Tensor | None"]


class LayerProduct:
    """How one layer's backward pass is computed from a, δ and the weight."""

    def input_gradient(self, inputs: Tensor, weight: Tensor, delta: Tensor) -> Tensor:
        """Return the gradient at the input; NotImplementedError for indices of a table."""
        raise NotImplementedError

    def plain_gradients(self, inputs: Tensor, delta: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the plain gradients of weight and bias, for checks; None where not known."""
        return None, None


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
        d = delta.reshape(-1, delta.shape[-1])
        return (d @ (weight.T if self.transposed else weight)).view(inputs.shape)

    def plain_gradients(self, inputs: Tensor, delta: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return ``δᵀa`` and ``Σ δ``."""
        d = delta.reshape(-1, delta.shape[-1])
        weight = d.T @ inputs.reshape(-1, inputs.shape[-1]).to(d.dtype)
        return weight.T if self.transposed else weight, d.sum(0)


class OwnBackward(ABC):
    """Lays a backward pass of its own over layers, for parameters that belong together.

    Args:
        names: Qualified names of the parameters.
        modules: The layers, with how each one's products are made.
    """

    def __init__(
        self, names: Iterable[str], modules: Iterable[tuple[nn.Module, LayerProduct]]
    ) -> None:
        self.names: tuple[str, ...] = tuple(names)
        #: Whether ``.grad`` holds the modified gradient; None before the first backward pass.
        self.active: bool | None = None
        self.products: dict[nn.Module, LayerProduct] = dict(modules)
        hook = ModelHook(self, OwnBackward._after_forward)
        self._handles = [
            module.register_forward_hook(hook, prepend=True, with_kwargs=True)
            for module in self.products
        ]
        leave_with(self, self._handles)

    def remove(self) -> None:
        """Give the layers their own backward pass back."""
        remove_hooks(self._handles)

    def reset(self) -> None:
        """Forget what was accumulated."""
        self.active = None

    @abstractmethod
    def inner_product(self, natural: dict[str, Tensor]) -> Tensor:
        """Return ``⟨Δ, ∇L⟩``, as nearly as can be told without ∇L; NaN or infinite if Δ is."""

    def overlap(self, natural: dict[str, Tensor]) -> Tensor:
        """Return ``‖Δ‖²`` and ``⟨Δ, Δ'⟩``, ``(2,)``, or estimates; Δ' is what backward passes left.

        Their quotient is the factor that clipping or a loss scaler has put on Δ since.
        """
        return next(iter(natural.values())).new_ones(2)

    @abstractmethod
    def gradients(
        self,
        product: LayerProduct,
        inputs: Tensor,
        weight: Tensor,
        delta: Tensor,
        call: Any,
        needs_inputs: bool,
    ) -> Gradients:
        """Return what the backward pass leaves at the input and for weight and bias.

        Args:
            product: How products of this layer are made.
            inputs: ``a``, the layer's input.
            weight: The layer's weight.
            delta: ``δ``, the gradient at its output.
            call: What :meth:`call` returned at the forward pass.
            needs_inputs: Whether the gradient at the input is asked for.
        """

    def call(self, module: nn.Module, inputs: Tensor) -> Any:
        """Return what :meth:`gradients` needs to know of a call, or None to leave it alone."""
        return True

    @outside_graphs
    def _after_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Any:
        if not (torch.is_grad_enabled() and output.requires_grad):
            return None
        if torch._C._are_functorch_transforms_active():
            return None  # torch.func differentiates the layer as it is.
        weight = module._parameters.get("weight")  # None where it is computed from others.
        if weight is None or not weight.requires_grad:
            return None
        inputs = args[0] if args else kwargs["input"]
        call = self.call(module, inputs)
        if call is None:
            return None
        bias = module._parameters.get("bias")
        context = self, self.products[module], call
        # What `apply` adds to this for torch.func costs more than all the rest of the hook.
        apply: Any = super(torch.autograd.Function, _Own).apply
        return apply(output.detach(), inputs, weight, bias, context)


class OwnBackwards(dict[str, OwnBackward]):
    """Block name → what lays a backward pass of its own over its layers."""

    @property
    def active(self) -> dict[str, OwnBackward]:
        """Those for whose parameters ``.grad`` holds the modified gradient."""
        return {name: one for name, one in self.items() if one.active}

    @property
    def held(self) -> set[str]:
        """Names of the parameters of those that are active."""
        return {name for one in self.active.values() for name in one.names}

    def remove(self) -> None:
        """Give all layers their own backward pass back."""
        for one in self.values():
            one.remove()
        self.clear()

    def inner_product(
        self, natural: dict[str, Tensor], gradients: dict[str, Tensor], replicas: Replicas
    ) -> Tensor:
        """Return ``⟨Δ, ∇L⟩``; estimated for layers whose ``.grad`` holds Δ already."""
        terms, held = [], self.held
        if natural:
            overlaps = torch.stack([one.overlap(natural) for one in self.values()])
            replicas.average({"overlaps": overlaps})
            size, made = overlaps.unbind(1)
            factors = torch.where(made == 0, 1.0, size / made)
            pairs = zip(factors, self.values(), strict=True)
            terms = [factor * one.inner_product(natural) for factor, one in pairs if one.active]
        rest = {name: value for name, value in natural.items() if name not in held}
        if rest or not terms:
            terms.append(inner_product(rest, gradients))
        return torch.stack(terms).sum()


class _Own(torch.autograd.Function):
    """The identity on a layer's output, with a backward pass of our own."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        context: tuple[OwnBackward, LayerProduct, Any],
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.context = context
        ctx.mark_dirty(output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Any) -> Any:
        delta: Tensor = cotangents[0]
        inputs, weight = ctx.saved_tensors
        owner, product, call = ctx.context
        _, needs_inputs, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        pulling = is_pulling_back(delta)
        if pulling or not needs_weight:
            to_inputs = None
            if needs_inputs:
                to_inputs = product.input_gradient(inputs, weight, delta).to(inputs.dtype)
            if not pulling or holds_statistics():
                return None, to_inputs, None, None, None
            to_weight, to_bias = product.plain_gradients(inputs, delta)
            return None, to_inputs, to_weight, to_bias if needs_bias else None, None
        found = owner.gradients(product, inputs, weight, delta, call, needs_inputs)
        to_inputs, to_weight, to_bias = found
        return (
            None,
            None if to_inputs is None else to_inputs.to(inputs.dtype),
            to_weight.to(weight.dtype),
            to_bias.to(weight.dtype) if needs_bias and to_bias is not None else None,
            None,
        )
