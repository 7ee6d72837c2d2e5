r"""Layers that map a stack of derivatives, and how natgrad sees them.

A stack has shape ``(N, T, d)``: per point the value, first derivatives and second derivatives of
``d`` functions. A linear layer maps every row by its weight but adds its bias to the value alone.
So the bias is the weight of one more input that is 1 in the row of the value and 0 in the others,
and the layer's Jacobian rows are those of an ordinary linear layer with T shared positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from natgrad.capture.kinds import (
    BlockRecord,
    LayerKind,
    fold_gradients,
    fold_inputs,
    parameter_shapes,
    register_kind,
)
from natgrad.jacobians import LayerJacobian
from natgrad.layouts import BlockLayout
from natgrad.residuals.activations import activation_derivatives


@dataclass(frozen=True)
class StackRows:
    """Which row of a stack is what.

    Attributes:
        first: Coordinates of the first derivatives, in rows ``1 … F``.
        second: Pairs of places in ``first`` whose second derivatives follow.
        laplacian: Places in ``first`` whose second derivatives are summed in the last row; none
            for no such row.
    """

    first: tuple[int, ...]
    second: tuple[tuple[int, int], ...]
    laplacian: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of rows ``T``."""
        return 1 + len(self.first) + len(self.second) + bool(self.laplacian)

    def start(self, points: Tensor) -> Tensor:
        """Return the stack of the coordinates themselves, ``(N, T, D)``."""
        stack = points.new_zeros(points.shape[0], self.count, points.shape[1])
        stack[:, 0] = points
        for row, coordinate in enumerate(self.first, start=1):
            stack[:, row, coordinate] = 1.0
        return stack

    def directions(self, point: Tensor) -> Tensor:
        """Return the first derivatives of a point's coordinates themselves, ``(F, D)``."""
        unit = torch.eye(len(point), dtype=point.dtype, device=point.device)
        return unit[list(self.first)]

    def products(self, first: Tensor) -> Tensor | None:
        """Return what φ'' is multiplied by in rows of second order, if any, of z' ``(N, F, d)``."""
        parts = []
        if self.second or len(self.laplacian) < len(self.first):
            rows = first.unbind(1)  # Differentiates faster than indexing does.
            parts += [(rows[i] * rows[j]).unsqueeze(1) for i, j in self.second]
        if len(self.laplacian) == len(self.first):
            parts.append(first.square().sum(1, keepdim=True))
        elif self.laplacian:
            squares = [rows[i].square() for i in self.laplacian]
            parts.append(torch.stack(squares, 1).sum(1, keepdim=True))
        return torch.cat(parts, 1) if parts else None


class StackLinear(nn.Module):
    """A linear layer on a stack; its parameters are those of an ordinary one.

    Raises:
        TypeError: If the layer's weight is computed from other parameters.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        if parametrize.is_parametrized(linear) or not isinstance(linear.weight, nn.Parameter):
            raise TypeError(
                "TaylorNetwork needs plain Linear layers, got one whose weight is computed from "
                "other parameters: remove the parametrization, or use jacobians='vmap'"
            )
        self.in_features: int = linear.in_features
        self.out_features: int = linear.out_features
        self.weight: nn.Parameter = linear.weight
        self.bias: nn.Parameter | None = linear.bias

    def forward(self, stack: Tensor) -> Tensor:
        """Return ``Ws`` for every row s of ``(N, T, d_in)``, plus the bias in row 0."""
        mapped = nn.functional.linear(stack, self.weight)
        if self.bias is None:
            return mapped
        value, rest = mapped.split([1, mapped.shape[1] - 1], 1)
        return torch.cat([value + self.bias, rest], 1)

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


class StackActivation(nn.Module):
    r"""An elementwise activation on a stack, by the chain rule.

    ``∂_i h = φ' ∂_i z``, ``∂_ij h = φ' ∂_ij z + φ'' ∂_i z ∂_j z`` and
    ``Δh = φ' Δz + φ'' Σ_i (∂_i z)²``.
    """

    def __init__(self, activation: nn.Module, rows: StackRows) -> None:
        super().__init__()
        self.activation: nn.Module = activation
        self.rows: StackRows = rows
        self._derivatives = activation_derivatives(activation)

    def derivatives(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``φ(z)``, ``φ'(z)`` and ``φ''(z)``, in the shape of z."""
        return self._derivatives(self.activation, z)

    def forward(self, stack: Tensor) -> Tensor:
        """Return the stack of ``φ(z)`` from that of z, ``(N, T, d)``."""
        orders = len(self.rows.first)
        z, first, second = stack.split([1, orders, stack.shape[1] - 1 - orders], 1)
        value, slope, bend = self._derivatives(self.activation, z)
        products = self.rows.products(first)
        if products is None:
            return torch.cat([value, slope * first], 1)
        return torch.cat([value, slope * first, torch.addcmul(bend * products, slope, second)], 1)


