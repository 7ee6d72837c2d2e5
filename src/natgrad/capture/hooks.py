"""Hook objects that survive copying and pickling the model, and the state they look at."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["ModelHook", "inside_backward", "is_pulling_back", "outside_graphs", "pulling_back"]

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


# Process-wide, not per thread: on a GPU, autograd runs hooks on a thread of its own.
_pulling = 0


@contextmanager
def pulling_back() -> Iterator[None]:
    """Mark a backward pass as natgrad's own, so that no capture takes it for the user's."""
    global _pulling
    _pulling += 1
    try:
        yield
    finally:
        _pulling -= 1


def is_pulling_back(gradient: Tensor | None = None) -> bool:
    """Return whether a backward pass is not the user's training pass.

    It is not if natgrad itself pulls vectors back, or if ``gradient`` is batched by ``vmap``.
    """
    if _pulling:
        return True
    return gradient is not None and torch._C._functorch.is_batchedtensor(gradient)


def outside_graphs(function: _Function) -> _Function:
    """Keep a function out of graphs that ``torch.compile`` traces.

    Autograd edges exist in eager code only. The decorator of :mod:`torch.compiler` does the same
    but imports the compiler at once; here it is used only after something else imported it.
    """
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not disabled and "torch._dynamo" in sys.modules:
            # Buffers a compiled backward pass gives away cannot be used by a second one, and
            # natgrad's pull-back comes before the user's.
            torch._functorch.config.donated_buffer = False
            disabled.append(torch.compiler.disable(function))
        # Going through `disable` costs more than most hooks do, and only tracing needs it.
        if disabled and torch.compiler.is_dynamo_compiling():
            return disabled[0](*args, **kwargs)
        return function(*args, **kwargs)

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
