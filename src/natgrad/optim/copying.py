"""Copies and pickles of objects that watch a model."""

from __future__ import annotations

import warnings
from typing import Any, cast


class CopiedByState:
    """Copies and pickles an object as the arguments it was made with and its state dict.

    A copy so watches the copy of its model and goes on exactly as the original does. Hooks cannot
    be copied. Model and optimizer belong in one copy: ``copy.deepcopy((model, optimizer))``.
    """

    _arguments: tuple[tuple[Any, ...], dict[str, Any]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Keep the arguments."""
        instance = super().__new__(cls)
        instance._arguments = args, kwargs
        return instance

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle by arguments and state."""
        return _rebuild, (type(self), *self._arguments, cast(Any, self).state_dict())


def _rebuild(
    kind: type[Any], args: tuple[Any, ...], kwargs: dict[str, Any], state: dict[str, Any]
) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The original has said it all.
        result = kind(*args, **kwargs)
        if hasattr(result, "regroup"):
            result.regroup(state["param_groups"])  # Groups may have been added.
    result.load_state_dict(state)
    return result
