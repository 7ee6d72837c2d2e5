"""A step about to be taken, and what it does to the weights of each parameter group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from natgrad.distributed.shards import in_form_of, is_sharded, sharded_like
from natgrad.layouts import inner_product
from natgrad.optim.step.groups import PreconditionedGroups, rate_of


@dataclass(frozen=True)
class StepPlan:
    """A step about to be taken.

    Attributes:
        gradients: Parameter name → gradient of the loss, weight decay included if it is part of it.
        state: Parameter name → new entries of the optimizer's state.
        directions: Parameter name → tensor, for each of the directions v.
        coefficients: c, with ``δ = Σ_i c_i v_i`` at learning rate 1.
        scales: Factors on δ by the clips, one per preconditioned group.
    """

    gradients: dict[str, Tensor]
    state: dict[str, dict[str, Any]]
    directions: list[dict[str, Tensor]]
    coefficients: list[float]
    scales: list[float]

    def updates(self, grouped: PreconditionedGroups) -> list[GroupUpdate]:
        """Return what the step does to each group; the states go on by one step."""
        for name, entries in self.state.items():
            grouped.states[grouped.parameters[name]].update(entries)
        rule = grouped.rule
        take = self._natural_update
        if rule.keeps_steps:
            take = self._model_update if rule.uses_model else self._measured_update
        pairs = zip(grouped.groups, self.scales, strict=True)
        found = [take(grouped, alike, scale) for group, scale in pairs for alike in _parted(group)]
        return [update for update in found if update is not None]

    def _moved(
        self, grouped: PreconditionedGroups, group: dict[str, Any]
    ) -> tuple[list[str], list[Tensor], list[Tensor]]:
        """Return names, parameters and Δ of those of a group that have a natural gradient."""
        natural = self.directions[0]
        parameters = [p for p in grouped.members(group) if grouped.names[p] in natural]
        names = [grouped.names[p] for p in parameters]
        pairs = zip(names, parameters, strict=True)
        directions = [sharded_like(natural[n].to(p.dtype), p) for n, p in pairs]
        return names, parameters, directions

    def _natural_update(
        self, grouped: PreconditionedGroups, group: dict[str, Any], scale: float
    ) -> GroupUpdate | None:
        """Return the step along ``scale·Δ`` with momentum."""
        names, parameters, directions = self._moved(grouped, group)
        if not parameters:
            return None
        lr, momentum, rule = rate_of(group), group["momentum"], grouped.rule
        if momentum > 0 and rule.momentum_on == "natural_gradient":
            states = [grouped.states[p] for p in parameters]
            for p, state in zip(parameters, states, strict=True):
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
            buffers = [state["momentum_buffer"] for state in states]
            share = scale * (1.0 - momentum) if rule.averaged_momentum else scale
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_add_(buffers, directions, alpha=share)
            scale = 1.0
            if rule.nesterov:
                ahead = torch._foreach_mul(buffers, momentum)
                torch._foreach_add_(ahead, directions, alpha=share)
                directions = list(ahead)
            else:
                directions = buffers
            if rule.averaged_momentum:
                directions = _unbiased(directions, states, momentum)
        decay = 0.0 if rule.decays_in_model else lr * group["weight_decay"]
        return GroupUpdate(names, parameters, directions, lr * scale, decay)

    def _measured_update(
        self, grouped: PreconditionedGroups, group: dict[str, Any], scale: float
    ) -> GroupUpdate | None:
        """Return the step ``μv − (1 − μ)·scale·η·αΔ``, with v the last one."""
        names, parameters, directions = self._moved(grouped, group)
        if not parameters:
            return None
        states = [grouped.states[p] for p in parameters]
        for p, state in zip(parameters, states, strict=True):
            if "previous_step" not in state:
                state["previous_step"] = torch.zeros_like(p)
        steps = [state["previous_step"] for state in states]
        lr, momentum = rate_of(group), group["momentum"]
        share = lr * scale * self.coefficients[0] * (1.0 - momentum)
        torch._foreach_mul_(steps, momentum)
        torch._foreach_add_(steps, directions, alpha=share)
        decay = 0.0 if grouped.rule.decays_in_model else lr * group["weight_decay"]
        return GroupUpdate(names, parameters, steps, -1.0, decay)

    def _model_update(
        self, grouped: PreconditionedGroups, group: dict[str, Any], scale: float
    ) -> GroupUpdate | None:
        """Return the step ``scale·η Σ_i c_i v_i``."""
        parameters = [p for p in grouped.members(group) if p.grad is not None]
        if not parameters:
            return None
        names = [grouped.names[p] for p in parameters]
        lr, steps = rate_of(group), []
        for name, p in zip(names, parameters, strict=True):
            step = torch.zeros_like(p)
            for direction, coefficient in zip(self.directions, self.coefficients, strict=True):
                if name in direction:
                    own = sharded_like(direction[name].to(p.dtype), p)
                    step.add_(own, alpha=lr * scale * coefficient)
            steps.append(step)
            if group["momentum"] > 0:
                grouped.states[p]["previous_step"] = step
        decay = 0.0 if grouped.rule.decays_in_model else lr * group["weight_decay"]
        return GroupUpdate(names, parameters, steps, -1.0, decay)


@dataclass(frozen=True)
class GroupUpdate:
    r"""The update ``θ ← (1 − w)θ − rv`` of a group's parameters.

    Attributes:
        names: Names of the parameters.
        parameters: θ, those of the group that have a gradient; never empty.
        directions: v.
        rate: r.
        decay: w, the share of the weights that decoupled decay takes.
    """

    names: list[str]
    parameters: list[Tensor]
    directions: list[Tensor]
    rate: float
    decay: float = 0.0

    def apply(self) -> None:
        """Update the parameters."""
        self._go(1.0, self.decay)

    def move(self, start: Mapping[str, Tensor], share: float, decays: bool = False) -> None:
        """Set the parameters to where a share t of the update leads from a start.

        Args:
            start: Parameter name → θ.
            share: t; the start itself is set bit for bit.
            decays: Whether it is ``(1 − tw)θ − trv``, or without decay ``θ − trv``.
        """
        for name, parameter in zip(self.names, self.parameters, strict=True):
            parameter.copy_(start[name])
        if share:
            self._go(share, self.decay if decays else 0.0)

    def _go(self, share: float, decay: float) -> None:
        if decay > 0:
            torch._foreach_mul_(self.parameters, 1.0 - share * decay)
        torch._foreach_add_(self.parameters, self.directions, alpha=-share * self.rate)

    def slope(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Return ``r⟨v, ∇L⟩`` in float64: by how much the loss falls to first order.

        In shards, what has that as its mean over processes.
        """
        pairs = zip(self.names, self.directions, strict=True)
        directions = {name: in_form_of(value, gradients[name]) for name, value in pairs}
        return self.rate * inner_product(directions, gradients).double()


def _parted(group: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a group's parameters in shards and its others apart: no operation takes both."""
    parts = [[p for p in group["params"] if is_sharded(p) is kind] for kind in (True, False)]
    return [{**group, "params": params} for params in parts if params]


def _unbiased(
    averages: list[Tensor], states: list[dict[str, Any]], momentum: float
) -> list[Tensor]:
    """Return averages over the steps so far, from averages that began at zero."""
    result = []
    for average, state in zip(averages, states, strict=True):
        state["momentum_steps"] = state.get("momentum_steps", 0) + 1
        result.append(average / (1.0 - momentum ** state["momentum_steps"]))
    return result
