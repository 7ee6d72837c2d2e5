"""A learning rate of another optimizer's script is told."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import natgrad
from tests.cases import normal


def train(optimizer: natgrad.KFAC, model: nn.Module, rates: list[float]) -> list[str]:
    x, y = normal(8, 3).float(), torch.arange(8) % 2
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for rate in rates:
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return [str(one.message) for one in caught]


@pytest.mark.parametrize(
    ("rates", "told"),
    [
        ([6e-4] * 230, True),
        ([1e-3 * min(1, n / 20) for n in range(1, 231)], True),
        ([6e-4] * 90, False),
        ([1.5 * 0.95**n for n in range(230)], False),
        ([n / 200 for n in range(1, 231)], False),
    ],
)
def test_rates_that_are_not_meant_for_it_are_told_once(rates, told):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    said = train(natgrad.KFAC(model), model, rates)
    assert [s for s in said if "are factors on a measured length" in s] == said
    assert len(said) == told
    if told:
        assert f"at most {max(rates[:100]):.2g}" in said[0]
        assert "default of 1.5" in said[0]


def test_a_rule_that_measures_no_length_takes_small_rates():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = natgrad.KFAC(model, lr=1.5, step_rule=natgrad.StepRule(length="lr"), damping=1e-2)
    assert train(optimizer, model, [1e-3] * 120) == []
