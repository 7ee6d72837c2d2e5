"""Every code block of the user guide runs."""

from __future__ import annotations

import copy
import importlib
import os
import pathlib
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

import natgrad

GUIDE = Path(__file__).parents[2] / "docs" / "training.md"
SECTIONS = re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", GUIDE.read_text(), re.M | re.S)
BLOCKS = [
    (title, block)
    for title, text in SECTIONS
    for block in re.findall(r"```python\n(.*?)```", text, re.S)
]
LIBRARIES = ("lightning", "transformers", "accelerate", "peft")


def test_the_guide_has_blocks():
    assert len(BLOCKS) == 13


@pytest.mark.parametrize(("title", "block"), BLOCKS, ids=[title for title, _ in BLOCKS])
def test_block(title, block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = {
        name: pytest.importorskip(name) for name in LIBRARIES if re.search(rf"\b{name}\.", block)
    }
    if title == "Lightning":
        importlib.import_module("lightning.pytorch")
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(48, 6), torch.randint(0, 3, (48,))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)
    names = {
        "natgrad": natgrad, "torch": torch, "F": functional, "copy": copy, "os": os,
        "pathlib": pathlib, "model": model, "loader": loader, **found,
    }  # fmt: skip
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="natgrad")
        exec(compile(block, str(GUIDE), "exec"), names)
    if title not in ("Hugging Face Transformers", "Adapters (peft)"):
        moved = [not torch.equal(v, before[k]) for k, v in model.state_dict().items()]
        assert all(moved)
    if "optimizer" in names:
        assert all(p.isfinite().all() for p in names["optimizer"].model.parameters())
