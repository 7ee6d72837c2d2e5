"""Entries of gradients that the user has set to zero, and which are not to move."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from natgrad.capture.graph import purpose_for
from natgrad.capture.hooks import is_pulling_back

#: Steps from one comparison to the next, if nothing calls for it before.
INTERVAL = 20


@dataclass(frozen=True)
class _Mark:
    """How a gradient came about.

    Attributes:
        passes: How many forward passes of the model there were.
        hooks: How many hooks it went through.
        version: How often it was changed in place.
        changes: The same since the step before, of a gradient that stays the same tensor.
    """

    passes: int
    hooks: int
    version: int
    changes: int

    def differs(self, other: _Mark) -> bool:
        """Return whether two gradients of as many passes were treated differently."""
        if self.passes != other.passes:
            return False
        changed = self.version != other.version and self.changes != other.changes
        return changed or self.hooks != other.hooks


class ZeroedGradients:
    r"""Finds gradients that were set to zero, entry by entry, after autograd had made them.

    Masks of pruned networks and rows that are frozen by hand are such, by hooks or on ``.grad``
    itself. First-order rules leave these entries where they are, but an inverse mixes all entries
    of a layer. So the natural gradient is set to zero there, too, which leaves a direction of
    descent: ``(Pg)ᵀF⁻¹Pg > 0`` with the projection P.

    Gradients that are zero by themselves, as of units that no sample reaches, are none of these.
    What tells is the gradient before hooks of the user: it is collected at the first step, every
    20 steps, and at the step after one at which ``.grad`` was changed in place more or less often
    than at the one before, or had more or less hooks; such a step itself takes no chance.

    Attributes:
        names: Parameters that had such entries so far.
    """

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.due = True
        self._handles: list[Any] = []
        #: Where gradients are not zero: of those that reach ``.grad``, and that are only asked for.
        self._nonzero: dict[bool, dict[str, Tensor]] = {False: {}, True: {}}
        self._marks: dict[str, _Mark] = {}
        self._suspects: set[str] = set()
        self._passes = self._steps = 0

    def begin(self, parameters: Mapping[str, nn.Parameter], names: Collection[str]) -> None:
        """Collect preconditioned gradients of a forward pass to come, if that is due."""
        self._passes += 1
        if not self.due or self._handles:
            return
        for name, parameter in parameters.items():
            if name in names and parameter.requires_grad:
                others = dict(cast(Any, parameter)._backward_hooks or ())
                handle = parameter.register_hook(self._collect(name, parameter))
                self._handles.append(handle)
                hooks = cast(Any, parameter._backward_hooks)
                for number in others:  # Those of the user come after it.
                    del hooks[number]
                hooks.update(others)

    def _collect(self, name: str, parameter: Tensor) -> Any:
        def note(gradient: Tensor) -> None:
            if is_pulling_back(gradient) or gradient.layout is not torch.strided:
                return
            size = gradient.detach().abs()
            # Smaller ones may become zero by themselves, as when a scale is divided by.
            present = size > torch.finfo(size.dtype).eps * size.max() if size.numel() else size > 0
            found = self._nonzero[purpose_for(parameter) == "ask"]
            found[name] = found[name] | present if name in found else present

        return note

    def reset(self) -> None:
        """Forget what was collected: those gradients are dropped."""
        self._nonzero = {False: {}, True: {}}

    def drop(self) -> None:
        """Stop collecting, and forget what was collected."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.reset()

    def compared(
        self, parameters: Mapping[str, nn.Parameter], names: Collection[str], alone: bool
    ) -> dict[str, Tensor]:
        """Return parameter name → 1.0 where entries were set to zero, on the device.

        The names are the same in all processes; not ``alone``, these see other changes.
        """
        collected = self._nonzero[not self._nonzero[False]]
        due, flags = self.due, {}
        for name in names if due else ():
            gradient, present = parameters[name].grad, collected.get(name)
            flag = torch.zeros((), device=parameters[name].device)
            if present is not None and gradient is not None and gradient.shape == present.shape:
                flag = ((gradient == 0) & present).any().to(flag.dtype)
            flags[name] = flag
        self.drop()
        self._steps += 1
        self._suspects = self._changed(parameters, names) if alone else set()
        self._passes = 0
        if due:
            self._suspects -= set(collected)
        self.due = bool(self._suspects) or self._steps % INTERVAL == 0
        return flags

    def _changed(self, parameters: Mapping[str, nn.Parameter], names: Iterable[str]) -> set[str]:
        """Return parameters whose gradients were treated otherwise than at the step before."""
        before, self._marks, changed = self._marks, {}, set()
        for name in names:
            parameter: Any = parameters[name]
            if parameter.grad is not None and not parameter.grad.is_inference():
                version, known = parameter.grad._version, before.get(name)
                hooks = parameter._backward_hooks, parameter._post_accumulate_grad_hooks
                number = sum(len(one) for one in hooks if one)
                changes = version - (0 if known is None else known.version)
                mark = self._marks[name] = _Mark(self._passes, number, version, changes)
                if known is not None and mark.differs(known):
                    changed.add(name)
        return changed

    def held(
        self,
        directions: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        flags: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """Return directions that are zero where gradients were, as :meth:`compared` told."""
        result = dict(directions)
        for name in directions.keys() & gradients.keys():
            gradient, direction = gradients[name], directions[name]
            if name in self.names or name in self._suspects:
                result[name] = direction * (gradient != 0)
            elif name in flags:
                stays = (gradient == 0) & (flags[name] != 0).to(gradient.device)
                # In place: entries in another order in memory would be summed in another one.
                direction.masked_fill_(stays, 0.0)
        return result

    def note(self, flags: Iterable[str], values: Iterable[Any]) -> None:
        """Remember parameters whose gradients had such entries, by the flags on the host."""
        self.names.update(itertools.compress(flags, values))


def as_check(flags: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return flags as one tensor among others that go to the host together, ``"zeroed"``."""
    return {"zeroed": torch.stack(list(flags.values()))} if flags else {}
