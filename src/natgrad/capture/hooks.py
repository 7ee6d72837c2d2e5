"""Hook objects that survive copying and pickling the model, and the state they look at."""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

_Function = TypeVar("_Function", bound=Callable[..., Any])


def remove_hooks(handles: list[Any]) -> None:
    """Take hooks away, once: none of the handles are left."""
    for handle in handles:
        handle.remove()
    handles.clear()


def leave_with(owner: object, handles: list[Any]) -> None:
    """Take hooks out of a model when whom they belong to, held weakly by them, is gone."""
    weakref.finalize(owner, remove_hooks, handles).atexit = False


def inside_backward() -> bool:
    """Return whether autograd is running a backward pass on this thread.

    Forward hooks that fire then belong to a recomputation by gradient checkpointing and must not
    be recorded again.
    """
    return present_pass() != -1


def inside_transform() -> bool:
    """Return whether :mod:`torch.func` or an export runs, whose tensors have no memory."""
    return torch._C._functorch.maybe_current_level() is not None or torch.compiler.is_compiling()


def present_pass() -> int:
    """Return the number of the backward pass that runs on this thread, -1 for none."""
    return int(torch._C._current_graph_task_id())


# Identifiers of natgrad's own backward passes → whether batch norms hold their statistics fixed in
# it. Autograd runs hooks on threads of its own on a GPU, so that only the pass tells what a hook
# belongs to, not the thread.
_own_passes: dict[int, bool] = {}


@contextmanager
def own_backward(output: Tensor, *, fixed_statistics: bool = True) -> Iterator[Tensor]:
    """Mark the backward passes that start from a view of ``output`` as natgrad's own.

    Hooks that the user or another capture has put on the output see the mark, too.

    Args:
        output: The output.
        fixed_statistics: Whether the statistics of batch norms are constants, as in all rows;
            otherwise they are differentiated, as in training.

    Yields:
        The view to start from.
    """
    with torch.enable_grad():
        root = output.view_as(output)
    started: set[int] = set()

    def mark(gradient: Tensor) -> None:
        task = present_pass()
        started.add(task)
        _own_passes[task] = fixed_statistics

    handle = root.register_hook(mark)
    try:
        yield root
    finally:
        handle.remove()
        for task in started:
            _own_passes.pop(task, None)


@contextmanager
def without_hooks(targets: Iterable[Any]) -> Iterator[None]:
    """Switch off hooks that users have put on the gradients of parameters among some targets."""
    found = [one._backward_hooks for one in targets if isinstance(one, Tensor)]
    tables = [table for table in found if table]
    kept = [dict(table) for table in tables]
    for table in tables:
        table.clear()
    try:
        yield
    finally:
        for table, hooks in zip(tables, kept, strict=True):
            table.update(hooks)


def is_pulling_back(gradient: Tensor | None = None) -> bool:
    """Return whether the present backward pass is not the user's training pass.

    It is not if natgrad itself pulls vectors back, or if ``gradient`` is batched by ``vmap``.
    """
    if _own_passes and present_pass() in _own_passes:
        return True
    return gradient is not None and torch._C._functorch.is_batchedtensor(gradient)


def holds_statistics() -> bool:
    """Return whether batch norms hold their statistics fixed in the present backward pass."""
    return bool(_own_passes) and _own_passes.get(present_pass(), False)


_calls_from_graphs = threading.local()


def called_from_graph() -> bool:
    """Return whether a hook is called by code that ``torch.compile`` has traced."""
    return getattr(_calls_from_graphs, "open", 0) > 0


def _called_from_graph(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    _calls_from_graphs.open = getattr(_calls_from_graphs, "open", 0) + 1
    try:
        return function(*args, **kwargs)
    finally:
        _calls_from_graphs.open -= 1


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
            # It would make a version of each hook for every shape, and beyond some give up and
            # compile what the hook calls.
            ModelHook.__call__ = torch.compiler.disable(_call)  # type: ignore[method-assign]
            marked = functools.partial(_called_from_graph, function)
            disabled.append(torch.compiler.disable(marked))
        # Going through `disable` costs more than most hooks do, and only tracing needs it.
        if disabled and torch.compiler.is_dynamo_compiling():
            return disabled[0](*args, **kwargs)
        return function(*args, **kwargs)

    # The compiler makes a few versions at most of what has one code, as all these calls would.
    call.__code__ = call.__code__.replace(co_name=function.__name__)  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]


def forget_compiled(model: nn.Module) -> None:
    """Have what ``torch.compile`` made of a model made again, with the hooks that it has now.

    Compiled code is kept by what it was compiled from, without a look at hooks. As that belongs to
    all models of a kind, code of another one counts, too; that of a function that calls the model
    is not known to belong to it.
    """
    if "torch._dynamo" not in sys.modules:
        return
    from torch._dynamo.convert_frame import input_codes
    from torch._dynamo.external_utils import wrap_inline

    calls: list[Any] = [nn.Module._wrapped_call_impl, nn.Module._call_impl]
    calls.append(wrap_inline(_inert))  # All that is compiled from outside has its code.
    # Programs of torch.jit have none.
    calls += [getattr(type(module), "forward", None) for module in model.modules()]
    codes = [getattr(call, "__code__", None) for call in calls]
    if any(code is not None and code in input_codes for code in codes):
        torch.compiler.reset()


def _inert(*_: Any, **__: Any) -> None:
    """Stand in for a hook in a copied or unpickled model."""


def _inert_hook() -> Callable[..., None]:
    return _inert


def _call(hook: ModelHook, *args: Any) -> Any:
    """Call the method of a hook unless its owner is gone."""
    owner = hook.owner()
    return None if owner is None else hook.method(owner, *args)


class ModelHook:
    """A hook bound weakly to its owner; a copy or pickle of it does nothing.

    Args:
        owner: The object the hook belongs to.
        method: A function ``method(owner, *hook_arguments)``.
    """

    def __init__(self, owner: object, method: Callable[..., Any]) -> None:
        self.owner: weakref.ReferenceType[object] = weakref.ref(owner)
        self.method = method

    __call__ = _call

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle as a function that does nothing."""
        return _inert_hook, ()


class FirstHook(ModelHook):
    """The hook that comes first in a pass, to which :func:`called_from_graph` is known."""

    __call__ = _call
