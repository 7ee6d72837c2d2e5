"""Every learning-rate scheduler of PyTorch does to natgrad what it does to SGD."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler, swa_utils

from tests.ecosystem.loops import OPTIMIZERS, batches, flat, make, network, train

LR = 0.1

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.9**t),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.3, 2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.3, total_iters=3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 9),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.2, 2, base_momentum=0.5),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=8),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)],
        milestones=[2],
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.05, anneal_epochs=3),
}


def test_no_scheduler_is_missing():
    found = {
        name
        for name, item in vars(lr_scheduler).items()
        if inspect.isclass(item)
        and issubclass(item, lr_scheduler.LRScheduler)
        and name not in ("LRScheduler", "_LRScheduler")
    }
    assert found <= set(SCHEDULERS)


def advance(scheduler: Any, metric: float) -> None:
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(metric)
    else:
        scheduler.step()


def settings(optimizer: Any) -> list[tuple[float, float]]:
    return [(g["lr"], g["momentum"]) for g in optimizer.param_groups]


@pytest.mark.parametrize("optimizer_name", list(OPTIMIZERS))
@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_rates_and_momenta_follow_the_schedule(name, optimizer_name):
    """The step moves each parameter by rate times momentum buffer, with the schedule's values."""
    model, twin = network(), network()
    optimizer = make(optimizer_name, model, lr=LR, kl_clip=None, nesterov=False)
    sgd = torch.optim.SGD(twin.parameters(), lr=LR, momentum=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedules = [SCHEDULERS[name](o) for o in (optimizer, sgd)]
        for index, batch in enumerate(batches(8)):
            assert settings(optimizer) == settings(sgd)
            rate = optimizer.param_groups[0]["lr"]
            before = flat(model)
            train(model, optimizer, [batch])
            buffers = [optimizer.state[p]["momentum_buffer"].flatten() for p in model.parameters()]
            torch.testing.assert_close(before - flat(model), rate * torch.cat(buffers))
            sgd.step()
            for schedule in schedules:
                advance(schedule, float(index))


@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_schedules_resume(name):
    """State dicts of optimizer and scheduler together continue the run to the last bit."""
    data = batches(8)
    runs = []
    for cut in (None, 4):
        model = network()
        optimizer = make("kfac", model, lr=LR)
        schedule = SCHEDULERS[name](optimizer)
        for index, batch in enumerate(data):
            if index == cut:
                saved = optimizer.state_dict(), schedule.state_dict()
                other = network(seed=7)
                other.load_state_dict(model.state_dict())
                model = other
                optimizer = make("kfac", model, lr=LR, seed=5)
                schedule = SCHEDULERS[name](optimizer)
                optimizer.load_state_dict(saved[0])
                schedule.load_state_dict(saved[1])
                if name in ("SequentialLR", "ChainedScheduler"):
                    optimizer.load_state_dict(saved[0])  # Their making sets rates anew.
            train(model, optimizer, [batch])
            advance(schedule, float(index))
        runs.append(flat(model))
    assert torch.equal(*runs)


class WithRecurrence(nn.Module):
    """Its recurrent layer, random by dropout, is trained by the fallback."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 4, 2, dropout=0.2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x[:, 0])[0][:, -1])


@pytest.mark.parametrize("fallback", ["adamw", "sgd"])
@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_fallback_groups_are_scheduled_too(name, fallback):
    torch.manual_seed(0)
    model = WithRecurrence().double()
    with pytest.warns(UserWarning, match="lstm"):
        optimizer = make("kfac", model, fallback=fallback)
    schedule = SCHEDULERS[name](optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for index, batch in enumerate(batches(6)):
            before = flat(model)
            train(model, optimizer, [batch])
            assert not torch.equal(before, flat(model))
            advance(schedule, float(index))
    assert flat(model).isfinite().all()
