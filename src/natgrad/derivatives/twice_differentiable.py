"""Functions of torch whose derivatives have none, made of products and sums that have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class TwiceDifferentiable(TorchFunctionMode):
    """Has embeddings, bags of them and distances made of what can be differentiated twice.

    Values are the same but for rounding. Gradients of embeddings are dense, and neither they nor
    those of bags are scaled by the frequency of tokens.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call a function, or what stands for it."""
        return _COMPOSED.get(func, func)(*args, **(kwargs or {}))


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    return functional.embedding(input, weight, padding_idx, max_norm, norm_type)


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    if offsets is None:
        bags = len(input)
        owner = torch.arange(bags, device=input.device).repeat_interleave(input[0].numel())
    else:
        starts = offsets[:-1] if include_last_offset else offsets
        bags, places = len(starts), torch.arange(len(input), device=input.device)
        owner = torch.searchsorted(starts.contiguous(), places, right=True) - 1
    tokens = input.reshape(-1)
    rows = functional.embedding(tokens, weight, None, max_norm, norm_type)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.reshape(-1, 1)
    if padding_idx is not None:
        kept = tokens != padding_idx % len(weight)
        rows, owner = rows[kept], owner[kept]
    shape, index = (bags, weight.shape[1]), owner.unsqueeze(1).expand_as(rows)
    if mode == "max":
        found = rows.new_full(shape, -torch.inf).scatter_reduce(0, index, rows.detach(), "amax")
        # Of equal values the first counts.
        numbers = torch.arange(len(rows), device=rows.device).unsqueeze(1).expand_as(rows)
        largest = torch.where(rows.detach() == found[owner], numbers, len(rows))
        first = torch.full(shape, len(rows), device=rows.device)
        first = first.scatter_reduce(0, index, largest, "amin")
        padded = torch.cat([rows, rows.new_zeros(1, shape[1])])
        return padded.gather(0, first)
    total = rows.new_zeros(shape).index_add(0, owner, rows)
    if mode == "mean":
        total = total / torch.bincount(owner, minlength=bags).clamp(min=1).unsqueeze(1)
    return total


def _distances(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str | None = None) -> Tensor:
    return _norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p)


def _pairwise_distances(input: Tensor, p: float = 2.0) -> Tensor:
    first, second = torch.triu_indices(len(input), len(input), 1, device=input.device)
    return _norm(input[first] - input[second], p)


def _norm(difference: Tensor, p: float) -> Tensor:
    """Return norms along the last dimension, without a derivative where they are zero."""
    nothing = (difference == 0).all(-1, keepdim=True)
    norm = torch.linalg.vector_norm(torch.where(nothing, 1.0, difference), p, -1)
    return torch.where(nothing[..., 0], 0.0, norm)


_COMPOSED: dict[Any, Callable[..., Any]] = {
    functional.embedding: _embedding,
    functional.embedding_bag: _embedding_bag,
    functional.pdist: _pairwise_distances,
    torch.cdist: _distances,
    torch.pdist: _pairwise_distances,
}
