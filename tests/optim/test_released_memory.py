"""What a step worked with is given back at once, not when Python next looks for cycles."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import natgrad


def perceptron() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(6, 7)


def convolutional() -> tuple[nn.Module, Tensor]:
    layers = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    return nn.Sequential(*layers), torch.randn(6, 2, 4, 4)


def attention() -> tuple[nn.Module, Tensor]:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    layers = nn.Embedding(9, 8), layer, nn.Flatten(), nn.Linear(40, 3)
    return nn.Sequential(*layers), torch.randint(0, 9, (6, 5))


@pytest.mark.parametrize(
    ("method", "network"),
    [(name, perceptron) for name in ("KFAC", "EKFAC", "SINGD", "FNGD", "ExactNGD", "DiagonalNGD")]
    + [(name, net) for name in ("KFAC", "FNGD", "ExactNGD") for net in (convolutional, attention)],
)
def test_no_tensor_of_a_step_waits_for_the_garbage_collector(method, network):
    model, x = network()
    y = torch.randint(0, 3, (6,))
    optimizer = getattr(natgrad, method)(model)

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    for _ in range(4):
        step()
    gc.collect()
    gc.freeze()  # What is there by now need not be gone through again.
    flags = gc.get_debug()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        for _ in range(12):
            step()
        gc.collect()
        left = [type(o).__name__ for o in gc.garbage]
    finally:
        gc.set_debug(flags)
        gc.garbage.clear()
        gc.enable()
    assert not [name for name in left if name == "Tensor" or "Backward" in name]
