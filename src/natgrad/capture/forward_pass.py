"""What one forward pass of the model recorded, and where its gradients are seen."""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from natgrad.capture.graph import Purpose, purpose_of
from natgrad.capture.hooks import is_pulling_back, own_backward, present_pass
from natgrad.capture.model_output import losses, side_by_side
from natgrad.capture.row_sources import Gradients, RecordedCall
from natgrad.capture.rows import RowBuilder


@dataclass(eq=False)
class ForwardPass:
    """What one forward pass of the model recorded.

    Attributes:
        rows: What makes rows of it, and knows the layers as they were.
        model: The model.
        calls: Recorded layer calls in order.
        has_edges: Whether vectors can be pulled back to them.
        source: The model output the likelihood looks at.
        returned: An alias of it with the graph it had when the model returned it.
        version: How often it had been changed in place by then.
        batch_dim: The dimension of it that holds the samples.
        is_squeezed: Whether it is of one sample and has lost the dimension of samples.
        like_inputs: Whether it is the second one that has as many as the inputs, not the first.
        output: The same with samples in the first dimension.
        cotangent: Gradient of the user's loss with respect to it, once backpropagated.
        retained: Whether that came from a backward pass with ``create_graph=True``.
        task: The number of that backward pass.
        dropped: The gradient of earlier backward passes, whose ``.grad`` was reset since.
        target: The true target, where the user told it.
        elements: Total number of entries of all recorded layer outputs.
        heads: Key → shape, samples first, of the heads that are laid side by side in the output, if
            it has several.
        parts: Key → the heads themselves.
        losses: Losses that the model returned beside them.
        numbers: How often every part of a layer was called.
        looked: The number of the last backward pass, and what it was for.
        later: The number of a backward pass, and what it brings to the output through later passes.
    """

    rows: RowBuilder
    model: nn.Module
    calls: list[RecordedCall] = field(default_factory=list)
    has_edges: bool = True
    source: Tensor | None = None
    returned: Tensor | None = None
    version: int = 0
    batch_dim: int = 0
    is_squeezed: bool = False
    like_inputs: bool = False
    output: Tensor | None = None
    cotangent: Tensor | None = None
    retained: bool = False
    task: int | None = None
    dropped: Tensor | None = None
    target: Tensor | None = None
    elements: int = 0
    heads: dict[Any, torch.Size] | None = None
    parts: dict[Any, Tensor] = field(default_factory=dict)
    losses: list[Tensor] = field(default_factory=list)
    numbers: Counter[tuple[nn.Module, str]] = field(default_factory=Counter)
    looked: tuple[int, Purpose] = (-1, "lent")
    later: tuple[int, Tensor | None] = (-1, None)

    @property
    def samples(self) -> int:
        """Number of samples ``N``: the output's first dimension."""
        assert self.output is not None
        return int(self.output.shape[0])

    @property
    def purpose(self) -> Purpose:
        """What the present backward pass is for.

        Gradients at inputs, or in between, alone are those of saliency maps, and of implicit
        derivatives in a hook of the pass that trains. In shards, whose parameters are lent, nothing
        is known.
        """
        task = present_pass()
        if self.looked[0] != task and not self.rows.shards:
            unfinished = self.source is None  # The model itself differentiates, as for forces.
            self.looked = task, "inputs" if unfinished else purpose_of(self.model, self.source)
        return self.looked[1]

    def brought_by_later(self, gradient: Tensor) -> None:
        """Note what the present backward pass brings to the output through a later pass."""
        task, before = present_pass(), self.later
        total = gradient if before[0] != task or before[1] is None else before[1] + gradient
        self.later = task, total

    def without_later(self, cotangent: Tensor) -> Tensor:
        """Return what is left of the output's gradient without that, up to rounding."""
        task, later = self.later
        if later is None or task != present_pass():
            return cotangent
        own, rounding = cotangent - later, torch.finfo(cotangent.dtype).eps ** 0.75
        return torch.where(own.abs() <= rounding * later.abs().max(), 0.0, own)

    def join_dropped(self) -> None:
        """Let what was dropped stand where the present backward pass brings nothing.

        Whoever resets gradients between the losses of one forward pass keeps them elsewhere, as to
        project one on another, and trains by all of them.
        """
        if self.dropped is not None and self.cotangent is not None:
            self.cotangent = torch.where(self.cotangent != 0, self.cotangent, self.dropped)
        self.dropped = None

    def samples_first(self, tensor: Tensor) -> Tensor:
        """Return a tensor laid out like the model's output with samples in the first dimension."""
        dim = self.batch_dim
        if self.is_squeezed:
            assert self.source is not None
            return tensor.unsqueeze(0) if tensor.dim() <= self.source.dim() else tensor
        if self.heads is not None:
            return tensor if dim == 0 else self._heads_turned(tensor, _turned(self.heads, dim), dim)
        return tensor.movedim(dim, 0) if dim and tensor.dim() > dim else tensor

    def lay_samples(self, dim: int) -> None:
        """Note that samples lie in another dimension than the first, which outputs must have."""
        assert self.source is not None
        shapes = [self.source.shape] if self.heads is None else list(self.heads.values())
        lacking = [tuple(one) for one in shapes if len(one) <= dim]
        if lacking:
            raise ValueError(
                f"batch_dim={dim} is no dimension of an output of shape {lacking[0]}: give that of "
                "the samples, from 0 on"
            )
        self.batch_dim = dim
        if self.heads is not None and dim:
            self.heads = {
                key: torch.Size([one[dim], *one[:dim], *one[dim + 1 :]])
                for key, one in self.heads.items()
            }

    @torch.enable_grad()
    def turned(self) -> Tensor | None:
        """Return the output with its second dimension first, or None if no samples lie there."""
        assert self.output is not None
        if self.heads is None:
            later = self.output.dim() > 2 and self.output.shape[1] > 1
            return self.output.transpose(0, 1) if later else None
        shapes = list(self.heads.values())
        sizes = {one[1] if len(one) > 1 else 1 for one in shapes}
        if len(sizes) > 1 or 1 in sizes or max(map(len, shapes)) < 3:
            return None
        return self._heads_turned(self.output, self.heads, 1)

    def _heads_turned(self, joined: Tensor, heads: Mapping[Any, torch.Size], dim: int) -> Tensor:
        """Lay heads of given shapes side by side by another dimension of theirs."""
        pieces = joined.split([one[1:].numel() for one in heads.values()], 1)
        moved = [
            piece.reshape(shape).movedim(dim, 0)
            for piece, shape in zip(pieces, heads.values(), strict=True)
        ]
        return torch.cat([one.reshape(len(one), -1) for one in moved], 1)


