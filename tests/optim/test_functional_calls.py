"""Functional calls of a watched model: parameters lent for one pass are no change of the model."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import natgrad
from tests.cases import normal


@pytest.mark.parametrize("kind", [natgrad.KFAC, natgrad.ExactNGD, natgrad.FNGD])
def test_a_functional_call_leaves_the_layers(kind):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = normal(8, 3), torch.zeros(8, dtype=torch.long)
    optimizer = kind(model)
    layers = dict(optimizer.preconditioner.curvature.parts)
    lent = {name: p.detach() + 1 for name, p in model.named_parameters()}
    lent["0.weight"].requires_grad_()
    inner = functional.cross_entropy(torch.func.functional_call(model, lent, (x,)), y)
    (gradient,) = torch.autograd.grad(inner, lent["0.weight"])
    assert gradient.any()
    assert optimizer.preconditioner.curvature.parts == layers
    optimizer.zero_grad()
    loss = functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    assert functional.cross_entropy(model(x), y) < loss
