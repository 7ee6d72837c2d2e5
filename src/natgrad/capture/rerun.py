"""A module run once more, with other parameters, leaving no trace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from natgrad.distributed.shards import whole


def rerun(
    module: nn.Module,
    parameters: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    recorded: bool = False,
) -> Any:
    """Return the output of a module with other parameters, on copies of its buffers.

    Its hooks are not called, and gradients are recorded only if ``recorded``.
    """
    state = {name: buffer.clone() for name, buffer in module.named_buffers()} | dict(parameters)
    named = {f"module.{name}": value for name, value in state.items()}
    with torch.set_grad_enabled(recorded):
        return functional_call(_WithoutHooks(module), named, args, dict(kwargs or {}))


def whole_values(module: nn.Module) -> dict[str, Tensor]:
    """Return the values of a module's parameters, whole where they are in shards."""
    return {name: whole(p.detach()) for name, p in module.named_parameters()}


class _WithoutHooks(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.forward(*args, **kwargs)
