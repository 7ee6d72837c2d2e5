"""What a backward pass is for: training, or a look at gradients."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from natgrad.capture.forward_pass import ForwardPass
from natgrad.capture.graph import leaves
from natgrad.capture.hooks import inside_backward

Purpose = Literal["train", "lent", "ask", "inputs"]


def purpose_of(model: nn.Module, recorded: ForwardPass) -> Purpose:
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
    return "inputs" if any(id(one) in own for one in leaves(recorded.source)) else "lent"


def purpose_for(parameter: Tensor) -> Literal["train", "ask"] | None:
    """Return what the present backward pass does with the gradient of a parameter, if anything."""
    try:
        kept = torch._C._will_engine_execute_node(get_gradient_edge(parameter).node)
    except RuntimeError:  # So torch says it of parameters that torch.autograd.grad was given.
        return "ask"
    return "train" if kept else None
