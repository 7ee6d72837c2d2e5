"""The example of fine-tuning through low-rank adapters runs, and the loss falls."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.scripts import run_script

for package in ("matplotlib", "peft", "rich", "transformers"):  # Not loaded by every process.
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)

SCRIPT = Path(__file__).parent.parent / "examples" / "lora_finetuning.py"
TINY = (
    "--fast --steps 12 --batch 8 --length 16 --width 16 --layers 1 --rank 2 --pretraining-steps 20"
)


def run(*arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "NATGRAD_DATA"}
    environment["HF_HUB_OFFLINE"] = "1"
    done = run_script(SCRIPT, *TINY.split(), *arguments, environment=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_script_without_data(tmp_path):
    shown = run("--output", str(tmp_path))
    assert "lora_A" in shown and "of curvature" in shown  # the summary
    results = json.loads((tmp_path / "lora.json").read_text())
    assert [r["name"] for r in results["runs"]] == ["adamw", "kfac"]
    for result in results["runs"]:
        assert result["test"][-1] < result["test"][0], result["name"]
        assert result["steps"][-1] == len(result["train"]) == 12
    first, second = (r["test"][0] for r in results["runs"])
    assert first == second  # the same model and adapters
    assert (tmp_path / "lora.png").stat().st_size > 10_000
    assert len(list(tmp_path.glob("pretrained-*"))) == 1


def test_script_with_a_folder_of_text(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "some.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    output = tmp_path / "out"
    run("--data", str(folder), "--optimizer", "kfac", "--output", str(output))
    (result,) = json.loads((output / "lora.json").read_text())["runs"]
    assert result["name"] == "kfac" and result["test"][-1] < result["test"][0]
