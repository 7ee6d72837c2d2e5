"""What the graph of a pass is made of, and what a backward pass through it is for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from natgrad.capture.hooks import inside_backward

Purpose = Literal["train", "lent", "ask", "inputs"]


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


def purpose_of(model: nn.Module, output: Tensor | None) -> Purpose:
    """Return what the present backward pass through a model's output is for.

    It leaves gradients of parameters in ``.grad`` ("train"), or is asked for them by
    ``torch.autograd.grad`` ("ask"), or for those at inputs alone ("inputs"), as for adversarial
    examples and saliency maps in the middle of a step. Where parameters are lent for one pass none
    of the model's own is in the graph ("lent"), and it counts as training.
    """
    if not inside_backward():
        return "lent"
    for parameter in model.parameters():
        purpose = purpose_for(parameter) if parameter.requires_grad else None
        if purpose is not None:
            return purpose
    own = {id(parameter) for parameter in model.parameters()}
    return "inputs" if any(id(one) in own for one in leaves(output)) else "lent"


def purpose_for(parameter: Tensor) -> Literal["train", "ask"] | None:
    """Return what the present backward pass does with the gradient of a parameter, if anything."""
    try:
        kept = torch._C._will_engine_execute_node(get_gradient_edge(parameter).node)
    except RuntimeError:  # So torch says it of parameters that torch.autograd.grad was given.
        return "ask"
    return "train" if kept else None
