"""Which module is the model, and which of its outputs the likelihood looks at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import Tensor, nn

__all__ = ["require_output", "select_output", "unwrap"]


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel, DataParallel or ``torch.compile``."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(
            model, (nn.parallel.DistributedDataParallel, nn.DataParallel)
        ):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def select_output(output: Any, select: Callable[[Any], Tensor] | None) -> Tensor | None:
    """Pick the tensor the likelihood looks at out of a model's output.

    Raises:
        TypeError: If ``select`` returns something else than a tensor.
    """
    if select is not None:
        chosen = select(output)
        if not isinstance(chosen, Tensor):
            raise TypeError(f"output=... must return a tensor, got {type(chosen).__name__}")
        return chosen
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    if isinstance(output, Mapping):
        if isinstance(output.get("logits"), Tensor):
            return cast(Tensor, output["logits"])
        output = tuple(output.values())
    if isinstance(output, (tuple, list)):
        return next((item for item in output if isinstance(item, Tensor)), None)
    return None


def require_output(output: Any, select: Callable[[Any], Tensor] | None) -> Tensor:
    """Pick the tensor the likelihood looks at out of a model's output, which must hold one.

    Raises:
        ValueError: If it holds none.
    """
    chosen = select_output(output, select)
    if chosen is None:
        raise ValueError(
            "no tensor was found in the model's output; pass output=lambda out: ... to pick it"
        )
    return chosen
