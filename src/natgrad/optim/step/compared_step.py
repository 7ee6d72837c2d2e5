"""Steps that are held against the loss itself: adaptive damping, rejection, line search."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from natgrad.distributed.shards import in_form_of
from natgrad.optim.step.damping import LevenbergMarquardt
from natgrad.optim.step.line_search import LineSearch
from natgrad.optim.step.measures import predicted_change
from natgrad.optim.step.plan import GroupUpdate, PreconditionedGroups, StepPlan
from natgrad.optim.step.quadratic_model import BatchFisher


@dataclass(frozen=True)
class ComparedStep:
    """A planned step whose loss is evaluated where it leads.

    All replicas see the mean of their losses, so that they decide the same.

    Attributes:
        plan: The step.
        grouped: What it moves.
        start: Parameter name → θ before it.
        change: Returns by how much the closure's loss has changed since then.
        rule: How damping adapts, if it does.
        batch: The Fisher matrix of the batch, on steps after which damping adapts.
    """

    plan: StepPlan
    grouped: PreconditionedGroups
    start: dict[str, Tensor]
    change: Callable[[], float]
    rule: LevenbergMarquardt | None
    batch: BatchFisher | None

    def take(self) -> None:
        """Take the step as planned; adapt the damping, and take it back if the rule rejects it."""
        rejects = self.rule is not None and self.rule.reject
        states = self.grouped.copied_states(self.start) if rejects else {}
        for update in self.plan.updates(self.grouped):
            update.apply()
        if not self.start or self.rule is None or self.batch is None:
            return
        predicted, actual = self._predicted(self.batch), self._actual()
        self.grouped.adapt_damping(self.rule, actual, predicted)
        if self.rule.rejects(actual, predicted):
            self.grouped.restore(self.start, states)

    def search(self, line_search: LineSearch) -> float:
        """Go along the step as far as a line search says, and adapt the damping.

        Momentum is forgotten where it would not descend, and where the search fails, so that the
        next step can be another one.

        Returns:
            The share of the step taken; 0 if nothing has moved.
        """
        updates = self.plan.updates(self.grouped)
        slope = self._slope(updates)
        if not slope > 0:
            self.grouped.forget_momentum(self.start)
            updates = self.plan.updates(self.grouped)
            slope = self._slope(updates)

        def move(share: float) -> None:
            for update in updates:
                update.move(self.start, share)

        share, actual = 0.0, math.inf
        if slope > 0:
            share, actual = line_search.search(move, self._actual, 0.0, slope, 1.0)
        if share == 0:
            self.grouped.forget_momentum(self.start)
            if self.rule is not None:
                self.grouped.adapt_damping(self.rule, math.inf, 0.0)
            return share
        if self.rule is not None and self.batch is not None:
            self.grouped.adapt_damping(self.rule, actual, self._predicted(self.batch))
        for update in updates:  # Decay is no part of the loss, so the search went without.
            if update.decay > 0:
                update.move(self.start, share, decays=True)
        return share

    def _slope(self, updates: list[GroupUpdate]) -> float:
        """Return by how much the loss falls along updates, to first order."""
        if not updates:
            return 0.0
        slopes = [update.slope(self.plan.gradients) for update in updates]
        total = {"slope": torch.stack(slopes).sum()}
        self.grouped.replicas.average(total)
        return float(total["slope"])

    def _actual(self) -> float:
        """Return by how much the loss, penalties included, has changed."""
        change = self.change() + self.grouped.penalty_change(self.start)
        device = next(iter(self.start.values())).device
        value = {"change": torch.tensor(change, dtype=torch.float64, device=device)}
        self.grouped.replicas.average(value)
        return float(value["change"])

    def _predicted(self, batch: BatchFisher) -> float:
        """Return ``M(δ) − M(0)`` of the quadratic model for the way gone so far."""
        parameters, gradients = self.grouped.parameters, self.plan.gradients
        pairs = ((name, parameters[name] - old) for name, old in self.start.items())
        step = {name: in_form_of(value, gradients[name]) for name, value in pairs}
        return predicted_change(batch, self.grouped, step, gradients)
