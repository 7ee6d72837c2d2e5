"""Whether a model still has the parameters and modules it had."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["ModelWatch"]


class ModelWatch:
    """Sees parameters frozen, unfrozen or replaced, and modules exchanged, in microseconds.

    Args:
        model: The model; what it is now counts as known.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        tables: list[dict[str, Any]] = [m._parameters for m in modules]
        tables += [m._modules for m in modules if m._modules]
        self._tables = [(table, list(table.values())) for table in tables]
        self._flags = [(p, p.requires_grad) for p in model.parameters()]

    def sees_change(self) -> bool:
        """Return whether anything is not as it was."""
        for parameter, flag in self._flags:
            if parameter.requires_grad is not flag:
                return True
        for table, values in self._tables:
            if len(table) != len(values):
                return True
            for new, old in zip(table.values(), values, strict=True):
                if new is not old:
                    # ``torch.func.functional_call`` lends plain tensors for one pass.
                    return isinstance(new, nn.Parameter) or not isinstance(new, Tensor)
        return False
