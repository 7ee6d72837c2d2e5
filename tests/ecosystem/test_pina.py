"""PINA's problem, points, solver and trainer around ResidualNGD, as the guide has it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import natgrad
from natgrad.residuals import Residual, TaylorNetwork
from tests.ecosystem.guides import block_with, call_apart


def follow_the_guide(folder: Path) -> tuple[float, dict[str, float], float]:
    """Return the error, what PINA logs and the loss before the last step."""
    torch.manual_seed(0)
    names = {
        "torch": torch, "natgrad": natgrad, "Residual": Residual, "TaylorNetwork": TaylorNetwork,
    }  # fmt: skip
    block = block_with("pinns.md", "from pina import Trainer")
    settings = f"default_root_dir={str(folder)!r}, enable_progress_bar=False, "
    exec(block.replace("Trainer(solver, ", f"Trainer(solver, {settings}"), names)
    x = names["problem"].spatial_domain.sample(500, "random")
    known = names["problem"].solution(x).tensor
    with torch.no_grad():
        error = float((names["network"](x).tensor - known).norm() / known.norm())
    logged = {name: float(value) for name, value in names["trainer"].callback_metrics.items()}
    return error, logged, names["optimizer"].instance.last.loss


@pytest.mark.skipif(find_spec("pina") is None, reason="pina-mathlab is not installed")
def test_the_guide_to_pina(tmp_path):
    error, logged, loss = call_apart(follow_the_guide, tmp_path)
    assert error < 1e-3
    assert logged["train_loss"] == pytest.approx(2 * loss, rel=1e-6)
    assert logged["D_loss"] + logged["boundary_loss"] == pytest.approx(2 * loss, rel=1e-6)
