"""Backward passes to the outputs of layers, for many vectors at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from natgrad.capture.hooks import own_backward, without_hooks
from natgrad.distributed.shards import whole

__all__ = ["RowsUnavailable", "batched_gradients"]


class RowsUnavailable(RuntimeError):
    """Vectors cannot be pulled back through a pass; the message says why and what to do."""


def batched_gradients(
    output: Tensor,
    targets: Sequence[GradientEdge | Tensor],
    vectors: Tensor,
    retain_graph: bool,
    *,
    fixed_statistics: bool = True,
) -> list[Tensor | None]:
    """Return the gradient at every edge or tensor for every vector, stacked over vectors.

    Those at tensors in shards, as in tensor parallelism, are whole.

    Args:
        output: What vectors are pulled back from.
        targets: Where the gradients are wanted.
        vectors: ``(K, *output.shape)``.
        retain_graph: Keep the graph for a later backward pass.
        fixed_statistics: Whether batch norms take their statistics for constants.

    Raises:
        RowsUnavailable: If the graph allows the loss's own backward pass only.
    """

    def backward(cotangent: Tensor, batched: bool, keep: bool) -> tuple[Tensor | None, ...]:
        try:
            with (
                without_hooks(one for one in targets if isinstance(one, Tensor)),
                own_backward(output, fixed_statistics=fixed_statistics) as root,
                torch.enable_grad(),
            ):
                # As a factor where it is alone: torch loads sympy to check the shape of a vector.
                return torch.autograd.grad(
                    [root if batched else (root * cotangent).sum()],
                    cast("Sequence[Tensor]", targets),
                    [cotangent if batched else None],
                    retain_graph=keep,
                    allow_unused=True,
                    is_grads_batched=batched,
                )
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            raise RowsUnavailable(
                "gradient checkpointing with use_reentrant=True lets no vectors through but the "
                "loss's own: use torch.utils.checkpoint with use_reentrant=False"
            ) from error

    if vectors.shape[0] == 1:
        single = backward(vectors[0], False, retain_graph)
        return [None if g is None else whole(g).unsqueeze(0) for g in single]
    try:
        return [None if g is None else whole(g) for g in backward(vectors, True, retain_graph)]
    except RuntimeError as error:
        said = str(error).lower()
        if not any(one in said for one in ("vmap", "batching rule", "have storage")):
            raise
    # Some backward functions cannot be batched: one vector at a time.
    last = vectors.shape[0] - 1
    each = [backward(v, False, retain_graph or i < last) for i, v in enumerate(vectors)]
    return [
        None if column[0] is None else whole(torch.stack(cast("list[Tensor]", list(column))))
        for column in zip(*each, strict=True)
    ]
