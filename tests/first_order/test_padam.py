"""Padam against its formula, AMSGrad and SGD."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from natgrad import Padam
from tests.cases import normal


def problem() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return (
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double(),
        normal(8, 4),
        normal(8, 2, seed=1),
    )


def steps(model, optimizer, x, y, count=6) -> list[float]:
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


@pytest.mark.parametrize("partial", [0.0, 0.125, 0.3, 0.5])
def test_steps_follow_the_formula(partial):
    model, x, y = problem()
    theta = [p.detach().clone() for p in model.parameters()]
    m = [torch.zeros_like(p) for p in theta]
    v = [torch.zeros_like(p) for p in theta]
    top = [torch.zeros_like(p) for p in theta]
    reference = copy.deepcopy(model)
    for _ in range(5):
        with torch.no_grad():
            for p, value in zip(reference.parameters(), theta, strict=True):
                p.copy_(value)
        reference.zero_grad()
        (reference(x) - y).square().mean().backward()
        for i, p in enumerate(reference.parameters()):
            g = p.grad
            m[i] = 0.8 * m[i] + 0.2 * g
            v[i] = 0.95 * v[i] + 0.05 * g * g
            top[i] = torch.maximum(top[i], v[i])
            theta[i] = (1 - 0.01 * 0.1) * theta[i] - 0.01 * m[i] / (top[i] ** partial + 1e-6)
    optimizer = Padam(model.parameters(), 0.01, (0.8, 0.95), partial, 1e-6, weight_decay=0.1)
    steps(model, optimizer, x, y, 5)
    for p, value in zip(model.parameters(), theta, strict=True):
        torch.testing.assert_close(p.detach(), value, rtol=1e-10, atol=1e-12)


def test_power_one_half_is_amsgrad_without_bias_correction():
    """With m and v scaled back by their corrections the first step is Adam's."""
    model, x, y = problem()
    other = copy.deepcopy(model)
    adam = torch.optim.Adam(other.parameters(), 1e-3, (0.9, 0.999), eps=0.0, amsgrad=True)
    # Corrections of the first step: m̂ = m/(1 − β₁), v̂ = v/(1 − β₂).
    lr = 1e-3 * (1 - 0.999) ** 0.5 / (1 - 0.9)
    padam = Padam(model.parameters(), lr, (0.9, 0.999), 0.5, eps=0.0)
    steps(model, padam, x, y, 1)
    steps(other, adam, x, y, 1)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_power_zero_is_gradient_descent_with_an_averaged_gradient():
    model, x, y = problem()
    other = copy.deepcopy(model)
    padam = Padam(model.parameters(), 0.1, (0.9, 0.999), 0.0, eps=0.0)
    steps(model, padam, x, y, 1)
    # The average starts from zero, so its first value is a tenth of the gradient.
    steps(other, torch.optim.SGD(other.parameters(), 0.01), x, y, 1)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_defaults_train_and_state_resumes():
    model, x, y = problem()
    optimizer = Padam(model.parameters())
    losses = steps(model, optimizer, x, y, 60)
    assert losses[-1] < 0.5 * losses[0]
    other = copy.deepcopy(model)
    resumed = Padam(other.parameters())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert steps(model, optimizer, x, y, 3) == steps(other, resumed, x, y, 3)


def test_closures_frozen_parameters_and_wrong_input():
    model, x, y = problem()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    optimizer = Padam(model.parameters(), 0.05)

    def closure() -> float:
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return float(loss)

    assert optimizer.step(closure) > optimizer.step(closure)
    assert torch.equal(model[0].weight, before)
    bad = ({"partial": 0.6}, {"partial": -0.1}, {"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": -1.0})
    for options in bad:
        with pytest.raises(ValueError):
            Padam(model.parameters(), **options)
