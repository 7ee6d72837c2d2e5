"""Options of a group that are not given are those of the optimizer."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
from torch import nn

import natgrad
from natgrad import KFAC, LineSearch, MeasuredLength, NaturalGradient, Refresh, StepRule


def make(kind: Any = KFAC, **options: Any) -> Any:
    return kind(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), **options)


@pytest.mark.parametrize("kind", [KFAC, natgrad.SINGD, natgrad.UnitWiseNGD])
def test_a_refresh_changes_what_it_gives(kind: Any) -> None:
    own = kind.method.refresh
    assert make(kind, refresh=Refresh(inverses=7)).preconditioner.refresh == replace(
        own, inverses=7
    )
    assert make(kind, refresh=Refresh(3)).preconditioner.refresh == replace(own, factors=3)
    assert make(kind, refresh=Refresh()).preconditioner.refresh == own


def test_values_that_are_defaults_of_the_group_count_where_they_are_given() -> None:
    every_step = Refresh(factors=1, inverses=1, decay=0.0)
    assert make(refresh=every_step).preconditioner.refresh.every_step
    rule = StepRule(length="lr", nesterov=True)
    assert make(lr=0.1, step_rule=rule).step_rule == rule


@pytest.mark.parametrize("rule", [StepRule(norm_clip=1.0), StepRule(weight_decay_mode="model")])
def test_a_step_rule_keeps_measured_lengths(rule: StepRule) -> None:
    made = make(step_rule=rule)
    assert made.step_rule == replace(rule, length=MeasuredLength())
    assert make(NaturalGradient, step_rule=rule).step_rule == rule


def test_options_that_exclude_each_other_are_held_against_what_results() -> None:
    with pytest.raises(ValueError, match="does not take nesterov=True"):
        make(step_rule=StepRule(nesterov=True))
    assert make(refresh=Refresh(warmup=10)).preconditioner.refresh.warmup == 10
    for kind in (NaturalGradient, natgrad.Preconditioner):
        with pytest.raises(ValueError, match="warmup must be 0, or positive with decay > 0"):
            make(kind, refresh=Refresh(warmup=10))
    with pytest.raises(ValueError, match="warmup must be 0, or positive with decay > 0"):
        Refresh(warmup=10, decay=0.0)


def test_the_rate_of_measured_lengths_is_no_length() -> None:
    with pytest.raises(ValueError, match=r"KFAC's lr of 1\.5 is a factor on measured lengths"):
        make(step_rule=StepRule(length="lr"))
    assert make(lr=1.5, step_rule=StepRule(length="lr")).step_rule.measured is None
    assert make(step_rule=StepRule(length=LineSearch())).step_rule.search == LineSearch()


def test_isotropic_rates_take_the_place_of_measured_lengths_unless_these_are_asked_for() -> None:
    assert make(lr="isotropic", step_rule=StepRule(norm_clip=1.0)).step_rule.length == "lr"
    with pytest.raises(ValueError, match="lr='isotropic' is the length"):
        make(lr="isotropic", step_rule=StepRule(length=MeasuredLength()))


def test_what_is_given_is_shown_and_survives_copies() -> None:
    rule = Refresh(20, decay=0.5)
    assert repr(rule) == "Refresh(factors=20, decay=0.5)"
    for other in (copy.deepcopy(rule), pickle.loads(pickle.dumps(rule))):
        assert other == rule
        assert repr(other) == repr(rule)
    assert "early=True" in repr(make(refresh=rule).preconditioner.refresh)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        Refresh(interval=3)  # type: ignore[call-arg]


@pytest.mark.parametrize("kind", [KFAC, natgrad.ExactNGD, natgrad.SINGD, natgrad.EGN])
def test_a_method_takes_its_own_structure_by_name(kind: Any) -> None:
    own = make(kind).preconditioner.curvature.structure
    assert make(kind, structure=own.name).preconditioner.curvature.structure == own
    wanted = f"{kind.__name__} must be '{own.name}' or a {type(own).__name__}, got 'diagonal'"
    with pytest.raises(TypeError, match=wanted):
        make(kind, structure="diagonal")
