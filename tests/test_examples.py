"""Every example runs: on tiny made-up files of the right format, and on real data where it is.

A new example is one more line in `EXAMPLES`, and one more function in `FILES` if it reads data.
"""

from __future__ import annotations

import argparse
import io
import os
import pickle
import random
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.scripts import load_module, run_script

for package in ("matplotlib", "rich"):
    pytest.importorskip(package)

EXAMPLES_FOLDER = Path(__file__).parent.parent / "examples"

# File, arguments of a run of seconds, files that it must leave in its output folder.
EXAMPLES: list[tuple[str, list[str], list[str]]] = [
    (
        "cifar100_resnet.py",
        "--optimizer all --fast --epochs 1 --samples 40 --batch-size 20 --width 4".split(),
        ["cifar100-resnet.png", "cifar100-resnet-kfac.pt"],
    ),
    (
        "multi30k_translation.py",
        "--optimizer all --fast --epochs 1 --samples 40 --batch-size 20 --width 16".split(),
        ["multi30k-translation.png"],
    ),
    (
        "multi30k_translation.py",
        "--optimizer kfac --fast --epochs 1 --samples 40 --width 16 --depth 1 "
        "--label-smoothing 0.1 --max-factor-size 50".split(),
        ["multi30k-translation.png"],
    ),
]


def write_cifar100(folder: Path) -> None:
    """Write the python archive, two images of every class for training and one for testing."""
    rng = np.random.default_rng(0)
    with tarfile.open(folder / "cifar-100-python.tar.gz", "w:gz") as archive:
        for name, copies in (("train", 2), ("test", 1)):
            labels = list(range(100)) * copies
            batch = {
                b"data": rng.integers(0, 256, (len(labels), 3072), dtype=np.uint8),
                b"fine_labels": labels,
                b"coarse_labels": [label // 5 for label in labels],
            }
            content = pickle.dumps(batch, protocol=2)
            member = tarfile.TarInfo(f"cifar-100-python/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def write_multi30k(folder: Path) -> None:
    """Write sentences that are translated word by word."""
    generator = random.Random(0)
    for part, count in (("train", 60), ("val", 10)):
        pairs = []
        for _ in range(count):
            numbers = [generator.randrange(60) for _ in range(generator.randint(3, 8))]
            words = [" ".join(f"{letter}{n}" for n in numbers) + "." for letter in "de"]
            pairs.append(words)
        for column, language in enumerate(("de", "en")):
            text = "".join(f"{pair[column]}\n" for pair in pairs)
            (folder / f"{part}.{language}").write_text(text, encoding="utf-8")


FILES: dict[str, Callable[[Path], None]] = {
    "cifar100_resnet.py": write_cifar100,
    "multi30k_translation.py": write_multi30k,
}


def run(
    file: str, *arguments: str | Path, data: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run an example, with nothing but ``data`` in NATGRAD_DATA."""
    environment = {k: v for k, v in os.environ.items() if k != "NATGRAD_DATA"}
    if data is not None:
        environment["NATGRAD_DATA"] = data
    return run_script(EXAMPLES_FOLDER / file, *arguments, environment=environment)


def check(result: subprocess.CompletedProcess[str], output: Path, written: list[str]) -> None:
    """Check that an example ended well and left its files."""
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Warning" not in result.stderr, result.stderr
    for name in written:
        assert (output / name).stat().st_size > 0


@pytest.mark.slow
@pytest.mark.parametrize(("file", "arguments", "written"), EXAMPLES)
def test_example_runs_on_made_up_files(
    file: str, arguments: list[str], written: list[str], tmp_path: Path
) -> None:
    if file in FILES:
        FILES[file](tmp_path)
        arguments = [*arguments, "--data", str(tmp_path)]
    result = run(file, *arguments, "--output", tmp_path / "out")
    check(result, tmp_path / "out", written)


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("NATGRAD_DATA"), reason="NATGRAD_DATA names no data folder")
@pytest.mark.parametrize(
    # The last run of each: what optimizers do is the same on made-up files.
    ("file", "arguments", "written"),
    {example[0]: example for example in EXAMPLES if example[0] in FILES}.values(),
)
def test_example_runs_on_real_files(
    file: str, arguments: list[str], written: list[str], tmp_path: Path
) -> None:
    data = os.environ["NATGRAD_DATA"]
    result = run(file, *arguments, "--output", tmp_path, data=data)
    check(result, tmp_path, written)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("given", [False, True])
def test_missing_files_are_named_in_one_sentence(file: str, given: bool, tmp_path: Path) -> None:
    arguments = ["--data", tmp_path] if given else []
    result = run(file, "--fast", *arguments)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "train." in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


class Silent:
    """A progress display that shows nothing."""

    def update(self, *arguments: object, **fields: object) -> None:
        """Do nothing."""


@pytest.mark.parametrize("name", ["kfac", "adamw"])
def test_resnet_resumes_from_its_checkpoint_to_the_last_bit(name: str, tmp_path: Path) -> None:
    example = load_module(EXAMPLES_FOLDER / "cifar100_resnet.py")
    write_cifar100(tmp_path)
    data = example.load(tmp_path, 60)
    options = argparse.Namespace(seed=0, batch_size=20, epochs=2, width=4, lr=None, output=tmp_path)
    through = example.Run(name, data, options)
    through.train_epoch(Silent(), 0)
    interrupted = example.Run(name, data, options)
    interrupted.load()
    assert interrupted.epoch == 1
    for run in (through, interrupted):
        run.train_epoch(Silent(), 0)
    assert interrupted.losses == through.losses
    for a, b in zip(through.model.parameters(), interrupted.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not list(tmp_path.glob("*.partial"))
    options.batch_size = 30
    with pytest.raises(SystemExit, match="other settings"):
        example.Run(name, data, options).load()


def test_augmentation_shifts_and_mirrors_whole_images() -> None:
    example = load_module(EXAMPLES_FOLDER / "cifar100_resnet.py")
    images = torch.randn(64, 3, 32, 32)
    moved = example.augment(images, torch.Generator().manual_seed(0))
    seen = set()
    for before, after in zip(images, moved, strict=True):
        padded = torch.nn.functional.pad(before, (4, 4, 4, 4))
        found = [
            (row, column, mirrored)
            for row in range(9)
            for column in range(9)
            for mirrored in (False, True)
            if torch.equal(
                (lambda part, m=mirrored: part.flip(-1) if m else part)(
                    padded[:, row : row + 32, column : column + 32]
                ),
                after,
            )
        ]
        assert len(found) == 1
        seen.add(found[0])
    assert len(seen) > 32 and {mirrored for *_, mirrored in seen} == {False, True}


def test_bleu_counts_words_in_a_row() -> None:
    bleu = load_module(EXAMPLES_FOLDER / "multi30k_translation.py").bleu
    reference = "a man is walking on the street".split()
    assert bleu([reference], [reference]) == pytest.approx(100)
    assert bleu([reference[:5]], [reference]) == pytest.approx(100 * np.exp(1 - 7 / 5))
    # Precisions 6/7, 4/6, 2/5 and 1/4.
    changed = "a man is walking in the street".split()
    expected = 100 * (6 / 7 * 4 / 6 * 2 / 5 * 1 / 4) ** 0.25
    assert bleu([changed], [reference]) == pytest.approx(expected)
    assert bleu([["nothing"]], [reference]) == 0.0
