"""The example of error bars: its measures against their definitions, and that it runs."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from tests.scripts import load_module, run_script

for package in ("matplotlib", "rich"):
    pytest.importorskip(package)

SCRIPT = Path(__file__).parent.parent / "examples" / "variational_laplace.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return load_module(SCRIPT)


def run(*arguments: str | Path) -> tuple[int, str, str]:
    environment = {k: v for k, v in os.environ.items() if k != "NATGRAD_DATA"}
    done = run_script(SCRIPT, *arguments, environment=environment)
    return done.returncode, done.stdout, done.stderr


def test_regression(tmp_path):
    code, shown, errors = run("--fast", "--output", tmp_path)
    assert code == 0, errors
    assert "full" in shown and "in gap" in shown
    rows = json.loads((tmp_path / "gap.json").read_text())
    assert len(rows) == 6
    full, ten, twenty = rows[:3]
    assert ten["bound"] < twenty["bound"] <= full["bound"] + 1e-6
    for row in rows[:4]:
        assert row["in gap"] > row["at data"] > 0
    assert (tmp_path / "variational-laplace-gap.png").stat().st_size > 10_000


def write_images(folder: Path, name: str, seed: int) -> None:
    """Write data files of noise, ten labels."""
    rng = np.random.default_rng(seed)
    (folder / name).mkdir()
    for stem, count in (("train", 40), ("t10k", 20)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for kind, array, magic in (("images-idx3", images, 2051), ("labels-idx1", labels, 2049)):
            header = np.array([magic, *array.shape], dtype=">i4").tobytes()
            with gzip.open(folder / name / f"{stem}-{kind}-ubyte.gz", "wb") as file:
                file.write(header + array.tobytes())


def test_images(tmp_path, monkeypatch, example):
    write_images(tmp_path, "fashion_mnist", 0)
    write_images(tmp_path, "mnist", 1)
    loaded = example.load_dataset

    def fewer(*arguments, **options):
        return loaded(*arguments, **{**options, "train_samples": 40, "test_samples": 20})

    monkeypatch.setattr(example, "load_dataset", fewer)
    wide = example.Console
    monkeypatch.setattr(example, "Console", lambda width: wide(width=width, quiet=True))
    example.main(
        ["--task", "images", "--fast", "--points", "3", "--steps", "3", "--data", str(tmp_path),
         "--output", str(tmp_path / "out")]
    )  # fmt: skip
    rows = json.loads((tmp_path / "out" / "images.json").read_text())
    assert len(rows) == 7
    for row in rows:
        assert 0 <= row["AUC"] <= 1 and 0 <= row["ECE %"] <= 100 and row["NLL"] > 0


def test_missing_files_are_named_in_one_sentence(tmp_path):
    for arguments in ([], ["--data", tmp_path]):
        code, _, errors = run("--task", "images", "--fast", *arguments)
        assert code == 1
        assert "Traceback" not in errors and "Fashion-MNIST" in errors
        assert len(errors.strip().splitlines()) == 1


def test_measures(example):
    torch.manual_seed(0)
    probabilities = torch.softmax(3 * torch.randn(200, 4).double(), 1)
    labels = torch.randint(4, (200,))
    confidence, predicted = probabilities.max(1)
    expected = 0.0
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        if inside.any():
            right = (predicted == labels)[inside].double().mean()
            expected += float((right - confidence[inside].mean()).abs() * inside.sum() / 200)
    found = example.calibration_error(probabilities, labels)
    assert found == pytest.approx(expected, rel=1e-9)
    other = torch.softmax(torch.randn(30, 4).double(), 1)
    other[:5] = probabilities[:5]  # Ties.
    entropies = [-(p * p.log()).sum(1) for p in (probabilities, other)]
    pairs = entropies[1][:, None] - entropies[0][None]
    expected = float((pairs > 1e-12).double().mean() + 0.5 * (pairs.abs() <= 1e-12).double().mean())
    assert example.separation(probabilities, other) == pytest.approx(expected, abs=1e-12)
    assert example.separation(probabilities, probabilities) == pytest.approx(0.5)


def test_data_has_a_gap_and_the_noise_it_says(example):
    x, y, x_test, _ = example.gap_data(2000, 0)
    for inputs in (x, x_test):
        assert ((inputs >= -1) & (inputs <= -0.4) | (inputs >= 0.3) & (inputs <= 1)).all()
    residual = y - torch.sin(5 * x) - 0.5 * x
    assert float(residual.std()) == pytest.approx(0.1, rel=0.1)
