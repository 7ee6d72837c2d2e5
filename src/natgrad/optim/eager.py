"""Optimizers of torch that leave torch's compiler alone.

Constructing an optimizer of torch, zeroing gradients, saving its state or taking a step imports
:mod:`torch._dynamo`: 75 MiB and some two seconds, of use only where ``torch.compile`` traces the
training step. Here the same methods run as they are, and outside graphs where there are any.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from natgrad.capture.hooks import outside_graphs

_Method = TypeVar("_Method", bound=Callable[..., Any])


def _eager(method: _Method) -> _Method:
    own: _Method = inspect.unwrap(method)
    return outside_graphs(own)


class EagerOptimizer(torch.optim.Optimizer):
    """The base class of torch's optimizers."""

    if not TYPE_CHECKING:  # Their types are those of torch.
        add_param_group = _eager(torch.optim.Optimizer.add_param_group)
        load_state_dict = _eager(torch.optim.Optimizer.load_state_dict)
        state_dict = _eager(torch.optim.Optimizer.state_dict)
        zero_grad = _eager(torch.optim.Optimizer.zero_grad)


class EagerAdamW(EagerOptimizer, torch.optim.AdamW):
    """AdamW."""


class EagerSGD(EagerOptimizer, torch.optim.SGD):
    """Gradient descent with momentum."""


def plain_step(optimizer: torch.optim.Optimizer) -> None:
    """Take a step of an optimizer without its hooks; gradients must be off."""
    inspect.unwrap(type(optimizer).step)(optimizer)
