"""The preconditioned parameters of an optimizer, as the parts of a step see them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from natgrad.distributed.replicas import Replicas
from natgrad.distributed.shards import in_form_of, whole
from natgrad.layouts import inner_product
from natgrad.optim.step.levenberg_marquardt import LevenbergMarquardt

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
        return max((rate_of(group) for group in self.groups), default=0.0)

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
        if self.rule.measured is not None:
            return {"previous_step": zero}
        if momentum == 0:
            return {}
        if self.rule.uses_model:
            return {"previous_step": zero}
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
        if not any(name in penalties for name in gradients):
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
