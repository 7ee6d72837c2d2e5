"""The blocks of the guide to the tools, one after the other."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import natgrad

GUIDE = Path(__file__).parents[2] / "docs" / "tools.md"
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.S)


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, y = torch.randn(40, 4).double(), torch.randint(0, 3, (40,))
    found: dict[str, Any] = {
        "natgrad": natgrad, "torch": torch, "model": model, "model_b": copy.deepcopy(model),
        "x_test": torch.randn(7, 4).double(), "y_test": torch.randint(0, 3, (7,)),
        "loader": torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(x, y), batch_size=8
        ),
    }  # fmt: skip
    for block in BLOCKS:
        exec(compile(block, str(GUIDE), "exec"), found)
    return found


def test_influence(names):
    assert names["scores"].shape == (7, 40) and names["most_helpful"].shape == (7, 5)
    torch.testing.assert_close(sum(names["layers"].values()), names["scores"])


def test_consolidation_and_merging(names):
    assert names["penalty"](names["model_b"]) == 0 and names["loss"].requires_grad
    same = zip(names["model_b"].parameters(), names["merged"].parameters(), strict=True)
    assert all(torch.allclose(a, b) for a, b in same)


def test_compression(names):
    removed = sum(int((~mask).sum()) for mask in names["pruning"].kept.values())
    assert removed == (4 * 8 + 8 * 3) // 2 and names["pruning"].loss_increase > 0
    assert (~names["thin"].kept["0.weight"]).all(1).sum() == 2
    error = names["rounding"]
    assert set(error.layers) == {"0", "2"}
    assert abs(sum(error.layers.values()) - error.total) < 1e-12
    assert torch.equal(names["model"][0].weight, error.rounded["0.weight"])


def test_spectra_and_estimates(names):
    matrix, inverse = names["F"], names["F"].inverse(1e-3)
    assert names["vectors"].shape == (matrix.shape[0], 10)
    torch.testing.assert_close(names["values"], matrix.eigenvalues()[:10])
    # Lanczos with 50 of 67 steps; vectors of random signs have a spread of their own.
    assert abs(names["log_determinant"] - float(matrix.logdet(1e-3))) < 60
    assert abs(names["dimension_too"] - names["dimension"]) < 6
    assert names["curve"].shape == (100,) and names["variances"].shape == (67,)
    assert abs(names["trace"] / float(inverse.trace()) - 1) < 0.05


def test_hessians_and_jacobians(names):
    hessian, jacobian, model = names["H"].to_dense(), names["J"], names["model"]
    values, vectors = torch.linalg.eigh(hessian)
    torch.testing.assert_close(names["sharpness"], values[-1:])
    direction = names["direction"][:, 0]
    torch.testing.assert_close((direction @ vectors[:, -1]).abs(), torch.ones(()).double())
    assert abs(names["hessian_trace"] - float(hessian.trace())) < 5 * names["spread"] + 1e-9
    torch.testing.assert_close(names["layer"].to_dense(), hessian[:40, :40])
    assert jacobian.shape == (7 * 3, sum(p.numel() for p in model.parameters()))
    torch.testing.assert_close(names["pulled"], jacobian.to_dense().T @ names["moved"])
