"""How long the steps of an optimizer are, by what its batches say of them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

from natgrad.likelihoods import Gaussian, Likelihood
from natgrad.optim.step.deviance import Deviance
from natgrad.optim.step.groups import PreconditionedGroups, rate_of
from natgrad.optim.step.length_state import LengthState
from natgrad.optim.step.measured_length import MeasuredLength
from natgrad.optim.step.measures import Measures, second_largest_change

#: After so many steps at learning rates below so much, someone has taken them for those of another
#: optimizer.
SLOW_STEPS, SLOW_RATE = 100, 0.05

#: After so many steps with more momentum than so much, where none was asked for when the optimizer
#: was made, a scheduler has set that of another optimizer: lengths that are measured need little.
HEAVY_STEPS, HEAVY_MOMENTUM = 20, 0.8


class Lengths:
    """The lengths of steps, where a :class:`natgrad.MeasuredLength` chooses them.

    Args:
        rule: The rule.
        optimizer: Name of the optimizer, for what its user is told.
        lr: Its default learning rate.
        momentum: The largest that it was made with.

    Attributes:
        state: What is known of lengths.
        deviance: What is known of what the loss can fall by.
    """

    def __init__(self, rule: MeasuredLength, optimizer: str, lr: object, momentum: float) -> None:
        self.rule = rule
        self.optimizer = optimizer
        self.lr = lr
        self.state: LengthState = LengthState(caution=rule.start)
        self.deviance: Deviance = Deviance()
        self._most_momentum = max(momentum, HEAVY_MOMENTUM)
        self._largest_rate = 0.0
        self._told_trouble = False

    def noise_to_signal(self, likelihood: Likelihood) -> float:
        """Return it for squared errors, whose Fisher matrix does not shrink as they do; else 1."""
        return self.deviance.noise_to_signal if isinstance(likelihood, Gaussian) else 1.0

    def note_deviance(self, found: Measures) -> None:
        """Take over what a batch says of what the loss can fall by."""
        self.deviance = self.deviance.measured(found["largest"], self.rule.memory, found["square"])

    def take_back(self, grouped: PreconditionedGroups, found: Measures) -> bool:
        """Shorten the last step if the present gradient shows that it went too far.

        Args:
            grouped: The parameters it moved.
            found: What was measured of the batch.

        Returns:
            Whether it did, and there is no step to take now.
        """
        share = self.state.share_kept(self.rule, found.get("along", 0.0))
        if share == 1.0:
            return False
        self.shorten_last_step(grouped, share)
        if self.state.is_troubled() and not self._told_trouble:
            self._told_trouble = True
            warnings.warn(
                f"{self.optimizer} took back {self.state.taken_back} of its {self.state.steps} "
                "steps, as the next gradient showed that they went too far: they get shorter until "
                "that ends; a lower lr, more damping or a more frequent refresh may train faster",
                stacklevel=4,
            )
        return True

    def shorten_last_step(self, grouped: PreconditionedGroups, share: float) -> None:
        """Keep a share of the last step."""
        grouped.shorten_last_step(share)
        self.state = self.state.shortened(share, grouped.largest_rate)

    def next_length(
        self, grouped: PreconditionedGroups, found: Measures, likelihood: Likelihood
    ) -> float:
        """Return the length of the step that is taken now, in units of Δ.

        Args:
            grouped: The parameters it moves.
            found: What was measured of the batch.
            likelihood: That of the loss.
        """
        rule, state, rate = self.rule, self.state, grouped.largest_rate
        along, inner = found.get("along", 0.0), found.get("inner", 0.0)
        if "across" in found:
            state = state.crossed(rule, found["across"])
        state = state.answered(rule, along, rate, self.deviance.left)
        state = state.met(rule, inner)
        if "fisher" in found:
            terms = zip(grouped.dampings, found["grams"], strict=True)
            damped = found["scale"] * sum(d * gram[0][0] for d, gram in terms)
            square = found["fisher"] + damped
            bounds = found["scale"], found["largest"], found["count"]
            state = state.measured(rule, inner, square, *bounds)
            self.note_deviance(found)
        change = second_largest_change(found, [rate_of(group) for group in grouped.groups])
        noise = max(self.noise_to_signal(likelihood), state.least_noise)
        lengthened = rule.lengthened(noise, state.is_steady)
        length = state.length(inner, change, lengthened)
        rates = [rate_of(group) * (1.0 - group["momentum"]) for group in grouped.groups]
        kept = max((group["momentum"] for group in grouped.groups), default=0.0)
        slope = max(rates, default=0.0) * length * inner + kept * max(0.0, -along)
        self.state = state.taken(rule, slope, rate, length * change)
        self._tell_if_slow(rate)
        self._tell_if_heavy(kept)
        return length

    def _tell_if_slow(self, rate: float) -> None:
        """Say once where all learning rates so far would suit another optimizer."""
        self._largest_rate = max(self._largest_rate, rate)
        if self.state.steps == SLOW_STEPS and self._largest_rate < SLOW_RATE:
            warnings.warn(
                f"{self.optimizer} has taken {SLOW_STEPS} steps at learning rates of at most "
                f"{self._largest_rate:.2g}, which are factors on a measured length: leave lr at "
                f"its default of {self.lr}, and let a scheduler multiply it, not set it",
                stacklevel=6,
            )

    def _tell_if_heavy(self, momentum: float) -> None:
        """Say once where momentum is that of another optimizer, as OneCycleLR sets it."""
        if self.state.steps == HEAVY_STEPS and momentum > self._most_momentum:
            warnings.warn(
                f"a scheduler has set the momentum of {self.optimizer} to {momentum:.3g}, as "
                "OneCycleLR and CyclicLR do by default, which suits other optimizers: measured "
                "lengths train better with little, so leave it out by cycle_momentum=False",
                stacklevel=6,
            )

    def state_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {"state": self.state.state_dict(), "deviance": self.deviance.state_dict()}

    def with_state(self, values: Mapping[str, Any]) -> Lengths:
        """Return the same with the state that :meth:`state_dict` described."""
        restored = copy.copy(self)
        restored.state = LengthState.of(values["state"])
        restored.deviance = Deviance.of(values["deviance"])
        return restored
