"""Embeddings: linear maps of one-hot inputs."""

from __future__ import annotations

from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from natgrad.capture.kinds import BlockRecord, LayerKind, fold_gradients, register_kind
from natgrad.jacobians import EmbeddingJacobian, LayerJacobian
from natgrad.layouts import BlockLayout

__all__ = ["EmbeddingKind"]


class EmbeddingKind(LayerKind):
    """:class:`torch.nn.Embedding`; tokens equal to ``padding_idx`` get no gradient."""

    may_be_shared: ClassVar[bool] = True

    def refuse(self, module: nn.Module) -> str | None:
        """Refuse tables whose gradient is rescaled by token frequency."""
        if cast(nn.Embedding, module).scale_grad_by_freq:
            return "its gradient is scaled by token frequency (scale_grad_by_freq=True)"
        return None

    def layout(
        self, module: nn.Module, names: tuple[str, ...], qualified: tuple[str, ...]
    ) -> BlockLayout:
        """Return ``d × V``, stored transposed."""
        shape = tuple(module.get_parameter("weight").shape)
        return BlockLayout(qualified, (shape,), 1, shape[1], shape[0], True, False, True, True)

    def jacobian(self, block: BlockRecord) -> LayerJacobian:
        """Form rows from token indices and output gradients."""
        indices: list[Tensor] = []
        deltas: list[Tensor] = []
        for call, delta in block.single_outputs():
            d = fold_gradients(delta, block.samples, block.layout.d_out)
            index = call.inputs[0].reshape(block.samples, -1)
            padding = cast(nn.Embedding, call.module).padding_idx
            if padding is not None:
                d = d * (index != padding)[:, None, :, None]
            indices.append(index)
            deltas.append(d.unsqueeze(3))
        return EmbeddingJacobian(
            block.layout, torch.cat(indices, 1), torch.cat(deltas, 2), skip_silent=block.skip_silent
        )


register_kind(EmbeddingKind(), nn.Embedding)
