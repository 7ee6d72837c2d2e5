"""Parameters that keep their plain gradients, as what was seen of passes does not explain these."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from natgrad.capture import Capture
from natgrad.distributed.replicas import Replicas
from natgrad.optim.audit import Findings


class Trust:
    """Which parameters are left alone from some step on, and why.

    Args:
        capture: The hooks on the model, which tell what a user should know.

    Attributes:
        untrusted: Parameter name → why its rows do not explain its gradient.
    """

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self.untrusted: dict[str, str] = {}
        self._named: set[str] = set()  # Parameters with some gradient from elsewhere, once told.

    @property
    def lost(self) -> dict[str, str]:
        """Those that had rows until now."""
        return {n: why for n, why in self.untrusted.items() if n not in self.capture.excluded}

    def without_rows(self, reasons: Mapping[str, str], covered: Collection[str]) -> None:
        """Leave the parameters of blocks that have no rows.

        Args:
            reasons: Block name → why it has none.
            covered: Names of the parameters that are preconditioned so far.

        Raises:
            ValueError: If no parameter would be left.
        """
        by_reason: dict[str, list[str]] = {}
        for name, reason in reasons.items():
            by_reason.setdefault(reason, []).extend(self.capture.blocks[name].layout.names)
        for reason, names in by_reason.items():
            self._leave(names, reason, covered)

    def without_explanation(self, found: Findings, covered: Collection[str]) -> None:
        """Say which gradients come from elsewhere for a part, and leave those that mostly do.

        Args:
            found: What an audit found.
            covered: Names of the parameters that are preconditioned so far.
        """
        mixed = [name for name in found.mixed if name not in self._named]
        self._named.update(mixed)
        if mixed:
            self.capture.tell(
                f"a part of the gradients of {_listed(mixed)} does not come through the "
                "output that the likelihood looks at (a second head, another term of the loss), so "
                "their curvature lacks that part"
            )
        if found.foreign and not set(covered) - set(found.foreign):
            self.capture.tell(
                "no gradient comes through the output that the likelihood looks at for the larger "
                "part, so curvature is not that of this loss: pass output=lambda out: ... if it is "
                "another output; natgrad.ResidualNGD is there for losses of derivatives of the "
                "network"
            )
        elif found.foreign:
            self._leave(
                found.foreign,
                "its gradient does not come through the output that the likelihood looks at (but "
                "of a second head, which likelihood={...} takes, another term of the loss, "
                "derivatives of the network, or the inside of a checkpoint with "
                "use_reentrant=True, which use_reentrant=False lets through)",
                covered,
            )

    def _leave(self, names: Collection[str], reason: str, covered: Collection[str]) -> None:
        if not set(covered) - set(names):
            raise ValueError(f"no parameter can be preconditioned: {reason}")
        for name in names:
            self.untrusted.setdefault(name, reason)

    def unite(self, replicas: Replicas, device: torch.device) -> None:
        """Leave what any process does, in the same order everywhere."""
        each = replicas.gathered(self.untrusted, device)
        self.untrusted = dict(sorted(pair for one in each for pair in one.items()))


def _listed(names: Collection[str]) -> str:
    """Return names for a message, the first few of many."""
    shown = ", ".join(repr(name) for name in list(names)[:6])
    return shown if len(names) <= 6 else f"{shown} and {len(names) - 6} more"
