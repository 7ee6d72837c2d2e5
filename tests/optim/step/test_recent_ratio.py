"""A reach that grew in a warm-up falls as soon as the steps at its end go too far."""

from __future__ import annotations

import math

import pytest

from natgrad.optim.step.lengths import Lengths, LengthState
from natgrad.optim.step.measured_length import MeasuredLength

FIXED, ANNEALED = MeasuredLength(annealing=0.0, reach=1.0), MeasuredLength()


def answered(
    ratios: list[float], rates: list[float], rule: MeasuredLength = FIXED, reach: float = 1.0
) -> LengthState:
    """Return the state after steps at some rates, each with its ratio of slopes."""
    state = LengthState(log_bend=math.log(0.1), log_decrement=0.0, log_slope=0.0, reach=reach)
    for ratio, rate in zip(ratios, rates, strict=True):
        state = state.taken(rule, 1.0, rate)
        state = state.answered(rule, ratio, rate)
    return state


def test_of_steps_of_one_length_both_averages_are_the_same():
    state = answered([-0.3, 0.1, 0.2, -0.1, 0.05], [1.0] * 5)
    assert state.recent_ratio == pytest.approx(state.usual_ratio)


def test_of_steps_that_get_shorter_too():
    state = answered([0.3, 0.1, 0.2, 0.1, 0.05], [1.0, 0.8, 0.6, 0.4, 0.2])
    assert state.recent_ratio == pytest.approx(state.usual_ratio)


def test_a_ratio_of_steps_half_as_long_counts_half():
    state = answered([-0.4, 0.1], [0.5, 1.0])
    memory = 0.5 / 2
    assert state.recent_ratio == pytest.approx(memory * -0.4 + (1 - memory) * 0.1)
    assert state.usual_ratio == pytest.approx(-0.15)


def test_reach_falls_though_short_steps_before_were_too_short():
    ratios, rates = [-0.2] * 4 + [0.3, 0.3], [0.05, 0.1, 0.2, 0.4, 0.8, 1.5]
    state = answered(ratios, rates, ANNEALED, reach=2.0)
    assert state.usual_ratio < 0 < state.recent_ratio
    assert state.reach < answered(ratios[:-1], rates[:-1], ANNEALED, reach=2.0).reach


def test_it_is_in_checkpoints_and_those_of_before_are_read():
    state = answered([-0.4, 0.1], [0.5, 1.0])
    lengths = Lengths(ANNEALED, "KFAC", 1.5, 0.5)
    lengths.state = state
    saved = lengths.state_dict()
    assert lengths.with_state(saved).state == state
    del saved["state"]["recent_ratio"], saved["state"]["share_of_ratio"]
    assert lengths.with_state(saved).state.usual_ratio == state.usual_ratio
