"""Whether a model still has the parameters and modules it had."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from types import NoneType
from typing import Any

from torch import nn

__all__ = ["ModelWatch"]


class ModelWatch:
    """Sees parameters frozen, unfrozen or replaced, and modules exchanged, in microseconds.

    Args:
        model: The model; what it is now counts as known.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        tables: list[Any] = [m._parameters for m in modules]
        tables += [m._modules for m in modules if m._modules]
        # Compiled modules make other objects of what they hold at every look.
        self._tables = [table for table in tables if isinstance(table, dict)]
        self._parameters = list(model.parameters())
        self._flags = [p.requires_grad for p in self._parameters]
        self._entries = list(self._present())  # Held, so that no other object gets their identity.
        self._identities = list(map(id, self._entries))

    def _present(self) -> Iterator[Any]:
        return chain.from_iterable(map(dict.values, self._tables))

    def sees_change(self) -> bool:
        """Return whether anything is not as it was."""
        if [p.requires_grad for p in self._parameters] != self._flags:
            return True
        if list(map(id, self._present())) == self._identities:
            return False
        # ``torch.func.functional_call`` lends plain tensors for one pass.
        return all(isinstance(one, (nn.Parameter, nn.Module, NoneType)) for one in self._present())
