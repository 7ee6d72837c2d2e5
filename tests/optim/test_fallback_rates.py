"""How fast the fallback trains what turns out to have no rows, or not those of its gradient."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import natgrad


class Scaled(nn.Module):
    """A classifier beside a head and a number that its output does not depend on."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.label = nn.Linear(6, 10), nn.Linear(10, 3)
        self.value, self.offset = nn.Linear(10, 1), nn.Parameter(torch.zeros(()))

    def forward(self, x):
        h = torch.tanh(self.body(x))
        return self.label(h), self.value(h)


def moves(seen=True, scheduled=1.0, **options):
    """Return the first change of every parameter, AdamW's rate apart from its decay."""
    torch.manual_seed(1)
    model, x, y = Scaled(), torch.randn(32, 6), torch.randint(0, 3, (32,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = natgrad.KFAC(model, weight_decay=0.0, **options)
        for group in optimizer.param_groups:
            group["lr"] *= scheduled
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        if seen:
            label, value = model(x)
        else:  # By its parts.
            h = torch.tanh(model.body(x))
            label, value = model.label(h), model.value(h)
        loss = F.cross_entropy(label, y) + (value - 3.0 + model.offset).square().mean()
        loss.backward()
        optimizer.step()
    decayed = {name: p * (1 - 1e-5) for name, p in before.items()}
    parameters = dict(model.named_parameters())
    return {n: float((p.detach() - decayed[n]).abs().max()) for n, p in parameters.items()}


def test_vectors_are_trained_faster_than_matrices():
    found = moves()
    assert found["offset"] == pytest.approx(1e-2, rel=0.01)
    assert found["value.bias"] == pytest.approx(1e-2, rel=0.01)
    assert found["value.weight"] == pytest.approx(3e-3, rel=0.01)


def test_they_follow_the_schedule_of_their_group():
    found = moves(scheduled=0.1)
    assert found["offset"] == pytest.approx(1e-3, rel=0.01)
    assert found["value.weight"] == pytest.approx(3e-4, rel=0.02)


def test_a_rate_that_is_given_is_that_of_all():
    found = moves(fallback=natgrad.Fallback("adamw", 5e-3))
    assert found["offset"] == pytest.approx(5e-3, rel=0.01)
    assert found["value.weight"] == pytest.approx(5e-3, rel=0.01)


def test_where_no_pass_is_seen_adamw_trains_all_at_its_own_rate():
    found = moves(seen=False)
    assert all(move == pytest.approx(1e-3, rel=0.03) for move in found.values())


def test_a_number_outside_of_the_output_gets_where_it_has_to():
    """As the partition function of a flow network, the dispersion of counts or a log-deviation."""
    torch.manual_seed(0)
    model = Scaled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = natgrad.KFAC(model)
        for _ in range(150):
            x = torch.randn(32, 6)
            label, _ = model(x)
            optimizer.zero_grad()
            (F.cross_entropy(label, x[:, :3].argmax(1)) + (model.offset - 1.0).square()).backward()
            optimizer.step()
    assert float(model.offset.detach()) == pytest.approx(1.0, abs=0.1)
