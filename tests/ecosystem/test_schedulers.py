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

import natgrad
from tests.ecosystem.loops import (
    batches,
    cross_entropy,
    make,
    perceptron,
    train,
)
from tests.methods import make_optimizer
from tests.state import flat

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


#: What they do to the step is code that all methods share.
SOME = ("CyclicLR", "ReduceLROnPlateau", "SequentialLR")
PAIRS = [(s, "kfac") for s in SCHEDULERS] + [
    (s, o) for s in SOME for o in ("singd", "exact", "conjugate_gradient")
]


@pytest.mark.parametrize(("name", "optimizer_name"), PAIRS)
def test_rates_and_momenta_follow_the_schedule(name, optimizer_name):
    """The step moves each parameter by rate times momentum buffer, with the schedule's values."""
    model, twin = perceptron(), perceptron()
    optimizer = make(optimizer_name, model, lr=LR, kl_clip=None, nesterov=False)
    sgd = torch.optim.SGD(twin.parameters(), lr=LR, momentum=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "The epoch parameter in")  # SequentialLR of torch 2.6.
        schedules = [SCHEDULERS[name](o) for o in (optimizer, sgd)]
        for index, batch in enumerate(batches(6)):
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
def test_padam_is_scheduled_as_adam_is(name):
    model = perceptron()
    optimizers = natgrad.Padam(model.parameters(), lr=LR), torch.optim.Adam(model.parameters(), LR)
    schedules = [SCHEDULERS[name](o) for o in optimizers]
    for index, batch in enumerate(batches(6)):
        groups = [o.param_groups[0] for o in optimizers]
        assert groups[0]["lr"] == groups[1]["lr"]
        assert groups[0]["betas"] == groups[1]["betas"]
        before = flat(model)
        train(model, optimizers[0], [batch])
        moved = []
        for p in model.parameters():
            state = optimizers[0].state[p]
            moved.append(state["momentum"] / (state["largest_second_moment"] ** 0.125 + 1e-8))
        rate = groups[0]["lr"]
        expected = rate * torch.cat([m.flatten() for m in moved])
        torch.testing.assert_close(before - flat(model), expected)
        optimizers[1].step()
        for schedule in schedules:
            advance(schedule, float(index))


@pytest.mark.parametrize("name", [n for n in SCHEDULERS if n not in ("CyclicLR", "OneCycleLR")])
def test_the_first_length_of_a_line_search_follows_the_schedule(name):
    """Where the first length is taken, the step is that of exact natural gradient descent."""
    searching, exact = perceptron(), perceptron()
    optimizers = (
        make_optimizer(natgrad.EGN, searching, lr=LR, damping=0.1, max_trials=1),
        natgrad.ExactNGD(exact, lr=LR, damping=0.1, kl_clip=None),
    )
    schedules = [SCHEDULERS[name](o) for o in optimizers]
    for index, batch in enumerate(batches(5)):
        assert optimizers[0].param_groups[0]["lr"] == optimizers[1].param_groups[0]["lr"]
        optimizers[0].step(lambda b=batch: cross_entropy(searching, b))
        train(exact, optimizers[1], [batch])
        torch.testing.assert_close(flat(searching), flat(exact), rtol=1e-9, atol=1e-12)
        for schedule in schedules:
            advance(schedule, float(index))


RESUMED = [("kfac", s) for s in SCHEDULERS]
RESUMED += [(o, "OneCycleLR") for o in ("exact", "conjugate_gradient", "thermodynamic")]


@pytest.mark.parametrize(("method", "name"), RESUMED)
def test_schedules_resume(method, name):
    """State dicts of optimizer and scheduler together continue the run to the last bit."""
    data = batches(6)
    runs = []
    for cut in (None, 3):
        model = perceptron()
        optimizer = make(method, model, lr=LR)
        schedule = SCHEDULERS[name](optimizer)
        for index, batch in enumerate(data):
            if index == cut:
                saved = optimizer.state_dict(), schedule.state_dict()
                other = perceptron(seed=7)
                other.load_state_dict(model.state_dict())
                model = other
                optimizer = make(method, model, lr=LR, seed=5)
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


@pytest.mark.parametrize(
    ("name", "fallback"), [(s, "adamw") for s in SCHEDULERS] + [(s, "sgd") for s in SOME]
)
def test_fallback_groups_are_scheduled_too(name, fallback):
    torch.manual_seed(0)
    model = WithRecurrence().double()
    with pytest.warns(UserWarning, match="lstm"):
        optimizer = make("kfac", model, fallback=fallback)
    schedule = SCHEDULERS[name](optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "The epoch parameter in")  # SequentialLR of torch 2.6.
        for index, batch in enumerate(batches(4)):
            before = flat(model)
            train(model, optimizer, [batch])
            assert not torch.equal(before, flat(model))
            advance(schedule, float(index))
    assert flat(model).isfinite().all()
