"""The blocks of the page on the theory kit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import natgrad
from natgrad import ntk

PAGE = Path(__file__).parents[2] / "docs" / "theory.md"
BLOCKS = re.findall(r"^```python\n(.*?)```", PAGE.read_text(), re.M | re.S)


def scene() -> dict[str, Any]:
    """A small network of double precision and its data, by the names of the page."""
    torch.manual_seed(0)
    x, x_test = (torch.nn.functional.normalize(torch.randn(n, 6).double()) for n in (8, 5))
    model = ntk.MLP([6, 96, 96, 2]).double()
    return {
        "natgrad": natgrad, "ntk": ntk, "model": model, "x": x, "x_test": x_test,
        "x1": x, "x2": x_test,
        "y": torch.randn(8, 2).double(), "y_test": torch.randn(5, 2).double(),
    }  # fmt: skip


def test_every_block_runs_and_does_what_it_says(capsys):
    small = [block.replace("[64, 512, 512, 10]", "[6, 96, 96, 2]") for block in BLOCKS]
    assert len(small) == 5
    names = scene()
    exec(small[0].replace("ntk.MLP([6, 96, 96, 2])", "model"), names)
    assert "kfac" in capsys.readouterr().out
    exec(small[1], names)
    assert isinstance(names["optimizer"], natgrad.BlockDiagonalNGD)
    exec(small[2], names)
    curve = names["curve"]
    assert curve.train.shape == (21, 8, 2) and curve.test.shape == (21, 5, 2)
    assert curve.train_loss[-1] < 1e-6 * curve.train_loss[0]
    exec(small[3].replace("784, 1024, 1024, 10", "6, 8, 8, 2"), names)
    names |= {"gram": ntk.two_layer_kernel(names["x"]), "C": 0.1, "y": names["y"][:, :1]}
    names["model"] = ntk.TwoLayerNetwork(6, 64).double()
    exec(small[4], names)
    assert "rank 8" in capsys.readouterr().out
    assert names["spectrum"].largest == pytest.approx(float(names["spectrum"].eigenvalues.max()))