class LayerGradients:
    """Adds up what backward passes bring to the outputs of layers, which keep the last one's.

    Args:
        recorded: The forward pass, as the first backward pass reaches its output.
    """

    def __init__(self, recorded: ForwardPass) -> None:
        self.calls = recorded.calls
        #: What has come before the output's own hook, as to a layer that makes the output.
        self._early: list[Gradients] = [list(one.user_gradients) for one in self.calls]
        self._past: list[Gradients] = [[None] * len(early) for early in self._early]
        self._looks = self._again = False

    def begin(self, *, looks: bool = False, afresh: bool = False) -> None:
        """Let a further backward pass reach the output.

        Args:
            looks: Whether it counts for nothing.
            afresh: Whether it counts alone.
        """
        for place, (call, early) in enumerate(zip(self.calls, self._early, strict=True)):
            now, before = call.user_gradients, self._past[place]
            late = before if self._looks else list(map(_added, before, now))
            past = [b if a is None else a for a, b in zip(early, late, strict=True)]
            fresh = [None if a is None else b for a, b in zip(early, now, strict=True)]
            if afresh:
                past, self._early[place] = [None] * len(now), list(fresh)
            elif not looks:
                self._early[place] = list(map(_added, early, fresh))
            self._past[place], call.user_gradients = past, fresh
        self._looks, self._again = looks, True

    def complete(self) -> None:
        """Have the layers keep what counts, at the end of the last backward pass."""
        for place, call in enumerate(self.calls if self._again else ()):
            past = self._past[place]
            added = past if self._looks else list(map(_added, past, call.user_gradients))
            call.user_gradients, self._past[place] = added, [None] * len(past)
        self._looks = False


