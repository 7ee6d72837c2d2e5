"""The blocks of the guide to uncertainty, one after the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import natgrad

GUIDE = Path(__file__).parents[1] / "docs" / "uncertainty.md"


def test_the_guide_runs(tmp_path):
    pytest.importorskip("matplotlib")
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.S)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    data = torch.utils.data.TensorDataset(torch.randn(40, 4).double(), torch.randint(0, 3, (40,)))
    x = torch.randn(5, 4).double()
    names: dict[str, Any] = {
        "natgrad": natgrad, "torch": torch, "model": model, "x": x, "path": tmp_path / "state.pt",
        "y": torch.arange(5) % 3,
        "loader": torch.utils.data.DataLoader(data, batch_size=8),
    }  # fmt: skip
    before = [p.clone() for p in model.parameters()]
    bounds = []
    for block in blocks:
        exec(compile(block, str(GUIDE), "exec"), names)
        assert torch.allclose(names["probabilities"].sum(1), torch.ones(5).double())
        bounds.append(names["posterior"].log_marginal_likelihood())
    assert len(blocks) == 5
    assert float(names["precision"].grad) != 0 and set(names["deltas"]) == {"0", "2"}
    assert names["covariance"].shape == (5, 3, 3) and names["weights"].shape == (5, 67)
    assert torch.equal(names["mean"], model(x).detach())
    assert len(names["axes"].get_lines()) == 2 and 0 <= names["reliability"].error <= 1
    exact = natgrad.Laplace(model, names["loader"], "categorical", "full")
    exact.optimize_prior_precision()
    assert names["bound"] <= exact.log_marginal_likelihood() + 1e-9
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
