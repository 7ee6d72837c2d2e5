"""Momentum that a scheduler takes from other optimizers is told."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import natgrad

TOLD = "a scheduler has set the momentum"


def said(make_scheduler, steps=40, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = natgrad.KFAC(model, **options)
    scheduler = make_scheduler(optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            x = torch.randn(16, 3)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), (x[:, 0] > 0).long()).backward()
            optimizer.step()
            scheduler.step()
    return [str(one.message) for one in caught if TOLD in str(one.message)]


def one_cycle(**options):
    return lambda o: lr_scheduler.OneCycleLR(o, max_lr=1.5, total_steps=100, **options)


def test_momentum_of_a_cycle_is_told_once():
    assert len(said(one_cycle())) == 1


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        (one_cycle(cycle_momentum=False), {}),
        (one_cycle(base_momentum=0.3, max_momentum=0.6), {}),
        (one_cycle(cycle_momentum=False), {"momentum": 0.95}),
        (lambda o: lr_scheduler.CosineAnnealingLR(o, 50), {"params": [
            {"params": "0.*", "momentum": 0.9}
        ]}),
        (one_cycle(), {"step_rule": natgrad.StepRule(length="lr"), "damping": 1e-2, "lr": 0.1}),
    ],
)  # fmt: skip
def test_what_was_asked_for_is_not(scheduler, options):
    assert said(scheduler, **options) == []