def _added(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one + other


def _turned(heads: Mapping[Any, torch.Size], dim: int) -> dict[Any, torch.Size]:
    """Return shapes with their first dimension back where it was."""
    return {
        key: torch.Size([*one[1 : dim + 1], one[0], *one[dim + 1 :]]) for key, one in heads.items()
    }


def user_hook(
    current: ForwardPass, recorded: RecordedCall, index: int
) -> Callable[[Tensor | None], None]:
    """Return what keeps the gradient that the user's backward pass brings to an output."""
    # Edges hold the hook: rows would wait for the collector.
    waiting, of = weakref.ref(recorded), weakref.ref(current)

    def keep(gradient: Tensor | None) -> None:
        if gradient is None:  # Of an output that the loss does not use, where nodes have several.
            return
        found, whole = waiting(), of()
        if found is None or whole is None or is_pulling_back(gradient):
            return
        if whole.purpose != "inputs":
            found.user_gradients[index] = gradient.detach().reshape(found.shapes[index])

    return keep


def call_with_gradient(place: Tensor | GradientEdge, keep: Callable[[Tensor], None]) -> None:
    """Have a function called with the gradient of a tensor, or at the first output of a node."""
    if isinstance(place, Tensor):
        place.register_hook(keep)
        return

    def before(gradients: tuple[Tensor | None, ...]) -> None:
        if gradients[0] is not None:
            keep(gradients[0])

    cast(Any, place.node).register_prehook(before)


def unviewed(output: Tensor, inputs: Sequence[Any]) -> Tensor:
    """Return what an output is another shape of, as that of a linear layer on tokens is.

    An operation in place that follows cuts the node of such a view out of the graph. What was there
    before the layer's call, as its inputs, is left alone.
    """
    base = output._base
    if base is None or type(base) is not Tensor or base.grad_fn is None:
        return output
    if torch._C._functorch.is_functorch_wrapped_tensor(base) or base.dtype != output.dtype:
        return output
    if not (base.is_contiguous() and output.is_contiguous() and base.numel() == output.numel()):
        return output
    given = (one.data_ptr() for one in inputs if type(one) is Tensor)
    return output if base.data_ptr() in given else base


def before_cast(output: Tensor) -> GradientEdge | None:
    """Return where an output was before it was cast to another type; None if it was not.

    Mixed precision may cast what a model returns, whose own loss is of what was cast.
    """
    node = output.grad_fn
    if node is None or node.name() != "ToCopyBackward0":
        return None
    source, number = node.next_functions[0]
    return GradientEdge(cast(Any, source), number) if source is not None and number == 0 else None


def leads_to(output: Tensor, returned: Tensor | None) -> bool:
    """Return whether vectors can be pulled back through what was done to an output in place."""
    assert returned is not None and returned.grad_fn is not None
    node, number = returned.grad_fn.next_functions[0]
    edge = cast(Tensor, GradientEdge(cast(Any, node), number))
    try:
        with own_backward(output) as root:
            torch.autograd.grad(
                [root], [edge], [torch.zeros_like(root)], retain_graph=True, allow_unused=True
            )
    except RuntimeError:  # The user's own backward pass has let go of what it needs.
        return False
    return True


def watch_losses(
    current: ForwardPass,
    output: Any,
    heads: dict[Any, Tensor],
    reached: Callable[[Tensor], None],
) -> None:
    """See losses that a model computes itself, of the heads before they were laid side by side."""
    current.losses, current.parts = losses(output), heads
    waiting = weakref.ref(current)

    def begins(number: int, gradient: Tensor) -> None:
        recorded = waiting()
        if recorded is None or is_pulling_back(gradient):
            return
        parts = recorded.parts
        with own_backward(recorded.losses[number]) as root:
            found = torch.autograd.grad(
                [root], list(parts.values()), [gradient], retain_graph=True, allow_unused=True
            )
        if any(one is not None for one in found):
            pairs = zip(parts.items(), found, strict=True)
            known = {k: torch.zeros_like(z) if g is None else g for (k, z), g in pairs}
            reached(side_by_side(known))

    for number, loss in enumerate(current.losses):
        loss.register_hook(functools.partial(begins, number))
