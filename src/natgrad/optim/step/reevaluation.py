"""Evaluating a step's closure again, as it was evaluated first."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.capture.evaluation import undisturbed


def as_float(loss: Any) -> float:
    """Return a loss, a number or a tensor with or without its graph, as a number."""
    return float(loss.detach() if isinstance(loss, Tensor) else loss)


def evaluated(
    closure: Callable[[], Any], parameters: Iterable[Tensor], needs_loss: bool = False
) -> tuple[Any, bool]:
    """Return a closure's loss, backpropagated, and whether the closure itself did that.

    It may leave ``backward`` to the optimizer by returning the loss with its graph; it is taken to
    do so where no parameter has a gradient afterwards. Where a loss is needed and none is returned,
    that is a ValueError.
    """
    with torch.enable_grad():
        loss = closure()
        graph = isinstance(loss, Tensor) and loss.requires_grad
        has_gradients = any(p.grad is not None for p in parameters)
        if needs_loss and has_gradients and loss is None:
            raise ValueError(
                "the closure must return the loss, as it is compared with that after the step"
            )
        if not graph or has_gradients:
            return loss, True
        loss.backward()
    return loss.detach(), False


class RandomState:
    """The random state of this moment, on the host and where some parameters are."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        devices = {p.device.index or 0 for p in parameters if p.device.type == "cuda"}
        self._random = torch.get_rng_state()
        self._device_random = [(d, torch.cuda.get_rng_state(d)) for d in sorted(devices)]

    def restore(self) -> None:
        """Have the same numbers drawn again."""
        torch.set_rng_state(self._random)
        for device, state in self._device_random:
            torch.cuda.set_rng_state(state, device)


class Reevaluation:
    """Evaluates a closure once more as it was evaluated first, leaving no trace.

    A further evaluation draws the same random numbers (dropout masks); gradients, buffers and the
    random state are afterwards as they were before it.

    Args:
        model: The model the closure evaluates. The random state of this moment is kept.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._random = RandomState(model.parameters())

    def __call__(self, closure: Callable[[], Any], backpropagates: bool = True) -> float:
        """Return the closure's loss at the present parameters.

        Args:
            closure: Evaluates the model and returns the loss.
            backpropagates: Whether it may call ``backward``, which can write into the memory of
                the present gradients (data-parallel buckets), so that they are copied.
        """
        parameters = list(self.model.parameters())
        kept = [(p, p.grad) for p in parameters if p.grad is not None]
        values = [gradient.clone() for _, gradient in kept] if backpropagates else []
        for parameter in parameters:
            parameter.grad = None
        try:
            with undisturbed(self.model), torch.enable_grad():
                self._random.restore()
                return as_float(closure())
        finally:
            for parameter in parameters:
                parameter.grad = None
            for parameter, gradient in kept:
                parameter.grad = gradient
            with torch.no_grad():
                for (_, gradient), value in zip(kept, values, strict=False):
                    gradient.copy_(value)
