r"""The length of a step, measured on batches and checked by the next gradient.

Along a natural gradient :math:`\Delta = (\hat F + \lambda I)^{-1} g` the quadratic model with the
Fisher matrix :math:`F_b` of the batch itself falls until the length

.. math:: \alpha^* = \frac{\langle \Delta, g \rangle}{\Delta^\top (F_b + \lambda I) \Delta}
          = \frac{K}{\langle \Delta, g \rangle}, \qquad
          K = \frac{\langle \Delta, g \rangle^2}{\Delta^\top (F_b + \lambda I) \Delta}.

α* is far from 1 with any approximation of F: where N samples meet d directions that the damping
leaves free, noise makes up most of Δ and α* is about N/d. It also jumps with every inverse that has
become old. The decrement K does not: by the inequality of Cauchy and Schwarz it is at most the mean
of the squared residuals in the metric of the outputs, and the share it takes of them changes
slowly. So K is measured now and then, where the batch's rows are there or cost little, averaged,
and every step takes :math:`\alpha = K / \langle \Delta, g \rangle`, of numbers it has anyway.
α is the step of Polyak (1987) in the metric of :math:`\hat F`, its target measured.

Multiplying the loss by a constant multiplies K and ⟨Δ, g⟩ alike, so that nothing depends on units.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from natgrad.arguments import check_integer, check_range, is_number

if TYPE_CHECKING:
    from natgrad.optim.options import Refresh

#: Least ratio of noise to signal that lengths follow.
LEAST_NOISE = 0.01

#: Share of p at a constant learning rate.
STEADY_LENGTHENING = 0.4

#: Measurements of the first interval, while the network changes fastest.
EARLY_STEPS = frozenset({0, 1, 2, 3, 5, 7, 11})


@dataclass(frozen=True)
class MeasuredLength:
    r"""Steps as long as the batch's own Fisher matrix says, shortened where they went too far.

    With the learning rate η as a factor, the step is

    .. math:: v \leftarrow \mu v - (1 - \mu)\, \eta \gamma \zeta \rho \nu^{-p} \alpha \Delta, \quad
              \alpha = \min(K / \langle \Delta, g \rangle, 1/c), \quad
              \theta \leftarrow \theta + v,

    with K the decrement of the quadratic model, a geometric moving average over measurements, and c
    the factor from the Fisher matrix to the curvature of the loss, where its gradient shows one. K
    counts as no more than twice what the loss can fall (its deviance; of a cross-entropy without
    smoothed labels twice its mean): few labels drawn from confident predictions do not show how
    steep the loss is, and the squared residuals of wrong ones say far too much.
    ⟨Δ, g⟩ stands for the largest of its present value, its geometric moving average over
    steps, and min(1, (4/N)²) of its arithmetic one over some 20, in batches of N: a batch that is
    fitted already would stretch its noise to the decrement of another, and of few samples most are.
    The learning rate is in the buffer, so that no schedule stretches old steps.

    No step is so long that two weights, vectors aside, change by more than 0.3 of their norms:
    ``ηγζρν^{−p}α‖Δ_W‖ ≤ 0.3‖W‖`` for all but one. A network is linear in each layer, up to what
    follows it, but not in two at once, and units that saturate show no slope that went too far.
    Targets whose size the outputs do not have yet ask all layers for such steps. A weight counts as
    no smaller than layers of torch begin with.

    The gradient at the next step tells whether the last one went too far, for the price of an
    inner product: the slope along v was −s and is ``q·s`` now, with s at least its average, as that
    of a batch fitted well says little. Where ``q > overshoot + 2σ``, or 1.5, the step is taken back
    to the minimum of the parabola with these slopes, ``θ ← θ − v·q/(1 + q)``, nothing else moves,
    and the caution γ falls by as much, or by half where noise may explain it, but never below 0.01,
    or 0.01/η with rates above 1. σ is the noise of q where batches are small: ``σ²`` averages
    ``(q − q')²/2`` over pairs of steps in a row. Steps that went well let γ grow to 1 again:
    quickly up to where such lengths went too far before, and beyond by 5 % a step, or by
    ``min(η, 1)/(1 + q̂)`` where that is more, with q̂ the average of q over some five steps
    since. What misled a step that went too far is an inverse of the network as it was: the next one
    updates and inverts the curvature, whatever its turn, unless that happens all the time. A
    gradient that is not finite skips the step; a second one running takes all of the last step
    back.

    K is measured on batches, whose noise the next batch does not share. Where gradients are mostly
    noise, steps end beyond the minimum along v as the next batch has it: q is positive on average,
    0.1 or more. Noise that vanishes as the data are fitted does no harm, and K falls with it; other
    noise sets a floor to the loss. So where K does not fall, lengths are annealed,
    ``ζ ← ζ exp(−κ(q − 0.05))``, with q cut to ±0.5 and ζ at most 1: a constant η trains as with a
    schedule, and a schedule that shortens steps lets ζ rise again. q is the hypergradient of Baydin
    et al. (2018) in units of the slope.

    A loss whose gradients do not shrink with its residuals (Huber's, a hinge) has less curvature
    than the Fisher matrix says, and steps are too short: the slope hardly changes along them. A
    step of η < 1 leaves a share 1 − η of it by intention; where less than 0.8 min(η, 1) is gone,
    lengths are stretched, ``ζ ← ζ exp(−κ(q − 0.8 min(η, 1) + 1))``, and shrink again by the same
    formula, down to 1.

    What a batch says of a length is right for it alone, too short where other batches agree with
    it, and too long where each has noise of its own. The next one, which did not choose v, tells:
    ``1 − ⟨v, g⟩/h`` times v would have been best for it, ``h = cvᵀF_b v`` with its own Fisher
    matrix. Of few samples in a network with many directions, v fits what is theirs alone, and that
    number is 10 or 100. So with the average q̄ of q over some 20 steps, its standard error e, the
    geometric average C of h/s over measurements, and ``β = min(η, 1)γ(1 − (q̄ + 2e)/C)``, the reach
    ρ grows by at most a factor of 2 a step, ``ρ ← ρ 2^{min(1, (β − 2)/(1 + e/C))}``, where β > 2,
    while more than half is left of what the loss can fall by. Later samples that are predicted with
    confidence show no curvature until they are crossed: ρ doubles where β > 3, and q̄ begins anew.
    It does not grow where weights bound the step. Where q̃ > 0 it falls again, down to 1:
    ``ρ ← ρ exp(−κ min(1, q̃/C))``. q̃ is q̄ but that, where steps get longer, what is left of earlier
    q is divided by as much: those of a warm-up say nothing against the length at its end. C is of
    steps as long as the present ones. Beyond q̄ = C/2 steps raise the losses of other batches. So
    where ``(q̄ − 2e)/C > 1/2`` and K does not fall, as at the start with many classes, ρ falls below
    1, ``ρ ← ρ exp(−κ min(1, (q̄ − 2e)/C − 1/2))``, and rises again, up to 1, by the same formula
    where ``(q̄ + 2e)/C < 1/2``.

    Nothing else shortens the steps of a constant rate. C − q is the share of its slope that the
    next batch has where a step begins, and r its average, so that ``r/C`` times the step would have
    been best for that batch. Where η has been the same for ten steps, ρ ≤ 1 falls towards
    ``ρ′ = ρr/(C(1 − 3C₁/2))``, with C₁ of a step as long as α, no faster than 1/t (Robbins & Monro
    1951), ``ρ ← max(ρ′, ρ(t/(t + 1))^{5κ})``, and rises as above, up to ρ′. Where batches agree, C₁
    is large, and going beyond the best does no harm: from C₁ = 2/3 on, ρ stays 1. Under a schedule
    what is best for the next batch is too short: steps that gain little now are worth more once
    they get shorter (Wu et al. 2018).

    Squared errors show which it is by the ratio ν of what is left to what has been explained
    (:class:`natgrad.RelativeDamping`): all lengths are multiplied by ``ν^{−p}``, or ``ν^{−0.4p}``
    where η has been the same for ten steps, with ν at least 0.01 and 2/N in batches of N. Steps
    beyond the minimum are usual for solvers of consistent equations (over-relaxation).

    Attributes:
        interval: Steps between measurements of K; some more are taken in the first interval. One
            costs a product with the batch's rows, and, unless curvature is updated at the same
            step, the backward pass that makes them.
        memory: Weight of the past in the averages of log K and log ⟨Δ, g⟩, below 1.
        start: γ at the first step, in (0, 1].
        growth: Factor on γ after a step that went well, at least 1.
        overshoot: The ratio of slopes q beyond which a step is taken back, were q not noisy;
            infinite for never.
        annealing: κ, how fast lengths follow q; 0 for never.
        lengthening: p, how much longer steps are where there is little noise, by at most a factor
            of 100^p, 3.2 by default, or 1.6 at constant learning rates; 0 for no longer.
        reach: Largest factor on ρ in a step where other batches want longer ones, at least 1; with
            1 it stays 1.

    Raises:
        ValueError: If an option is out of range.
    """

    interval: int = 20
    memory: float = 0.5
    start: float = 0.1
    growth: float = 1.5
    overshoot: float = 0.5
    annealing: float = 0.2
    lengthening: float = 0.25
    reach: float = 2.0

    def __post_init__(self) -> None:
        """Check the options."""
        check_integer("interval", self.interval)
        check_range("memory", self.memory, below=1.0)
        if not is_number(self.start) or not 0 < self.start <= 1:
            raise ValueError(f"start must be in (0, 1], got {self.start!r}")
        if not is_number(self.growth) or not 1 <= self.growth < math.inf:
            raise ValueError(f"growth must be finite and at least 1, got {self.growth!r}")
        if not is_number(self.overshoot) or not self.overshoot > 0:
            raise ValueError(f"overshoot must be positive, got {self.overshoot!r}")
        check_range("annealing", self.annealing)
        check_range("lengthening", self.lengthening)
        if not is_number(self.reach) or not 1 <= self.reach < math.inf:
            raise ValueError(f"reach must be finite and at least 1, got {self.reach!r}")

    def lengthened(self, noise: float, steady: bool = False) -> float:
        """Return the factor on lengths.

        Args:
            noise: The ratio of noise to signal, in [0, 1].
            steady: Whether the learning rate has been the same for some time, so that nothing makes
                long steps shorter later.
        """
        power = self.lengthening * (STEADY_LENGTHENING if steady else 1.0)
        return float(max(LEAST_NOISE, noise) ** -power)

    def is_due(self, step: int, refresh: Refresh, follows_updates: bool) -> bool:
        """Return whether K is measured at a step, counted from 0.

        Apart from the first steps, that is done where inverses are as most steps find them, made
        without the present batch; if possible where its rows are there for an update anyway.

        Args:
            step: The step.
            refresh: When curvature is updated and inverted.
            follows_updates: Whether inverses follow every update.
        """
        if step in EARLY_STEPS:
            return True
        free = refresh.factors < refresh.inverses and not follows_updates
        offset = refresh.factors if free else self.interval - 1
        return step % self.interval == offset % self.interval
