"""Gradients at the layers' outputs where several backward passes go through one forward pass."""

from __future__ import annotations

from torch import Tensor

from natgrad.capture import ForwardPass
from natgrad.capture.row_sources import Gradients


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
        self._looks = False

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
        self._looks = looks

    def complete(self) -> None:
        """Have the layers keep what counts, at the end of the last backward pass."""
        for place, call in enumerate(self.calls):
            past = self._past[place]
            added = past if self._looks else list(map(_added, past, call.user_gradients))
            call.user_gradients, self._past[place] = added, [None] * len(past)
        self._looks = False


def _added(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one + other
