"""Entries of gradients that the user sets to zero stay where they are."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import natgrad

FROZEN = 5  # Rows of the middle layer.


def network(activation=nn.Tanh):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 12), activation(), nn.Linear(12, 12), activation(), nn.Linear(12, 3)
    )


def batches(steps):
    torch.manual_seed(1)
    return [(torch.randn(32, 6), torch.randint(0, 3, (32,))) for _ in range(steps)]


def mask():
    kept = torch.ones(12, 12)
    kept[:FROZEN] = 0
    kept[8, ::2] = 0  # No row, and no column either.
    return kept


def train(model, optimizer, steps, change=lambda step: None):
    for step, (x, y) in enumerate(batches(steps)):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        change(step)
        optimizer.step()


def by_hook(weight):
    weight.register_hook(lambda gradient: gradient * mask())
    return lambda step: None


def in_place(weight):
    def change(step):
        weight.grad.mul_(mask())

    return change


def replaced(weight):
    def change(step):
        weight.grad = weight.grad * mask()

    return change


@pytest.mark.parametrize("how", [by_hook, in_place, replaced])
@pytest.mark.parametrize("kind", [natgrad.KFAC, natgrad.EKFAC, natgrad.ExactNGD])
def test_entries_without_gradient_do_not_move(how, kind):
    model = network()
    weight = model[2].weight
    before, change = weight.detach().clone(), how(weight)
    train(model, kind(model), 25, change)
    moved = weight.detach() - before
    assert torch.equal(moved[mask() == 0], torch.zeros(int((mask() == 0).sum())))
    assert (moved[mask() == 1] != 0).all()


def test_entries_that_lose_their_gradient_later_do_not_move_from_then_on():
    model = network()
    weight, start = model[2].weight, 7
    held = []

    def change(step):
        if step >= start:
            weight.grad *= mask()
        if step == start:
            held.append(weight.detach().clone())

    # Momentum goes on, and a step before may be taken back.
    train(model, natgrad.KFAC(model, lr=0.2, momentum=0.0), 25, change)
    moved = weight.detach() - held[0]
    assert not moved[mask() == 0].any()
    assert (moved[mask() == 1] != 0).all()


def test_a_hook_that_comes_later_is_seen_at_once():
    model = network()
    weight, start = model[2].weight, 7
    held = []

    def change(step):
        if step == start - 1:  # Its gradient is there.
            weight.register_hook(lambda gradient: gradient * mask())
        if step == start:
            held.append(weight.detach().clone())

    train(model, natgrad.KFAC(model, lr=0.2, momentum=0.0), 25, change)
    assert not (weight.detach() - held[0])[mask() == 0].any()


def test_gradients_that_are_zero_by_themselves_change_nothing(
    monkeypatch,
):
    def trained(looks):
        model = network(nn.ReLU)
        with torch.no_grad():
            model[0].bias[:4] = -20.0  # Units that no sample reaches.
        optimizer = natgrad.KFAC(model)
        if not looks:

            def unchanged(directions, gradients, flags):
                return dict(directions)

            monkeypatch.setattr(optimizer.preconditioner.zeroed, "held", unchanged)
        train(model, optimizer, 25)
        return list(model.parameters())

    pairs = zip(trained(True), trained(False), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_clipped_and_unscaled_gradients_are_none_of_these():
    model = network(nn.ReLU)
    with torch.no_grad():
        model[0].bias[:4] = -20.0
    optimizer = natgrad.KFAC(model)

    def change(step):
        for parameter in model.parameters():
            parameter.grad.mul_(1e-3)
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)

    train(model, optimizer, 22, change)
    assert not optimizer.preconditioner.zeroed.names


def test_a_preconditioner_leaves_them_at_zero():
    model = network()
    preconditioner = natgrad.Preconditioner(model)
    x, y = batches(1)[0]
    F.cross_entropy(model(x), y).backward()
    gradient = model[2].weight.grad
    gradient *= mask()
    preconditioner.step()
    natural = model[2].weight.grad
    assert torch.equal(natural == 0, mask() == 0)


def test_they_are_known_after_a_first_step_that_is_skipped():
    model = network()
    weight = model[2].weight
    before = weight.detach().clone()

    def change(step):
        weight.grad *= mask()
        if step == 0:
            model[0].weight.grad[0, 0] = float("nan")

    with pytest.warns(UserWarning, match="skipped a step"):
        train(model, natgrad.KFAC(model), 6, change)
    assert not (weight.detach() - before)[mask() == 0].any()


def test_what_is_known_of_them_is_in_checkpoints():
    model = network()
    weight = model[2].weight
    optimizer = natgrad.KFAC(model)
    train(model, optimizer, 2, in_place(weight))
    twin = copy.deepcopy(model)
    other = natgrad.KFAC(twin)
    other.load_state_dict(optimizer.state_dict())
    assert other.preconditioner.zeroed.names == {"2.weight"}


def test_no_hook_stays_on_parameters_between_steps():
    model = network()
    train(model, natgrad.KFAC(model), 3)
    assert not any(parameter._backward_hooks for parameter in model.parameters())
