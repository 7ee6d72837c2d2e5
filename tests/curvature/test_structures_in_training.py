"""Structures inside an optimizer: checkpoints, looks between steps, faulty steps, loss.

What is common to all is tried out where the state is richest: bases, sums of products, kept rows.
"""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from tests.cases import CASES, generator, labels, normal
from tests.methods import make_optimizer
from tests.state import check_resumes, flat

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ekfac": (natgrad.EKFAC, {}),
    "tkfac": (natgrad.TKFAC, {}),
    "tekfac": (natgrad.TEKFAC, {}),
    "kpsvd[1]": (natgrad.KPSVD, {}),
    "kpsvd[2]": (natgrad.KPSVD, {"rank": 2}),
    "two_level[nicolaides]": (natgrad.TwoLevelKFAC, {"coarse_space": "nicolaides"}),
    "two_level[spectral]": (natgrad.TwoLevelKFAC, {"coarse_space": "spectral"}),
    "two_level[residual]": (natgrad.TwoLevelKFAC, {"coarse_space": "residual"}),
    "two_level[krylov]": (natgrad.TwoLevelKFAC, {"coarse_space": "krylov"}),
}
#: One of bases, one of sums of products, one of kept rows.
SOME = ("ekfac", "kpsvd[2]", "two_level[krylov]")
#: Updates and refreshes at different steps, so that a checkpoint falls between them.
SETTINGS = {"factors": 2, "inverses": 3, "damping": 0.5}


def make(name: str, model: nn.Module, **options: Any) -> Any:
    kind, own = OPTIMIZERS[name]
    return make_optimizer(kind, model, **own, **options)


def network(kind: str) -> nn.Module:
    torch.manual_seed(1)
    if kind == "mlp":
        return copy.deepcopy(CASES["mlp"]().model)
    if kind == "convolution":
        layers = [nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(2 * 16, 3)]
    else:
        layers = [nn.Embedding(5, 6), nn.LayerNorm(6), nn.Flatten(), nn.Linear(12, 3)]
    return nn.Sequential(*layers).double()


def batch(kind: str, step: int) -> tuple[Tensor, Tensor]:
    if kind == "embedding":
        x = torch.randint(0, 5, (4, 2), generator=generator(step))
    else:
        x = normal(4, *((3,) if kind == "mlp" else (1, 5, 5)), seed=step)
    return x, labels(4, 3, step)


def train(optimizer: Any, model: nn.Module, steps: range, kind: str = "mlp") -> None:
    for step in steps:
        optimizer.zero_grad()
        x, y = batch(kind, step)
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("name", "kind", "fisher"),
    [(name, "mlp", "exact") for name in OPTIMIZERS]
    + [(name, "mlp", "mc") for name in SOME]
    + [("two_level[krylov]", "convolution", "mc"), ("two_level[spectral]", "embedding", "exact")],
)
def test_a_resumed_run_goes_on_bit_by_bit(name, kind, fisher):
    """Also between updates and between refreshes."""

    def fresh(seed: int) -> tuple[nn.Module, Any]:
        model = network(kind)
        return model, make(name, model, fisher=fisher, seed=seed, **SETTINGS)

    def step(model: nn.Module, optimizer: Any, number: int) -> None:
        train(optimizer, model, range(number, number + 1), kind)

    check_resumes(fresh, step, 7, range(4) if fisher == "exact" else (1, 2))


@pytest.mark.parametrize("name", SOME)
def test_looking_at_the_curvature_between_steps_changes_nothing(name):
    models = [network("mlp") for _ in range(2)]
    watched, other = (make(name, model, fisher="exact", **SETTINGS) for model in models)
    for step in range(7):
        train(watched, models[0], range(step, step + 1))
        train(other, models[1], range(step, step + 1))
        matrix = watched.preconditioner.curvature.matrix()
        matrix.solve(flat(models[0]), 1.0)
        matrix.eigenvalues()
        watched.state_dict()
    assert torch.equal(flat(models[0]), flat(models[1]))


@pytest.mark.parametrize("name", SOME)
def test_steps_with_nan_are_taken_back(name):
    models = [network("mlp") for _ in range(2)]
    optimizer, undisturbed = (make(name, model, fisher="exact", **SETTINGS) for model in models)
    for step in range(8):
        parameters = flat(models[0])
        x, y = batch("mlp", step)
        optimizer.zero_grad()
        if step % 2:
            functional.cross_entropy(models[0](x), y).backward()
            models[0][2].bias.grad[0] = float("inf")  # Rows are finite here, the gradient is not.
        else:
            functional.cross_entropy(models[0](x / (0 if step % 4 else math.nan)), y).backward()
        if step == 0:
            with pytest.warns(UserWarning, match="skipped"):
                optimizer.step()
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                optimizer.step()
        assert torch.equal(flat(models[0]), parameters)
        for each, net in ((optimizer, models[0]), (undisturbed, models[1])):
            train(each, net, range(step, step + 1))
        assert torch.equal(flat(models[0]), flat(models[1]))


#: Those that do not train as their methods do by default, for which see test_bad_settings.py.
OTHERS = ("kpsvd[2]", "two_level[nicolaides]", "two_level[spectral]", "two_level[residual]")


@pytest.mark.parametrize(
    ("name", "convolution"),
    [(name, False) for name in OTHERS] + [(name, True) for name in SOME],
)
@pytest.mark.filterwarnings("ignore:the curvature of")
def test_training_reduces_the_loss(name, convolution):
    torch.manual_seed(0)
    if convolution:
        first = [nn.Unflatten(1, (1, 8)), nn.Conv1d(1, 4, 3), nn.Tanh(), nn.Flatten()]
        model = nn.Sequential(*first, nn.Linear(24, 3))
    else:
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    x = torch.randn(64, 8)
    y = (x @ torch.randn(8, 3)).argmax(1)
    optimizer = make(name, model)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
