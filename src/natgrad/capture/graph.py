"""What the graph of a pass is made of: which ones are alike, and where they end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def graph_hash(output: Tensor) -> int:
    """Return a number that graphs of unlike operations, or unlike ways between them, differ in.

    What the operations are given, sizes and places among them, makes no difference.
    """
    nodes = list(_nodes(output))
    numbers = {node: number for number, node in enumerate(nodes)}
    return hash(
        tuple(
            (type(node), *(numbers.get(following) for following, _ in node.next_functions))
            for node in nodes
        )
    )


def leaves(output: Tensor | None) -> Iterator[Tensor]:
    """Yield the tensors that an output's graph accumulates gradients in."""
    return (node.variable for node in _nodes(output) if hasattr(node, "variable"))


def own_functions(output: Tensor) -> list[str]:
    """Return the names of the functions in an output's graph whose derivatives users wrote."""
    own = torch.autograd.function.BackwardCFunction
    return sorted({type(node).__name__ for node in _nodes(output) if isinstance(node, own)})


def _nodes(output: Tensor | None) -> Iterator[Any]:
    waiting: list[Any] = [] if output is None or output.grad_fn is None else [output.grad_fn]
    met = set(waiting)
    while waiting:
        node = waiting.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in met:
                met.add(following)
                waiting.append(following)
