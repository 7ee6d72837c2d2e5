"""The calls of layers that a forward pass records, and the gradients at their outputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from natgrad.capture.blocks import Use
from natgrad.capture.kinds import LayerCall, LayerKind
from natgrad.capture.samples import SampleAxis

__all__ = ["Gradients", "PassCall", "Place", "RecordedCall", "belongs", "numbered"]

#: A layer, the part of it that was called, which call of the pass, and dimensions of the output.
Place = tuple[nn.Module, str, int, int]
#: One tensor per output of a call; None where nothing came.
Gradients = list[Tensor | None]


@dataclass(eq=False)
class RecordedCall:
    """A layer call, its outputs' shapes, and the places their gradients can be had from."""

    call: LayerCall
    kind: LayerKind
    shapes: list[torch.Size]
    edges: list[GradientEdge | None] = field(default_factory=list)
    user_gradients: Gradients = field(default_factory=list)


@dataclass(eq=False)
class PassCall:
    """A recorded call with the gradients of its outputs.

    Attributes:
        recorded: The call.
        place: What tells it from the other calls of a pass.
        axis: Where its samples lie; None if they are coupled.
        gradients: ``(K, *output.shape)`` of every output.
        apart: ``(N·K, *output.shape)``, every sample's vectors pulled back alone, where the block
            needs it; else ``gradients``.
    """

    recorded: RecordedCall
    place: Place
    axis: SampleAxis | None = SampleAxis()  # noqa: RUF009, frozen
    gradients: Gradients = field(default_factory=list)
    apart: Gradients = field(default_factory=list)

    @property
    def call(self) -> LayerCall:
        """What the layer was called with."""
        return self.recorded.call

    @property
    def kind(self) -> LayerKind:
        """The kind of the layer."""
        return self.recorded.kind

    @property
    def edges(self) -> list[GradientEdge]:
        """Where gradients at its outputs can be had."""
        return [edge for edge in self.recorded.edges if edge is not None]

    def spread(self, found: Sequence[Tensor | None]) -> Gradients:
        """Return gradients of the edges as gradients of the outputs."""
        remaining = iter(found)
        return [None if edge is None else next(remaining) for edge in self.recorded.edges]


def numbered(recorded: Sequence[RecordedCall]) -> list[PassCall]:
    """Tell the calls of a pass apart."""
    seen: Counter[tuple[nn.Module, str]] = Counter()
    calls = []
    for one in recorded:
        key = one.call.module, one.call.key
        calls.append(PassCall(one, (*key, seen[key], len(one.shapes[0]))))
        seen[key] += 1
    return calls


def belongs(call: LayerCall, use: Use) -> bool:
    """Return whether a call is one that a use of a parameter speaks of."""
    return call.module is use.module and call.key in use.keys
