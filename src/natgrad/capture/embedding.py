"""Embeddings: linear maps of one-hot inputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from natgrad.capture.kinds import (
    BlockRecord,
    CallGradients,
    LayerCall,
    LayerKind,
    fold_gradients,
    register_kind,
)
from natgrad.capture.rerun import rerun
from natgrad.jacobians import EmbeddingJacobian, LayerJacobian
from natgrad.layouts import BlockLayout


class EmbeddingKind(LayerKind):
    """:class:`torch.nn.Embedding`; tokens equal to ``padding_idx`` get no gradient."""

    may_be_shared: ClassVar[bool] = True

    def sample_dims(self, dims: int) -> range:
        """Return all but the last: ``(..., d)``."""
        return range(dims - 1)

    def refuse(self, module: nn.Module) -> str | None:
        """Refuse tables whose gradient is rescaled by token frequency."""
        if getattr(module, "scale_grad_by_freq", False):
            return "its gradient is scaled by token frequency (scale_grad_by_freq=True)"
        return None

    def layout(
        self, module: nn.Module, names: tuple[str, ...], qualified: tuple[str, ...]
    ) -> BlockLayout:
        """Return ``d × V``, stored transposed."""
        shape = tuple(module.get_parameter("weight").shape)
        return BlockLayout(qualified, (shape,), 1, shape[1], shape[0], True, False, True, True)

    def padding(self, module: nn.Module) -> int | None:
        """Return the row that gets no gradient, if there is one."""
        padding: int | None = getattr(module, "padding_idx", None)
        return padding

    def jacobian(self, block: BlockRecord) -> LayerJacobian:
        """Form rows from token indices and output gradients."""
        indices: list[Tensor] = []
        deltas: list[Tensor] = []
        for call, delta in block.single_outputs():
            d = fold_gradients(delta, block.samples, block.layout.d_out)
            index = call.inputs[0].reshape(block.samples, -1)
            padding = self.padding(call.module)
            if padding is not None:
                d = d * (index != padding)[:, None, :, None]
            indices.append(index)
            deltas.append(d.unsqueeze(3))
        return EmbeddingJacobian(
            block.layout, torch.cat(indices, 1), torch.cat(deltas, 2), partial=block.partial
        )


class LookupKind(EmbeddingKind):
    """Any module whose outputs are rows of its weight, each times a factor.

    Such are scaled embeddings, and tables of positions that are told no positions. Which rows and
    factors a call took is read from further runs of the module.
    """

    def observe(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> list[LayerCall]:
        """Keep ``(..., 2)``: a row, and its factor."""
        return [LayerCall(module, "", (looked_up(module, args, kwargs),), (output,))]

    def jacobian(self, block: BlockRecord) -> LayerJacobian:
        """Form rows from the rows of the table, their factors and output gradients."""
        calls: list[CallGradients] = []
        for call, delta in block.single_outputs():
            rows, factors = call.inputs[0].unbind(-1)
            scaled = delta * factors.unsqueeze(-1).to(delta.dtype)
            calls.append((replace(call, inputs=(rows.long(),)), [scaled]))
        return super().jacobian(replace(block, calls=calls))


def looked_up(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return which rows of its weight a module returns, and times what, ``(..., 2)`` in float64.

    Its output is affine in its weight ``(V, d)``, row by row.
    """
    weight = module.get_parameter("weight")
    numbers = torch.arange(len(weight), dtype=torch.float64, device=weight.device)
    rest, ones, numbered = (
        rerun(module, {"weight": column.unsqueeze(1).expand(weight.shape)}, args, kwargs)[..., 0]
        for column in (torch.zeros_like(numbers), torch.ones_like(numbers), numbers)
    )
    factors = ones - rest
    rows = torch.where(factors == 0, 0.0, (numbered - rest) / factors).round()
    return torch.stack([rows, factors], -1)


class EmbeddingBagKind(EmbeddingKind):
    """:class:`torch.nn.EmbeddingBag`: every token of a bag is a position, with its weight in δ.

    Weights are those of the call, one over the size of the bag, or per dimension 1 for the token
    that is the largest.
    """

    may_be_shared: ClassVar[bool] = False

    def observe(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> list[LayerCall]:
        """Keep ``(B, T, 1 + w)``: a token, −1 for none, and its ``w`` weights, 1 or ``d``.

        Both are one tensor, so that they are moved together where samples are laid out.
        """
        bag = cast(nn.EmbeddingBag, module)
        given = dict(zip(("input", "offsets", "per_sample_weights"), args, strict=False)) | kwargs
        with torch.no_grad():
            tokens = given["input"].detach()
            weights = given.get("per_sample_weights")
            weights = torch.ones_like(tokens, dtype=torch.float64) if weights is None else weights
            weights = weights.detach().double()
            if tokens.dim() == 1:
                inside, slots = _slots(tokens, given["offsets"], bag.include_last_offset)
                tokens = torch.where(inside, tokens[slots], -1)
                weights = weights[slots]
            if bag.padding_idx is not None:
                tokens = torch.where(tokens == bag.padding_idx, -1, tokens)
            real = tokens >= 0
            weights = torch.where(real, weights, 0.0)
            if bag.mode == "mean":
                weights = weights / real.sum(1, keepdim=True).clamp(min=1)
            weights = weights.unsqueeze(2)
            if bag.mode == "max":
                values = bag.weight.detach()[tokens.clamp(min=0)]
                values = values.masked_fill(~real.unsqueeze(2), -torch.inf)
                largest = (values == values.amax(1, keepdim=True)) & real.unsqueeze(2)
                # Of equal values the first counts.
                weights = (largest & (largest.cumsum(1) == 1)).double()
        packed = torch.cat([tokens.unsqueeze(2).double(), weights], 2)
        return [LayerCall(module, "", (packed,), (output,))]

    def jacobian(self, block: BlockRecord) -> LayerJacobian:
        """Form rows from tokens, their weights and the bags' output gradients."""
        indices: list[Tensor] = []
        deltas: list[Tensor] = []
        for call, delta in block.single_outputs():
            packed = call.inputs[0]
            indices.append(packed[..., 0].long().reshape(block.samples, -1))
            weighted = delta.unsqueeze(2) * packed[..., 1:].to(delta.dtype)
            d = fold_gradients(weighted, block.samples, block.layout.d_out)
            deltas.append(d.unsqueeze(3))
        index = torch.cat(indices, 1)
        rows = EmbeddingJacobian(
            block.layout, index.clamp(min=0), torch.cat(deltas, 2), partial=block.partial
        )
        real, active = (index >= 0).to(rows.dtype), rows.active_positions
        rows.active_positions = real if active is None else real * active
        return rows


def _slots(tokens: Tensor, offsets: Tensor, include_last: bool) -> tuple[Tensor, Tensor]:
    """Return which places ``(B, T)`` of bags hold a token, and which one."""
    ends = offsets.new_tensor([len(tokens)])
    borders = offsets if include_last else torch.cat([offsets, ends])
    sizes = borders.diff()
    longest = int(sizes.max()) if len(sizes) else 0
    places = torch.arange(longest, device=tokens.device)
    inside = places < sizes.unsqueeze(1)
    return inside, torch.where(inside, borders[:-1].unsqueeze(1) + places, 0)


register_kind(EmbeddingKind(), nn.Embedding)
register_kind(EmbeddingBagKind(), nn.EmbeddingBag)
