"""How long the steps of an optimizer are, by what its batches say of them."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from natgrad.likelihoods import Gaussian, Likelihood
from natgrad.optim.step.measured_length import MeasuredLength
from natgrad.optim.step.measures import Measures, second_largest_change
from natgrad.optim.step.plan import PreconditionedGroups, rate_of

#: Least ηγ, or γ where η is below 1: what one bad batch after the other may cost.
LEAST_LENGTH = 0.01

#: Share of a step kept below which no noise explains that the rest went too far.
UNMISTAKABLE = 0.25

#: How many standard deviations of q its noise explains, up to which q; and what q counts as at most
#: in σ, either way.
NOISE, LARGEST_OVERSHOOT, OUTLIER = 2.0, 1.5, 3.0

#: Share of their norms by which two weights may change in one step.
LARGEST_CHANGE = 0.3

#: Weight of the past in the average of slopes.
USUAL = 0.9

#: Average ratio of slopes q up to which lengths are not annealed: what early speed is worth.
TOLERATED = 0.05

#: Weight of the past in the longer average of log K, and how far below it K counts as falling.
LONG_MEMORY, FALL = 0.9, 0.5

#: Share of its slope that a step of a learning rate of 1 must use up, else lengths are stretched.
LEAST_SHARE = 0.8

#: Largest part that a single ratio of slopes plays, either way.
LARGEST_RATIO = 0.5

#: Largest ζ and ρ, and 1 over the least C: whatever unit a residual is in.
LONGEST = 1e6

#: How much longer than they are other batches must surely want steps before their reach grows:
#: while nothing is fitted, and later.
LONGER, SURELY_LONGER = 2.0, 3.0

#: Share of what the loss can fall by below which something is fitted.
FITTED = 0.5

#: q̄/C beyond which a step leaves other batches worse than it found them.
HARMFUL = 0.5

#: In batches of up to how many events ⟨Δ, g⟩ counts as no less than its mean over batches.
FEW_EVENTS = 4.0

#: How many q it takes to tell, each time.
FEWEST_RATIOS = 4

#: Steps at one learning rate after which it counts as constant, the power of 1/t that lengths then
#: fall with at most, in units of κ, and how far they go beyond the best for others, in those of C₁.
STEADY, FASTEST_FALL, BEYOND = 10, 5.0, 1.5

#: Least factor on the caution after a step that went well, where such lengths went too far before,
#: and the weight of the past in the average of q since, which asks for more.
SLOW_GROWTH, SINCE = 1.05, 0.8

#: A deviance as large stands for one that is not known.
UNKNOWN = 1e200

#: Share of ``‖∇L‖²/R`` that tr F counts as at least.
LEAST_TRACE = 0.01

#: After so many steps at learning rates below so much, someone has taken them for those of another
#: optimizer.
SLOW_STEPS, SLOW_RATE = 100, 0.05

#: After so many steps with more momentum than so much, where none was asked for when the optimizer
#: was made, a scheduler has set that of another optimizer: lengths that are measured need little.
HEAVY_STEPS, HEAVY_MOMENTUM = 20, 0.8


@dataclass(frozen=True)
class LengthState:
    """What is known of the lengths of steps.

    Attributes:
        log_decrement: The average of log K; None before the first measurement.
        usual_log_decrement: The average of log K over more measurements.
        log_slope: The average of log ⟨Δ, g⟩; None before the first step.
        mean_slope: The average of ⟨Δ, g⟩ over more steps.
        few: ``min(1, (4/N)²)`` of batches of N events.
        scale: c, the curvature of the loss in units of the Fisher matrix.
        measurements: How many there were.
        caution: γ.
        stretch: ζ, below 1 where lengths are annealed.
        ceiling: Up to which γ grows quickly: its value where a step last went too far.
        slope: s, by how much the last step was to lower the loss to first order; None where the
            next gradient is not to be held against it.
        share_of_alpha: ηγζρ of that step.
        bound: Whether that step was as long as weights may change.
        usual_slope: The average of s over steps.
        ratio: The last q.
        ratio_variance: σ², the noise of q.
        pairs: Of how many pairs of steps.
        usual_ratio: q̄, the average of q over steps, since reach doubled.
        ratios: How many there were.
        recent_ratio: q̃, the same, of which less is left of q of shorter steps as steps get longer.
        later_ratio: The average of q since a step was last taken back, from 0 on.
        share_of_ratio: ηγζρ of the step of the last q.
        reach: ρ.
        log_bend: The average of log C for steps with ηγζρ = 1; None before the first measurement.
        shared: r, the average of C − q over steps: the share of its slope that the next batch has
            where a step begins; None before the first.
        rate: η of the last step.
        steady: Steps since η changed.
        steps: Steps taken or taken back.
        taken_back: How many of them were.
    """

    log_decrement: float | None = None
    usual_log_decrement: float = 0.0
    log_slope: float | None = None
    mean_slope: float = 0.0
    few: float = 0.0
    scale: float = 1.0
    measurements: int = 0
    caution: float = 1.0
    stretch: float = 1.0
    ceiling: float = 1.0
    slope: float | None = None
    share_of_alpha: float = 1.0
    bound: bool = False
    usual_slope: float = 0.0
    ratio: float | None = None
    ratio_variance: float = 0.0
    pairs: int = 0
    usual_ratio: float = 0.0
    ratios: int = 0
    recent_ratio: float = 0.0
    later_ratio: float = 0.0
    share_of_ratio: float = 0.0
    reach: float = 1.0
    log_bend: float | None = None
    shared: float | None = None
    rate: float = 0.0
    steady: int = 0
    steps: int = 0
    taken_back: int = 0

    def measured(
        self,
        rule: MeasuredLength,
        slope: float,
        quadratic: float,
        scale: float,
        largest: float = math.inf,
        count: float = math.inf,
    ) -> LengthState:
        """Return the state after a measurement.

        Args:
            rule: The rule.
            slope: ``⟨Δ, g⟩``.
            quadratic: ``cΔᵀ(F_b + λI)Δ``.
            scale: c.
            largest: What cK cannot exceed, were F_b not sampled.
            count: N, how many events count in the batch.
        """
        if not (slope > 0 and quadratic > 0 and scale > 0 and largest > 0):
            return self
        found, measurements = 2 * math.log(slope) - math.log(quadratic), self.measurements + 1
        if largest < math.inf:
            found = min(found, math.log(largest / scale))
        earlier = 1 - 1 / measurements
        long = averaged(self.usual_log_decrement, found, min(LONG_MEMORY, earlier))
        average = averaged(self.log_decrement, found, min(rule.memory, earlier))
        return replace(
            self,
            log_decrement=average,
            usual_log_decrement=long,
            measurements=measurements,
            few=min(1.0, (FEW_EVENTS / count) ** 2) if count > 0 else 1.0,
            scale=scale,
        )

    def met(self, rule: MeasuredLength, slope: float) -> LengthState:
        """Return the state after a direction with ``⟨Δ, g⟩`` = slope was found."""
        if not slope > 0:
            return self
        log_slope = averaged(self.log_slope, math.log(slope), rule.memory)
        mean_slope = averaged(self.mean_slope or None, slope, USUAL)
        return replace(self, log_slope=log_slope, mean_slope=mean_slope)

    @property
    def is_steady(self) -> bool:
        """Whether η has been the same for ten steps."""
        return self.steady >= STEADY

    @property
    def least_noise(self) -> float:
        """2/N of batches of N events, from four on: what noise there is besides, at the least."""
        return 2.0 / FEW_EVENTS * math.sqrt(self.few)

    def length(self, slope: float, change: float = 0.0, lengthened: float = 1.0) -> float:
        """Return γζραν^{−p} for ``⟨Δ, g⟩`` = slope and ν^{−p} = lengthened; α is at most 1/c.

        The second largest ``η‖Δ_W‖/‖W‖`` of all weights W is ``change``.
        """
        if self.log_decrement is None or self.log_slope is None or slope <= 0:
            return 0.0
        usual = max(slope, math.exp(self.log_slope), self.few * self.mean_slope)
        alpha = math.exp(min(self.log_decrement - math.log(usual), -math.log(self.scale)))
        length = self.caution * self.stretch * self.reach * alpha * lengthened
        return length if length * change <= LARGEST_CHANGE else LARGEST_CHANGE / change

    def share_kept(self, rule: MeasuredLength, slope: float) -> float:
        """Return the share of the last step v that stays, 1 for all, by slope = ``⟨v, g⟩`` now."""
        ratio, noise = self._ratio(slope), NOISE * math.sqrt(self.ratio_variance)
        most = max(rule.overshoot, min(rule.overshoot + noise, LARGEST_OVERSHOOT))
        return 1.0 / (1.0 + ratio) if ratio > most else 1.0

    def _ratio(self, slope: float) -> float:
        """Return q; 0 where there is no step to hold the slope against."""
        if self.slope is None:
            return 0.0
        expected = max(self.slope, self.usual_slope)
        return slope / expected if math.isfinite(slope) else math.inf

    def _decrement_falls(self) -> bool:
        if self.log_decrement is None:
            return False
        return self.log_decrement < self.usual_log_decrement - FALL

    def answered(
        self, rule: MeasuredLength, slope: float, rate: float, left: float = 1.0
    ) -> LengthState:
        """Return the state after the present gradient answered to the last step v, which stays.

        By slope = ``⟨v, g⟩``, rate = η and left = R/R_max, the share left of what the loss can fall
        by.
        """
        if self.slope is None:
            return self
        ratio = min(OUTLIER, max(-OUTLIER, self._ratio(slope)))
        memory = min(USUAL, 1 - 1 / (self.ratios + 1))
        usual, shared = averaged(self.usual_ratio, ratio, memory), self.shared
        growth = self.share_of_alpha / self.share_of_ratio if self.share_of_ratio > 0 else 1.0
        if self.log_bend is not None:
            begun = math.exp(self.log_bend) * self.share_of_alpha - ratio
            shared = averaged(shared, begun, memory)
        variance = self.ratio_variance
        if self.ratio is not None:
            variance = USUAL * variance + (1 - USUAL) * (ratio - self.ratio) ** 2 / 2
        found = replace(
            self,
            stretch=self._stretched(rule, ratio, rate),
            ratio=ratio,
            ratio_variance=variance,
            pairs=self.pairs + (self.ratio is not None),
            usual_ratio=usual,
            ratios=self.ratios + 1,
            recent_ratio=averaged(self.recent_ratio, ratio, memory / max(1.0, growth)),
            later_ratio=averaged(self.later_ratio, ratio, SINCE),
            share_of_ratio=self.share_of_alpha,
            shared=shared,
        )
        known = self.log_bend is not None and rate > 0
        return found._reached(rule, rate, left) if known else found

    def _reached(self, rule: MeasuredLength, rate: float, left: float) -> LengthState:
        """Return the state with ρ as long as other batches want it."""
        bend = self._bend(rate)
        if self.reach > 1.0 and self.recent_ratio > 0:
            return replace(self, reach=max(1.0, self._reach_times(rule, -self.recent_ratio / bend)))
        if self.ratios < FEWEST_RATIOS or rule.reach == 1.0:
            return self
        variance = self.ratio_variance / (1 - USUAL**self.pairs)
        error = math.sqrt(variance / min(self.ratios, (1 + USUAL) / (1 - USUAL)))
        least = (self.usual_ratio - 2 * error) / bend
        most = (self.usual_ratio + 2 * error) / bend
        if least > HARMFUL and not self._decrement_falls():
            reach = max(LEAST_LENGTH, self._reach_times(rule, HARMFUL - least))
            return replace(self, reach=reach)
        limit = self._sustained(bend) if self.is_steady else 1.0
        if limit < self.reach <= 1.0:
            fall = (self.steps / (self.steps + 1)) ** (FASTEST_FALL * rule.annealing)
            return replace(self, reach=max(limit, self.reach * fall))
        if self.reach < 1.0:
            reach = min(limit, self._reach_times(rule, max(0.0, HARMFUL - most)))
            return replace(self, reach=reach)
        wanted = min(rate, 1.0) * self.caution * (1 - most)
        enough = LONGER if left > FITTED else SURELY_LONGER
        if self.bound or self.usual_ratio > 0 or wanted <= enough:
            return self
        if left <= FITTED:
            return replace(self, reach=min(LONGEST, self.reach * rule.reach), ratios=0)
        growth = rule.reach ** min(1.0, (wanted - LONGER) / (1 + error / bend))
        return replace(self, reach=min(LONGEST, self.reach * growth))

    def _sustained(self, bend: float) -> float:
        """Return the ρ, at most 1, that a constant rate can stay at, with C of the present ρ."""
        left = 1.0 - BEYOND * math.exp(self.log_bend or 0.0)
        if self.shared is None or left <= 0.0:
            return 1.0
        wanted = self.reach * self.shared / (bend * left)
        return min(1.0, max(LEAST_LENGTH, wanted))

    def _reach_times(self, rule: MeasuredLength, share: float) -> float:
        """Return ``ρ exp(κ · share)``, with a share of at most 1 either way."""
        return self.reach * math.exp(rule.annealing * max(-1.0, min(1.0, share)))

    def _bend(self, rate: float) -> float:
        """Return C of steps at a rate η, measured before."""
        return max(1 / LONGEST, math.exp(self.log_bend or 0.0) * self._share_of_alpha_at(rate))

    def _share_of_alpha_at(self, rate: float) -> float:
        """Return ηγζρ of a step at a rate η."""
        return rate * self.caution * self.stretch * self.reach

    def crossed(self, rule: MeasuredLength, curvature: float) -> LengthState:
        """Return the state after another batch measured ``h = cvᵀF_b v`` along the last step v."""
        if self.slope is None or not (self.slope > 0 and curvature > 0 and self.share_of_alpha > 0):
            return self  # At a rate of 0 only momentum moves.
        bend = curvature / max(self.slope, self.usual_slope)
        of_alpha = math.log(bend / self.share_of_alpha)
        return replace(self, log_bend=averaged(self.log_bend, of_alpha, rule.memory))

    def _stretched(self, rule: MeasuredLength, ratio: float, rate: float) -> float:
        """Return ζ after a step with a ratio of slopes."""
        ratio = min(LARGEST_RATIO, max(-LARGEST_RATIO, ratio))
        too_short = LEAST_SHARE * min(rate, 1.0) - 1.0
        if self.stretch > 1.0 or (self.stretch == 1.0 and ratio < too_short):
            if self.caution < 1.0:  # That is why.
                ratio = max(ratio, too_short)
            stretch = self.stretch * math.exp(-rule.annealing * (ratio - too_short))
            return min(LONGEST, max(1.0, stretch))
        if self._decrement_falls():
            return self.stretch
        stretch = self.stretch * math.exp(-rule.annealing * (ratio - TOLERATED))
        return min(1.0, max(LEAST_LENGTH, stretch))

    def shortened(self, share: float, rate: float) -> LengthState:
        """Return the state after the last step, at a rate η, was cut to a share of it."""
        cut = share if share < UNMISTAKABLE else max(share, 0.5)
        least = min(self.caution, LEAST_LENGTH / max(1.0, rate))
        caution = max(self.caution * cut, least)
        return replace(
            self,
            caution=caution,
            ceiling=caution,
            slope=None,
            later_ratio=0.0,
            usual_slope=self.usual_slope * share,
            steps=self.steps + 1,
            taken_back=self.taken_back + 1,
        )

    def taken(
        self, rule: MeasuredLength, slope: float, rate: float, change: float = 0.0
    ) -> LengthState:
        """Return the state after a step, at a rate η, that is to lower the loss by a slope.

        The second largest ``‖v_W‖/‖W‖`` of all weights W without momentum is ``change``.
        """
        # By what factor steps have been too short of late, 5 % at least.
        left = max(1.0 + self.later_ratio, 1.0 / LONGEST)
        wanted = max(SLOW_GROWTH, min(self.rate, 1.0) / left)
        fast, slow = self.caution * rule.growth, self.caution * min(rule.growth, wanted)
        caution = min(1.0, max(slow, min(fast, self.ceiling)))
        usual = USUAL * self.usual_slope + (1 - USUAL) * slope if self.usual_slope else slope
        return replace(
            self,
            caution=caution,
            ceiling=max(self.ceiling, caution),
            slope=slope or None,
            share_of_alpha=self._share_of_alpha_at(rate),
            bound=change >= 0.999 * LARGEST_CHANGE,
            rate=rate,
            steady=self.steady + 1 if rate == self.rate else 0,
            usual_slope=usual,
            steps=self.steps + 1,
        )

    def is_troubled(self) -> bool:
        """Return whether more than a tenth of the steps were taken back, and several."""
        return self.taken_back >= 6 and self.taken_back > 0.1 * self.steps


@dataclass(frozen=True)
class Deviance:
    """What is known of R, twice what the loss can fall by, by measurements on batches.

    Of a Gaussian it is the mean squared residual.

    Attributes:
        log_present: The average of log R; None before the first measurement.
        log_largest: The largest of these averages.
        least_trace: What ``tr F`` counts as at least, by the last gradient measured.
    """

    log_present: float | None = None
    log_largest: float = -math.inf
    least_trace: float = 0.0

    @property
    def left(self) -> float:
        """Share of it that is left, ``R/R_max``; 1 where it is not known."""
        return 1.0 if self.log_present is None else math.exp(self.log_present - self.log_largest)

    @property
    def noise_to_signal(self) -> float:
        """Ratio of what is left to what has been explained, at most 1."""
        return self.left / (1.0 - self.left) if self.left < 0.5 else 1.0

    def measured(self, present: float, memory: float, square: float = 0.0) -> Deviance:
        """Return the state after R was measured on a batch, and ``‖∇L‖²``, 0 if unknown."""
        if not 0 < present < UNKNOWN:
            return self
        found = averaged(self.log_present, math.log(present), memory)
        return Deviance(found, max(self.log_largest, found), LEAST_TRACE * square / present)


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
        self._tell_of_schedules(rate, kept)
        return length

    def _tell_of_schedules(self, rate: float, momentum: float) -> None:
        """Say once where learning rates, or momentum as OneCycleLR sets it, suit another rule."""
        self._largest_rate = max(self._largest_rate, rate)
        if self.state.steps == SLOW_STEPS and self._largest_rate < SLOW_RATE:
            warnings.warn(
                f"{self.optimizer} has taken {SLOW_STEPS} steps at learning rates of at most "
                f"{self._largest_rate:.2g}, which are factors on a measured length: leave lr at "
                f"its default of {self.lr}, and let a scheduler multiply it, not set it",
                stacklevel=6,
            )
        if self.state.steps == HEAVY_STEPS and momentum > self._most_momentum:
            warnings.warn(
                f"a scheduler has set the momentum of {self.optimizer} to {momentum:.3g}, as "
                "OneCycleLR and CyclicLR do by default, which suits other optimizers: measured "
                "lengths train better with little, so leave it out by cycle_momentum=False",
                stacklevel=6,
            )

    def state_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {"state": dict(vars(self.state)), "deviance": dict(vars(self.deviance))}

    def with_state(self, values: Mapping[str, Any]) -> Lengths:
        """Return the same with the state that :meth:`state_dict` described."""
        restored = copy.copy(self)
        restored.state = LengthState(**values["state"])
        restored.deviance = Deviance(**values["deviance"])
        return restored


def averaged(old: float | None, found: float, memory: float) -> float:
    """Return a moving average after another value, which is the first one where old is None."""
    return found if old is None else memory * old + (1 - memory) * found