@dataclass(frozen=True)
class JoinedLayout(BlockLayout):
    """A weight and a bias whose bias is the last column of one matrix, like any other input.

    ``d_in`` counts that column and ``has_bias`` is False, so that the bias need not see 1
    everywhere. The flat vector is weight before bias, as always.
    """

    def matrix(self, flat: Tensor) -> Tensor:
        """Turn flat vectors ``(..., P_l)`` into matrices ``(..., 1, d_out, d_in)``."""
        lead = flat.shape[:-1]
        weight, bias = flat.split([flat.shape[-1] - self.d_out, self.d_out], dim=-1)
        weight = weight.reshape(*lead, 1, self.d_out, self.d_in - 1)
        return torch.cat([weight, bias.reshape(*lead, 1, self.d_out, 1)], dim=-1)

    def flat(self, matrix: Tensor) -> Tensor:
        """Turn matrices ``(..., 1, d_out, d_in)`` into flat vectors ``(..., P_l)``."""
        lead = matrix.shape[:-3]
        weight, bias = matrix.split([self.d_in - 1, 1], dim=-1)
        return torch.cat([weight.reshape(*lead, -1), bias.reshape(*lead, -1)], dim=-1)


class StackLinearKind(LayerKind):
    """How natgrad records :class:`StackLinear` and forms its rows."""

    def layout(
        self, module: nn.Module, names: tuple[str, ...], qualified: tuple[str, ...]
    ) -> BlockLayout:
        """Return one group of ``out_features × (in_features + 1)``, less what is frozen."""
        assert isinstance(module, StackLinear)
        shapes = parameter_shapes(module, names)
        d_out, d_in = module.out_features, module.in_features
        if names == ("bias",):
            return BlockLayout(qualified, shapes, 1, d_out, 0, False, True)
        if names == ("weight",):
            return BlockLayout(qualified, shapes, 1, d_out, d_in, True, False)
        return JoinedLayout(qualified, shapes, 1, d_out, d_in + 1, True, False)

    def jacobian(self, block: BlockRecord) -> LayerJacobian:
        """Form rows from stacks ``(N, T, d_in)`` and their output gradients."""
        rows: list[tuple[Tensor, Tensor]] = []
        for call, delta in block.single_outputs():
            stack = call.inputs[0]
            if block.names == ("weight", "bias"):
                constant = stack.new_zeros(*stack.shape[:-1], 1)
                constant[..., 0, :] = 1.0
                stack = torch.cat([stack, constant], -1)
            a = fold_inputs(stack, block.samples, stack.shape[-1])
            d = fold_gradients(delta, block.samples, block.layout.d_out)
            if "weight" not in block.names:  # The bias sees the rows of values alone.
                count = stack.shape[-2]
                a, d = a[:, ::count, :0], d[:, :, ::count]
            rows.append((a.unsqueeze(2), d.unsqueeze(3)))
        return block.linear(rows)


register_kind(StackLinearKind(), StackLinear)
