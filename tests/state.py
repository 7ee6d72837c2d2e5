"""What models and optimizers hold: as one vector, as tensors, and compared bit by bit."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
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


def check_resumes(
    fresh: Callable[[int], tuple[nn.Module, Any]],
    step: Callable[[nn.Module, Any, int], None],
    steps: int,
    saved: Iterable[int],
) -> tuple[nn.Module, Any]:
    """Check that runs go on bit by bit from what files hold.

    Args:
        fresh: From a seed to a model and its optimizer; those that resume have another seed.
        step: Takes the step of a number.
        steps: Steps of the whole run.
        saved: Steps after which its state is saved.

    Returns:
        The model and optimizer of the whole run.
    """
    model, optimizer = fresh(0)
    resumed: list[tuple[nn.Module, Any]] = []
    for number in range(steps):
        for one, its in [(model, optimizer), *resumed]:
            step(one, its, number)
            assert torch.equal(flat(one), flat(model))
            assert same(its.state_dict(), optimizer.state_dict())
        if number in saved:
            file = io.BytesIO()
            torch.save((model.state_dict(), optimizer.state_dict()), file)
            file.seek(0)
            weights, state = torch.load(file, weights_only=True)
            resumed.append(fresh(123))
            resumed[-1][0].load_state_dict(weights)
            resumed[-1][1].load_state_dict(state)
    return model, optimizer
