"""Backward passes to the outputs of layers, for many vectors at once."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

__all__ = ["batched_gradients"]


def batched_gradients(
    output: Tensor, edges: list[GradientEdge], vectors: Tensor, retain_graph: bool
) -> list[Tensor | None]:
    """Return the gradient at every edge for every vector, stacked over vectors."""

    def backward(cotangent: Tensor, batched: bool, keep: bool) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(
            [output],
            edges,
            [cotangent],
            retain_graph=keep,
            allow_unused=True,
            is_grads_batched=batched,
        )

    if vectors.shape[0] == 1:
        single = backward(vectors[0], False, retain_graph)
        return [None if g is None else g.unsqueeze(0) for g in single]
    try:
        return list(backward(vectors, True, retain_graph))
    except RuntimeError as error:
        if "vmap" not in str(error) and "batching rule" not in str(error):
            raise
    # Some backward functions cannot be batched: one vector at a time.
    last = vectors.shape[0] - 1
    each = [backward(v, False, retain_graph or i < last) for i, v in enumerate(vectors)]
    return [
        None if column[0] is None else torch.stack(cast("list[Tensor]", list(column)))
        for column in zip(*each, strict=True)
    ]
