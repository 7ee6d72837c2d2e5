"""The example of continual learning runs and leaves what it promises."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "continual_learning.py"


def test_the_example_runs(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    arguments = "--samples 200 --test-samples 100 --epochs 1 --width 8".split()
    monkeypatch.setattr(sys, "argv", [EXAMPLE.name, *arguments, "--output", str(tmp_path)])
    spec = importlib.util.spec_from_file_location("continual_learning", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main()
    results = json.loads((tmp_path / "continual-learning.json").read_text())
    titles = {one["penalty"] for one in results["tasks"]}
    assert titles == {"first task only", "none", "diagonal", "kfac", "ekfac"}
    assert all(0 <= one["all"] <= 1 for one in results["merging"])
    assert (tmp_path / "continual-learning.png").stat().st_size > 0
