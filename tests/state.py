"""What models and optimizers hold: as one vector, as tensors, and compared bit by bit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def flat(held: nn.Module | Iterable[Tensor]) -> Tensor:
    """Return the parameters of a model, or tensors, as one new vector."""
    tensors = held.parameters() if isinstance(held, nn.Module) else held
    return torch.cat([t.detach().flatten() for t in tensors])


def tensors(value: Any) -> Iterable[Tensor]:
    """Yield every tensor of nested state."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)


def same(left: Any, right: Any) -> bool:
    """Compare nested state, bit by bit."""
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)
