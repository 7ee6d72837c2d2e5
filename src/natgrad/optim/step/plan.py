"""What a step moves, and what it does to the weights of each parameter group."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from natgrad.distributed.replicas import Replicas
from natgrad.distributed.shards import in_form_of, is_sharded, sharded_like, whole
from natgrad.layouts import inner_product
from natgrad.optim.step.damping import LevenbergMarquardt

if TYPE_CHECKING:
    from natgrad.optim.options import StepRule


def rate_of(group: Mapping[str, Any]) -> float:
    """Return the learning rate of a preconditioned group, a number or a tensor, in its unit."""
    return float(group["lr"]) * float(group["unit"])


@dataclass(frozen=True)
class PreconditionedGroups:
    """Preconditioned parameter groups, and what belongs to their parameters.

    Attributes:
        groups: The groups, with their ``"lr"``, ``"momentum"``, ``"damping"``, …
        names: Parameter → name.
        parameters: Name → parameter.
        states: Parameter → its state in the optimizer.
        rule: How a natural gradient becomes a step, for all groups together.
        replicas: Processes that take the same step.
        left_out: Names of parameters in the groups that something else trains.
        damping_unit: What a group's damping is multiplied by.
    """

    groups: list[dict[str, Any]]
    names: Mapping[nn.Parameter, str]
    parameters: Mapping[str, nn.Parameter]
    states: MutableMapping[Tensor, dict[str, Any]]
    rule: StepRule
    replicas: Replicas = Replicas()  # noqa: RUF009, frozen
    left_out: Collection[str] = ()
    damping_unit: float = 1.0

    def members(self, group: Mapping[str, Any]) -> list[Any]:
        """Return a group's parameters, but for those left out."""
        return [p for p in group["params"] if self.names[p] not in self.left_out]

    @property
    def group_names(self) -> list[list[str]]:
        """Parameter names of each group."""
        return [[self.names[p] for p in self.members(group)] for group in self.groups]

    @property
    def dampings(self) -> list[float]:
        """What is added to F on each group's parameters."""
        in_model = self.rule.decays_in_model
        return [
            group["damping"] * self.damping_unit + (group["weight_decay"] if in_model else 0.0)
            for group in self.groups
        ]

    @property
    def largest_rate(self) -> float:
        """η of the group that is trained fastest."""
        return max(map(rate_of, self.groups), default=0.0)

    @property
    def penalties(self) -> dict[str, float]:
        """Parameter name → w of the penalty ``½w‖θ‖²`` in the loss; empty if there is none."""
        if not self.rule.decays_in_model:
            return {}
        return {
            self.names[p]: group["weight_decay"]
            for group in self.groups
            for p in self.members(group)
            if group["weight_decay"] > 0
        }

    def adapt_damping(self, rule: LevenbergMarquardt, actual: float, predicted: float) -> None:
        """Let every group's damping follow a step's actual and predicted change of the loss."""
        for group in self.groups:
            group["damping"] = rule.adapted(group["damping"], actual, predicted)

    def initial_state(self, parameter: nn.Parameter, momentum: float) -> dict[str, Any]:
        """Return the state of a parameter before the first step of a run with momentum."""
        zero = torch.zeros_like(parameter)
        if self.rule.measured is not None or (self.rule.uses_model and momentum > 0):
            return {"previous_step": zero}
        if momentum == 0:
            return {}
        steps = {"momentum_steps": 0} if self.rule.averaged_momentum else {}
        return {"momentum_buffer": zero, **steps}

    def forget_momentum(self, names: Iterable[str]) -> None:
        """Drop the sums over past steps."""
        for name in names:
            state = self.states.get(self.parameters[name], {})
            for entry in ("momentum_buffer", "momentum_steps"):
                state.pop(entry, None)

    def shorten_last_step(self, share: float) -> None:
        """Keep a share of the last step of all parameters, and of what it is to momentum."""
        for group in self.groups:
            for p in self.members(group):
                step = self.states.get(p, {}).get("previous_step")
                if step is not None and p.requires_grad and p.grad is not None:
                    p.sub_(step, alpha=1.0 - share)
                    step.mul_(share)

    def copied_states(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Return copies of parameters' states."""
        return {
            name: {
                key: value.clone() if isinstance(value, Tensor) else value
                for key, value in self.states.get(self.parameters[name], {}).items()
            }
            for name in names
        }

    def restore(self, values: Mapping[str, Tensor], states: Mapping[str, dict[str, Any]]) -> None:
        """Set parameters and their states to what they were."""
        for name, value in values.items():
            parameter = self.parameters[name]
            parameter.copy_(value)
            if states[name] or parameter in self.states:
                self.states[parameter] = states[name]

    def previous_steps(self, natural: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the last step of those parameters for which it matters.

        Args:
            natural: Name → natural gradient, of all that are asked for.
        """
        return {
            self.names[p]: in_form_of(self.states[p]["previous_step"], natural[self.names[p]])
            for group in self.groups
            for p in self.members(group)
            if (group["momentum"] > 0 or self.rule.measured is not None)
            and self.names[p] in natural
            and "previous_step" in self.states.get(p, {})
        }

    # The gradient that is preconditioned.

    def with_penalty(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return gradients of the loss with the penalty on the weights."""
        penalties = self.penalties
        if penalties.keys().isdisjoint(gradients):
            return gradients
        pairs = {n: in_form_of(self.parameters[n], g) for n, g in gradients.items()}
        return {
            name: torch.add(gradient, pairs[name], alpha=penalties.get(name, 0.0))
            for name, gradient in gradients.items()
        }

    def penalty_change(self, start: Mapping[str, Tensor]) -> float:
        """Return by how much the penalty has changed since parameters were ``start``.

        In shards, what has that as its mean over processes.
        """
        total = 0.0
        for name, decay in self.penalties.items():
            if name in start:
                now, before = self.parameters[name].detach(), start[name]
                if self.replicas.are_alone:  # In tensor parallelism nobody averages shards.
                    now, before = whole(now), whole(before)
                product = inner_product({name: now + before}, {name: now - before})
                total += 0.5 * decay * float(product)
        return total

    def summed(
        self, gradients: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
        """Return gradients summed over past steps, and the new entries of the states.

        Nothing is changed yet.
        """
        result, entries = dict(gradients), {}
        for group in self.groups:
            momentum = group["momentum"]
            for p in self.members(group):
                name = self.names[p]
                if name not in gradients or momentum == 0:
                    continue
                gradient, old = gradients[name], self.states.get(p, {}).get("momentum_buffer")
                buffer = gradient.clone() if old is None else gradient + momentum * old
                entries[name] = {"momentum_buffer": buffer}
                ahead = self.rule.nesterov
                result[name] = gradient + momentum * buffer if ahead else buffer
        return result, entries


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

    def apply(self, share: float = 1.0, decays: bool = True) -> None:
        """Update the parameters by a share t, ``(1 − tw)θ − trv``, or without decay ``θ − trv``."""
        if decays and self.decay > 0:
            torch._foreach_mul_(self.parameters, 1.0 - share * self.decay)
        torch._foreach_add_(self.parameters, self.directions, alpha=-share * self.rate)

    def move(self, start: Mapping[str, Tensor], share: float, decays: bool = False) -> None:
        """Set the parameters to where a share t of the update leads from a start.

        Args:
            start: Parameter name → θ.
            share: t; the start itself is set bit for bit.
            decays: As in :meth:`apply`.
        """
        for name, parameter in zip(self.names, self.parameters, strict=True):
            parameter.copy_(start[name])
        if share:
            self.apply(share, decays)

    def slope(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Return ``r⟨v, ∇L⟩`` in float64: by how much the loss falls to first order.

        In shards, what has that as its mean over processes.
        """
        pairs = zip(self.names, self.directions, strict=True)
        directions = {name: in_form_of(value, gradients[name]) for name, value in pairs}
        return self.rate * inner_product(directions, gradients).double()


def _parted(group: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a group's parameters in shards and its others apart: no operation takes both."""
    parts: tuple[list[Any], list[Any]] = [], []
    for p in group["params"]:
        parts[not is_sharded(p)].append(p)
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
