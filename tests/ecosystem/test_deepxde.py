"""DeepXDE's equation, loss and training loop around ResidualNGD, as the guide has it."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import natgrad
from natgrad.residuals import Residual
from tests.ecosystem.guides import block_with, call_apart


def follow_the_guide(folder: Path) -> tuple[float, float, list[float], float]:
    """Return the error, how far DeepXDE's prediction is from the network, losses of both."""
    os.environ["DDE_BACKEND"] = "pytorch"
    torch.manual_seed(0)
    names = {"torch": torch, "natgrad": natgrad, "Residual": Residual}
    exec(block_with("pinns.md", "import deepxde"), names)
    network, model = names["network"], names["model"]
    x = torch.linspace(-1, 1, 101, dtype=torch.float64).unsqueeze(1)
    with torch.no_grad():
        found, known = network(x), torch.sin(torch.pi * x)
    predicted = torch.as_tensor(model.predict(x.numpy()))
    logged = [float(sum(row)) for row in names["history"].loss_train]
    error = float((found - known).norm() / known.norm())
    return error, float((found - predicted).abs().max()), logged, model.opt.loss()


@pytest.mark.skipif(find_spec("deepxde") is None, reason="deepxde is not installed")
def test_the_guide_to_deepxde(tmp_path):
    error, difference, logged, loss = call_apart(follow_the_guide, tmp_path)
    assert error < 1e-4 and difference < 1e-12
    assert logged[-1] < 1e-8 * logged[0]
    assert logged[-1] == pytest.approx(2 * loss, rel=1e-6)
