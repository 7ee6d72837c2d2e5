"""Hook objects that survive copying and pickling the model, and the state they look at."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch

__all__ = ["ModelHook", "inside_backward", "outside_graphs"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def inside_backward() -> bool:
    """Return whether autograd is running a backward pass on this thread.

    Forward hooks that fire then belong to a recomputation by gradient checkpointing and must not
    be recorded again.
    """
    query = getattr(torch._C, "_current_graph_task_id", None)
    if query is not None:
        return bool(query() != -1)
    return False


def outside_graphs(function: _Function) -> _Function:
    """Keep a function out of graphs that ``torch.compile`` traces.

    Autograd edges exist in eager code only. The decorator of :mod:`torch.compiler` does the same
    but imports the compiler at once; here it is used only after something else imported it.
    """
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args, **kwargs)

    return call  # type: ignore[return-value]


def _inert(*_: Any, **__: Any) -> None:
    """Stand in for a hook in a copied or unpickled model."""


def _inert_hook() -> Callable[..., None]:
    return _inert


class ModelHook:
    """A hook bound weakly to its owner; a copy or pickle of it does nothing.

    Args:
        owner: The object the hook belongs to.
        method: A function ``method(owner, *hook_arguments)``.
    """

    def __init__(self, owner: object, method: Callable[..., Any]) -> None:
        self.owner = weakref.ref(owner)
        self.method = method

    def __call__(self, *args: Any) -> Any:
        """Call the method unless the owner is gone."""
        owner = self.owner()
        return None if owner is None else self.method(owner, *args)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle as a function that does nothing."""
        return _inert_hook, ()
