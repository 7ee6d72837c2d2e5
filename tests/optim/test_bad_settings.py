"""Settings nobody should choose, and data nobody should have: training must not blow up.

After 60 steps on a tiny task parameters are finite and the loss is at most 1.5 times what it was at
the start. Where that cannot be, a warning has named the cause.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from natgrad import MeasuredLength, Refresh, RelativeDamping, StepRule
from natgrad.fisher import MonteCarloFisher
from tests.cases import generator

STEPS = 60
SAMPLES = 64

Data = tuple[Tensor, Tensor]


def classes(seed: int = 0) -> Data:
    """Return three overlapping classes in six dimensions."""
    y = torch.arange(SAMPLES) % 3
    centres = torch.randn(3, 6, generator=generator(1))
    return centres[y] + torch.randn(SAMPLES, 6, generator=generator(2 + seed)), y


def curve() -> Data:
    x = torch.randn(SAMPLES, 6, generator=generator(1))
    return x, torch.stack([x[:, 0].sin() + x[:, 1], x[:, 2] * x[:, 3]], dim=1)


def network(outputs: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, outputs)
    )


def half_square(z: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (z - y).square().sum() / len(z)


def binary(z: Tensor, y: Tensor) -> Tensor:
    targets = functional.one_hot(y, 3).to(z.dtype)
    return functional.binary_cross_entropy_with_logits(z, targets, reduction="sum") / len(z)


@dataclass(frozen=True)
class Setting:
    """What is wrong.

    Attributes:
        options: Options of the optimizer.
        regression: Whether the task is one, or classification.
        spoil: Changes the data.
        spoil_model: Changes the network.
        spoil_batch: Changes the batch of a step.
        batch: Samples per step.
        factor: What the loss is multiplied by.
        schedule: What the rate is multiplied by at a step.
        loss: Instead of the likelihood's own.
        likelihood: What the optimizer is told.
        clip: Bound on the norm of gradients.
    """

    options: dict[str, Any] = field(default_factory=dict)
    regression: bool = False
    spoil: Callable[[Tensor, Tensor], Data] = lambda x, y: (x, y)
    spoil_model: Callable[[nn.Sequential], None] = lambda model: None
    spoil_batch: Callable[[int, Tensor], Tensor] = lambda step, x: x
    batch: int = 16
    factor: float = 1.0
    schedule: Callable[[int], float] | None = None
    loss: Callable[[Tensor, Tensor], Tensor] | None = None
    likelihood: Any = None
    clip: float | None = None


def of(**options: Any) -> Setting:
    return Setting(options)


def scale_weights(factor: float, *layers: int) -> Callable[[nn.Sequential], None]:
    def spoil(model: nn.Sequential) -> None:
        for layer in layers or (0, 2, 4):
            model[layer].weight.mul_(factor)

    return spoil


def kill_units(model: nn.Sequential) -> None:
    model[0].bias.fill_(-100.0)


def kill_most_units(model: nn.Sequential) -> None:
    model[0].bias[:10].fill_(-100.0)


def zero_all(model: nn.Sequential) -> None:
    for p in model.parameters():
        p.zero_()


def doubled(x: Tensor, y: Tensor) -> Data:
    return torch.cat([x[:, :3], x[:, :3]], dim=1), y


def broken(*steps: int, value: float = math.nan) -> Callable[[int, Tensor], Tensor]:
    def spoil(step: int, x: Tensor) -> Tensor:
        return torch.full_like(x, value) if step in steps else x

    return spoil


def noise(x: Tensor, y: Tensor) -> Data:
    return x, torch.randint(0, 3, y.shape, generator=generator(5))


SETTINGS: dict[str, Setting] = {
    "nothing": Setting(),
    "nothing, regression": Setting(regression=True),
    # The rate, and what else is a factor of steps.
    "lr 10": of(lr=10.0),
    "lr 1e-6": of(lr=1e-6),
    "lr 1000, regression": Setting({"lr": 1000.0}, regression=True),
    "momentum 0.99": of(momentum=0.99),
    "momentum 0.99, lr 10": of(momentum=0.99, lr=10.0),
    "weight decay 0.1": of(weight_decay=0.1),
    "model weight decay 1": of(weight_decay=1.0, weight_decay_mode="model"),
    # Damping.
    "absolute damping 1e-12": of(damping=1e-12),
    "absolute damping 10": of(damping=10.0),
    "absolute damping 1e-12, regression": Setting({"damping": 1e-12}, regression=True),
    "relative damping 1e-6": of(damping=RelativeDamping(1e-6)),
    "relative damping 1e6": of(damping=RelativeDamping(1e6)),
    # Curvature that is old, or poor.
    "intervals 1000": of(refresh=Refresh(factors=1000, inverses=1000, decay=0.95, early=False)),
    "intervals 1000, early": of(refresh=Refresh(1000, 1000, decay=0.95, early=True)),
    "inverses 1000": of(refresh=Refresh(factors=1, inverses=1000, decay=0.95, early=False)),
    "every step, no average": of(refresh=Refresh(factors=1, inverses=1, decay=0.0)),
    "staggered": of(refresh=Refresh(2, 7, decay=0.5, early=False, stagger=True)),
    "one label sampled": of(fisher=MonteCarloFisher(samples=1)),
    "empirical": of(fisher="empirical"),
    # Measurements.
    "measured once in 1000": of(interval=1000),
    "no caution": of(start=1.0, growth=1e6),
    "no memory": of(memory=0.0),
    "never taken back": of(overshoot=math.inf),
    "tiny start": of(start=1e-9),
    # Batches.
    "two samples": Setting(batch=2),
    "one sample, regression": Setting(batch=1, regression=True),
    "one sample, momentum 0.99": Setting({"momentum": 0.99}, batch=1),
    # The scale of the loss and the data.
    "loss 1e6": Setting(factor=1e6),
    "loss 1e-6": Setting(factor=1e-6),
    "loss 1e6, regression": Setting(factor=1e6, regression=True),
    "loss 1e-6, regression": Setting(factor=1e-6, regression=True),
    "targets 1000": Setting(spoil=lambda x, y: (x, 1000 * y), regression=True),
    "targets far off": Setting(spoil=lambda x, y: (x, y + 1e4), regression=True),
    "inputs 1000": Setting(spoil=lambda x, y: (1000 * x, y)),
    "inputs 1000, regression": Setting(spoil=lambda x, y: (1000 * x, y), regression=True),
    "inputs 1e-3": Setting(spoil=lambda x, y: (1e-3 * x, y)),
    "inputs far off": Setting(spoil=lambda x, y: (x + 1000, y)),
    "wrong scale of the likelihood": Setting(
        regression=True, likelihood=natgrad.likelihoods.Gaussian(variance=1e-4)
    ),
    "wrong likelihood": Setting(loss=binary, likelihood="gaussian"),
    "mean over outputs": Setting(loss=functional.mse_loss, regression=True),
    "gradients clipped to 1e-3": Setting(clip=1e-3),
    # Weights.
    "weights 10": Setting(spoil_model=scale_weights(10.0)),
    "weights 10, regression": Setting(spoil_model=scale_weights(10.0), regression=True),
    "weights 0.01": Setting(spoil_model=scale_weights(0.01)),
    "first weights 100": Setting(spoil_model=scale_weights(100.0, 0)),
    "last weights 100": Setting(spoil_model=scale_weights(100.0, 4)),
    "weights zero": Setting(spoil_model=zero_all),
    "dead layer": Setting(spoil_model=kill_units),
    "dead units": Setting(spoil_model=kill_most_units),
    # Data that tell little, or lie.
    "features twice": Setting(spoil=doubled),
    "features constant": Setting(spoil=lambda x, y: (torch.ones_like(x), y)),
    "features zero": Setting(spoil=lambda x, y: (torch.zeros_like(x), y)),
    "targets constant": Setting(spoil=lambda x, y: (x, torch.ones_like(y)), regression=True),
    "one class": Setting(spoil=lambda x, y: (x, torch.zeros_like(y))),
    "labels are noise": Setting(spoil=noise),
    "labels are noise, two samples": Setting(spoil=noise, batch=2),
    "one batch NaN": Setting(spoil_batch=broken(17)),
    "first batch NaN": Setting(spoil_batch=broken(0)),
    "two batches infinite": Setting(spoil_batch=broken(17, 18, value=math.inf)),
    "one batch 1e4": Setting(spoil_batch=lambda step, x: 1e4 * x if step == 17 else x),
}

#: Those for methods that share most of their parts, and rates and scales of losses, with K-FAC.
SOME = [
    "momentum 0.99, lr 10", "absolute damping 1e-12", "relative damping 1e-6", "intervals 1000",
    "two samples", "targets 1000", "inputs 1000", "weights 10", "dead layer", "labels are noise",
    "one batch NaN",
]  # fmt: skip
#: Those for methods whose steps are those of another one of them but for the factors.
FEW = ["momentum 0.99, lr 10", "intervals 1000", "weights 10", "one batch NaN"]
#: What is not claimed: cross-entropy does end higher there.
NOT_CLAIMED = {
    "KFAC": {"lr 10"},
    "TEKFAC": {"absolute damping 1e-12", "relative damping 1e-6", "two samples"},
    "TwoLevelKFAC": {"absolute damping 1e-12", "relative damping 1e-6"},
}

#: One of factors, one of eigenbases, one of sums of products, one of inverse factors.
REPRESENTATIVES = ("KFAC", "EKFAC", "KPSVD", "SINGD")
KINDS = {
    one.__name__: one
    for one in (
        natgrad.KFAC, natgrad.EKFAC, natgrad.TKFAC, natgrad.TEKFAC, natgrad.KPSVD,
        natgrad.TwoLevelKFAC, natgrad.SINGD,
    )
}  # fmt: skip


def make(kind: Any, model: nn.Module, likelihood: Any, **options: Any) -> Any:
    """Return an optimizer whose steps are measured, whatever its rate."""
    fields = {one.name for one in dataclasses.fields(MeasuredLength)} & set(options)
    length = MeasuredLength(**{name: options.pop(name) for name in fields})
    rule = StepRule(length, weight_decay_mode=options.pop("weight_decay_mode", "decoupled"))
    return kind(model, likelihood, step_rule=rule, **options)


def trained(kind: str, setting: Setting) -> tuple[float, float, nn.Module, list[str]]:
    """Return the loss on all data at the start and at the end, the model, and all warnings."""
    x, y = setting.spoil(*(curve() if setting.regression else classes()))
    model = network(2 if setting.regression else 3)
    with torch.no_grad():
        setting.spoil_model(model)
    loss = setting.loss or (half_square if setting.regression else functional.cross_entropy)
    likelihood = setting.likelihood or ("gaussian" if setting.regression else "categorical")
    order = torch.Generator().manual_seed(7)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = make(KINDS[kind], model, likelihood, **setting.options)
        schedule = setting.schedule or (lambda step: 1.0)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        with torch.no_grad():
            start = float(loss(model(x), y))
        for step in range(STEPS):
            index = torch.randperm(SAMPLES, generator=order)[: setting.batch]
            optimizer.zero_grad()
            (setting.factor * loss(model(setting.spoil_batch(step, x[index])), y[index])).backward()
            if setting.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), setting.clip)
            optimizer.step()
            scheduler.step()
        with torch.no_grad():
            end = float(loss(model(x), y))
    return start, end, model, [str(one.message) for one in caught]


def check(kind: str, setting: Setting) -> None:
    start, end, model, told = trained(kind, setting)
    assert all(p.isfinite().all() for p in model.parameters())
    excused = any("took back" in one for one in told)
    assert end <= 1.5 * start or excused, f"the loss went from {start:.3g} to {end:.3g} in silence"


@pytest.mark.parametrize("name", [n for n in SETTINGS if n not in NOT_CLAIMED["KFAC"]])
def test_kfac_does_not_blow_up(name):
    check("KFAC", SETTINGS[name])


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(kind, name, id=f"{kind}, {name}")
        for kind in KINDS
        for name in (SOME if kind in REPRESENTATIVES else FEW)
        if kind != "KFAC" and name not in NOT_CLAIMED.get(kind, ())
    ],
)
def test_other_methods_do_not_blow_up(kind, name):
    check(kind, SETTINGS[name])


def warmup_and_linear(step: int) -> float:
    return (step + 1) / 10 if step < 10 else (STEPS - step) / (STEPS - 10)


def cosine(step: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * step / STEPS))


def restarts(step: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * (step % 20) / 20))


@pytest.mark.parametrize(
    ("kind", "regression", "schedule"),
    [
        *((kind, False, warmup_and_linear) for kind in KINDS),
        *((kind, False, cosine) for kind in ("KFAC", "SINGD")),
        *((kind, True, warmup_and_linear) for kind in ("KFAC", "EKFAC")),
        ("KFAC", False, restarts),
        ("KFAC", True, restarts),
    ],
)
def test_schedules_train(kind, regression, schedule):
    start, end, model, _ = trained(kind, Setting(regression=regression, schedule=schedule))
    assert all(p.isfinite().all() for p in model.parameters())
    assert end < 0.5 * start
