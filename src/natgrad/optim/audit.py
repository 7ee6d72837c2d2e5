"""Whether gradients come through the output that the likelihood looks at, and what follows."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from natgrad.capture import Capture, ForwardPass
from natgrad.capture.graph import purpose_for
from natgrad.capture.hooks import is_pulling_back
from natgrad.capture.rows import batched_gradients
from natgrad.distributed.replicas import Replicas

#: Relative difference of two gradients of one graph that counts as rounding. That of half precision
#: counts where gradients at a layer's outputs are of it: autocast rounds the sums they make, too.
ROUNDING = {torch.float64: 1e-8, torch.float32: 1e-3}
HALF_ROUNDING = 3e-2
HALF = {torch.float16, torch.bfloat16}

#: A gradient so much smaller than the largest one is nothing but rounding.
NOTHING = {torch.float64: 1e-12, torch.float32: 1e-5}
HALF_NOTHING = 1e-3

#: A gradient at less than this cosine to the explained part is another one.
LEAST_COSINE = 0.7


@dataclass(frozen=True)
class Findings:
    """What an audit found; both name parameters.

    Attributes:
        foreign: Those whose gradient comes through the output for the lesser part, or not at all.
        mixed: Those that have some gradient from elsewhere.
    """

    foreign: list[str] = field(default_factory=list)
    mixed: list[str] = field(default_factory=list)


class GradientAudit:
    r"""Compares gradients with :math:`J^\top u`, u what the user's loss sends to the output.

    A second head, another term of the loss or a second use of the network make the difference, and
    what is put into ``.grad`` by hand where no pass has come. Multiples of the parameter (an L2
    penalty) and of the gradient itself (a hook that scales it) do not count.

    Args:
        capture: The hooks on the model.
    """

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self._handles: list[Any] = []
        #: What reaches ``.grad``, and what is only asked for by ``torch.autograd.grad``.
        self._found: dict[bool, dict[str, Tensor]] = {False: {}, True: {}}
        self._explained: dict[bool, dict[str, Tensor]] = {False: {}, True: {}}
        #: Sums of the sizes of its parts, pass by pass, which may cancel.
        self._sizes: dict[bool, dict[str, Tensor]] = {False: {}, True: {}}
        self._asked = False
        self._halved: set[str] = set()  # Parameters of gradients summed in half precision.
        self._reached: set[str] = set()  # Those that some pass has ever explained a gradient of.
        #: Whether gradients are being collected.
        self.active = False

    def begin(self) -> None:
        """Collect the gradients that reach the captured parameters from now on."""
        self.drop()
        for name, parameter in self._captured().items():
            handle = parameter.register_hook(self._collect(name, parameter))
            # Before hooks of the user, which may change the gradient.
            cast(Any, parameter._backward_hooks).move_to_end(handle.id, last=False)
            self._handles.append(handle)
        self.active = True

    def _captured(self) -> dict[str, nn.Parameter]:
        """Return the trainable parameters that vectors can be pulled back to."""
        blocks, unavailable = self.capture.blocks, self.capture.sources.unavailable
        names = {n for b in blocks if b not in unavailable for n in blocks[b].layout.names}
        parameters = self.capture.model.named_parameters()
        return {n: p for n, p in parameters if n in names and p.requires_grad}

    def _collect(self, name: str, parameter: Tensor) -> Any:
        def add(gradient: Tensor) -> None:
            if not is_pulling_back(gradient):
                gradient = gradient.detach().to_dense()
                found = self._found[purpose_for(parameter) == "ask"]
                present = found.get(name)
                found[name] = gradient.clone() if present is None else present + gradient

        return add

    def explain(self, recorded: ForwardPass, asked: bool = False) -> None:
        """Note what the gradient at a pass's output explains, at the start of its backward pass."""
        if recorded.output is None or recorded.cotangent is None:
            return
        held = self._captured()
        self._note_precision(recorded)
        # As in the user's own pass, statistics of batch norms are differentiated.
        vectors, targets = recorded.cotangent.unsqueeze(0), list(held.values())
        parts = batched_gradients(recorded.output, targets, vectors, True, fixed_statistics=False)
        self._asked = True
        for name, part in zip(held, parts, strict=True):
            if part is not None:
                part = part[0].detach().to_dense()
                self._reached.add(name)
                known, sizes = self._explained[asked], self._sizes[asked]
                known[name] = known.get(name, torch.zeros_like(part)) + part
                size = torch.linalg.vector_norm(part, dtype=_at_least_float32(part))
                sizes[name] = sizes.get(name, torch.zeros_like(size)) + size

    def _note_precision(self, recorded: ForwardPass) -> None:
        sources = self.capture.sources
        own = sources.by_block(recorded.calls)
        for name, block in self.capture.blocks.items():
            # Away from calls of layers anything may have been multiplied.
            calls = own[name] if name in own and name not in sources.direct else recorded.calls
            if any(dtype in HALF for one in calls for dtype in one.dtypes):
                self._halved.update(block.layout.names)

    def drop(self) -> None:
        """Stop collecting, and forget what was collected."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._found, self._explained = {False: {}, True: {}}, {False: {}, True: {}}
        self._sizes = {False: {}, True: {}}
        self.active = self._asked = False
        self._halved = set()

    def end(self, alone: bool) -> Findings:
        """Stop collecting, and return what was found; nothing if no pass was explained.

        Not ``alone``, gradients of other processes, which may use other layers, are in ``.grad``,
        too.
        """
        looks = not self._found[False]
        found, explained, asked = self._found[looks], self._explained[looks], self._asked
        sizes, halved = self._sizes[looks], self._halved
        if alone and not looks:
            found = {**self._given(), **found}
        self.drop()
        parameters = dict(self.capture.model.named_parameters())
        names = list(found) if asked else []
        if not names:
            return Findings()
        shares = [
            _shares(found[n], explained.get(n), sizes.get(n), parameters[n].detach()) for n in names
        ]
        shares = [one.to(shares[0].device) for one in shares]
        findings = Findings()
        # One wait for all.
        told = dict(zip(names, torch.stack(shares).tolist(), strict=True))
        largest = max(size for size, *_ in told.values())
        for name, (size, cosine, *rests) in told.items():
            dtype = torch.bfloat16 if name in halved else parameters[name].dtype
            tolerance = ROUNDING.get(dtype, HALF_ROUNDING)
            # Before a norm, say, gradients may be zero but for rounding.
            if size <= NOTHING.get(dtype, HALF_NOTHING) * largest:
                continue
            if parameters[name].numel() == 1:  # Any number is a multiple of any other.
                rests = [1.0 - abs(cosine)]
            if min(rests) > tolerance:  # Neither, where a gradient is not finite.
                (findings.foreign if cosine < LEAST_COSINE else findings.mixed).append(name)
        return findings

    def _given(self) -> dict[str, Tensor]:
        """Return what ``.grad`` holds of parameters that no pass has ever reached."""
        unreached = {n: p.grad for n, p in self._captured().items() if n not in self._reached}
        return {n: g.detach().to_dense() for n, g in unreached.items() if g is not None}

    def forgive(self, names: Set[str]) -> None:
        """Leave out parameters whose backward pass makes another gradient on purpose."""
        self._reached.update(names)
        for name in names:
            for found in self._found.values():
                found.pop(name, None)


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _shares(
    gradient: Tensor, explained: Tensor | None, terms: Tensor | None, parameter: Tensor
) -> Tensor:
    """Return what tells whether a gradient is explained, ``(5,)`` in float64.

    Its size, its cosine with the explained part, and the share of it that is left without that
    part, without any multiples of it, and without multiples of the parameter, too. Shares are of
    the gradient and of the terms of the explained part, whose sizes are summed in ``terms``.
    """
    dtype = _at_least_float32(gradient)
    gradient, tiny = gradient.to(dtype), torch.finfo(dtype).tiny
    known = torch.zeros_like(gradient) if explained is None else explained.to(dtype)
    size, length = gradient.norm(), known.norm()
    cosine = (gradient * known).sum() / size.clamp(min=tiny) / length.clamp(min=tiny)
    rest = gradient - known
    lengths = [rest.norm()]
    unit = known / length.clamp(min=tiny)
    own = parameter.to(dtype)
    own = own - (unit * own).sum() * unit
    for direction in (unit, own / own.norm().clamp(min=tiny)):
        rest = rest - (direction * rest).sum() * direction
        lengths.append(rest.norm())
    scale = (size + (length if terms is None else terms.to(dtype))).clamp(min=tiny)
    return torch.stack([size, cosine, *(one / scale for one in lengths)]).double()


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

    def without_rows(self, reasons: Mapping[str, str], covered: Collection[str]) -> None:
        """Leave parameters of blocks without rows, for a reason; a ValueError if none is left."""
        by_reason: dict[str, list[str]] = {}
        for name, reason in reasons.items():
            by_reason.setdefault(reason, []).extend(self.capture.blocks[name].layout.names)
        for reason, names in by_reason.items():
            self._leave(names, reason, covered)

    def without_explanation(self, found: Findings, covered: Collection[str]) -> None:
        """Say which gradients come from elsewhere for a part, and leave those that mostly do."""
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
