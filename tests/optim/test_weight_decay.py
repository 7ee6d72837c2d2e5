"""Decoupled weight decay: by the scheduled rate, and for those parameters that are meant."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

import natgrad
from tests.optim.every_optimizer import KINDS, STEPS, make_model

NAMES = [n for n in STEPS if KINDS[n].is_natural and not KINDS[n].needs_closure]
DECAY = 0.1


def schedule(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    """Warm up and decay."""
    shares = (0.2, 0.6, 1.0, 0.5, 0.1)
    return lr_scheduler.LambdaLR(optimizer, lambda step: shares[min(step, 4)])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore")
def test_decay_follows_the_schedule(name):
    """A step with it is the step without it, less ηw of the weights; biases may be left out."""
    model = make_model()
    biases = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": biases, "weight_decay": 0.0}]
    optimizer = KINDS[name].make(model, weight_decay=DECAY, params=groups)
    scheduler = schedule(optimizer)
    rates = []
    for _ in range(4):
        twin, other = copy.deepcopy((model, optimizer))
        for group in other.param_groups:
            group["weight_decay"] = 0.0
        before = [p.detach().clone() for p in model.parameters()]
        rates.append(optimizer.param_groups[-1]["lr"])
        for net, stepper in ((model, optimizer), (twin, other)):
            KINDS[name].step(stepper, net)
        for p, q, start in zip(model.parameters(), twin.parameters(), before, strict=True):
            share = rates[-1] * DECAY if p.ndim > 1 else 0.0
            torch.testing.assert_close(p, q - share * start, rtol=1e-11, atol=1e-13)
        scheduler.step()
    assert rates == pytest.approx([rates[2] * share for share in (0.2, 0.6, 1.0, 0.5)])


class Part(nn.Module):
    """A network with a table that has no rows, and a scale that is trained by a term of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 5, scale_grad_by_freq=True).double()
        self.net = make_model()
        self.scale = nn.Parameter(torch.ones(3).double())

    def forward(self, indices: Tensor) -> Tensor:
        return self.net(self.table(indices))


@pytest.mark.parametrize("excluded", [True, False])
@pytest.mark.filterwarnings("ignore:.*trains these parameters by adamw")
def test_the_fallback_decays_nothing_that_a_group_excludes(excluded):
    """Else AdamW trains as it does by itself, whatever has no rows, from the start or later on."""
    model = Part()
    groups = [{"params": ["scale", "table.*", "*bias"], "weight_decay": 0.0}]
    optimizer = natgrad.KFAC(
        model, "gaussian", weight_decay=DECAY, params=groups if excluded else None,
        fallback=natgrad.Fallback(lr=1e-3),
    )  # fmt: skip
    twin = copy.deepcopy(model)
    ours, others = ([net.scale, net.table.weight] for net in (model, twin))
    decay = {"weight_decay": 0.0} if excluded else {}
    adamw = torch.optim.AdamW(others, lr=1e-3, **decay)
    for _ in range(3):
        optimizer.zero_grad()
        output = model(torch.tensor([0, 1, 1, 3]))
        term = model.scale @ torch.tensor([3.0, -5.0, 8.0]).double()
        (output.square().sum(1).mean() + term).backward()
        for p, q in zip(ours, others, strict=True):
            q.grad = p.grad.clone()
        optimizer.step()
        adamw.step()
        for p, q in zip(ours, others, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
