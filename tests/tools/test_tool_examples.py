"""The examples of the tools run and leave what they promise."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.scripts import load_module

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = "--samples 200 --test-samples 100 --epochs 1 --width 8".split()
SMALLER = "--samples 40 --epochs 1 --width 4 --repetitions 1".split()


def results_of(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str] = SMALL
) -> Any:
    """Run an example on a few digits and return its results."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    monkeypatch.setattr(sys, "argv", [name, *arguments, "--output", str(folder)])
    load_module(EXAMPLES / f"{name}.py").main()
    (picture,) = folder.glob("*.png")
    assert picture.stat().st_size > 0
    (found,) = folder.glob("*.json")
    return json.loads(found.read_text())


def test_continual_learning(tmp_path, monkeypatch):
    results = results_of("continual_learning", tmp_path, monkeypatch)
    titles = {one["penalty"] for one in results["tasks"]}
    assert titles == {"first task only", "none", "diagonal", "kfac", "ekfac"}
    assert all(0 <= one["all"] <= 1 for one in results["merging"])


def test_compression(tmp_path, monkeypatch):
    results = results_of("compression", tmp_path, monkeypatch)
    assert {"magnitude", "diagonal", "kfac, adjusted"} <= set(results["accuracies"])
    assert {one["layer"] for one in results["rises"]} == {"0", "2", "4"}


def test_fisher_spectrum(tmp_path, monkeypatch):
    results = results_of("fisher_spectrum", tmp_path, monkeypatch, SMALLER)
    assert results["parameters"] == 65 * 4 + 5 * 10
    full = results["dimension"]["full"]
    assert 0 < full["exact"] < 310 and abs(full["lanczos"] / full["exact"] - 1) < 0.5
    assert all(len(errors) == 6 for errors in results["errors"].values())
