import json
import subprocess
import sys

import numpy as np
import pytest

from natgrad.cli import run
from natgrad.version import __version__
from tests.experiments.schema import check

TINY = [
    "--train-samples=30",
    "--test-samples=20",
    "--width=8",
    "--steps=3",
    "--first-order-steps=4",
]


def compare(tmp_path, *options):
    return run(["compare", *TINY, f"--output={tmp_path / 'out'}", *options])


def refused(capsys, status):
    """The sentence on standard error, once it is clear that it is one and the status is 2."""
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("natgrad: ")
    return lines[0]


def test_version(capsys):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"natgrad {__version__}"


def test_help_lists_the_commands(capsys):
    assert run(["--help"]) == 0
    assert "compare" in capsys.readouterr().out


def test_compare_writes_documented_results_and_prints_a_table(tmp_path, capsys):
    assert compare(tmp_path, "--methods=sgd,adamw") == 0
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    check(stored)
    assert stored["config"]["methods"] == ["sgd", "adamw"]
    printed = capsys.readouterr().out
    for text in ("SGD", "AdamW", "peak", str(tmp_path / "out" / "report.html")):
        assert text in printed


def test_given_learning_rates_are_used(tmp_path):
    assert compare(tmp_path, "--methods=sgd", "--learning-rate=sgd=0.25", "--no-quality") == 0
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    assert stored["methods"][0]["learning_rate"] == 0.25


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods=sgd,adam"], "Unknown method 'adam'"),
        (["--data=imagenet"], "Unknown data set 'imagenet'"),
        (["--data=mnist"], "--data-dir"),
        (["--data=mnist", "--data-dir=/nowhere/at/all"], "does not exist"),
        (["--train-samples=5000"], "only 1200"),
        (["--depth=5"], "--depth 6"),
        (["--batch-size=some"], "a number or full"),
        (["--learning-rate=sgd"], "METHOD=RATE"),
        (["--steps=many"], "--steps"),
        (["--stepz=3"], "--stepz"),
        (["--output=/dev/null"], "is a file"),
    ],
)
def test_wrong_input_ends_with_one_sentence_and_writes_nothing(tmp_path, capsys, options, message):
    assert message in refused(capsys, compare(tmp_path, *options))
    assert not (tmp_path / "out").exists()


def test_data_with_nan_is_refused(tmp_path, capsys):
    images = np.zeros((20, 28, 28))
    images[3, 4, 5] = np.nan
    for part in ("train", "test"):
        np.savez(tmp_path / f"{part}.npz", images=images, labels=np.arange(20) % 10)
    options = ["--data=mnist", f"--data-dir={tmp_path}", "--train-samples=20"]
    assert "1 of the 20 training images hold NaN" in refused(capsys, compare(tmp_path, *options))


def test_unknown_command_is_refused(capsys):
    assert "nonsense" in refused(capsys, run(["nonsense"]))


def test_module_can_be_run():
    done = subprocess.run(
        [sys.executable, "-m", "natgrad", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"natgrad {__version__}"


def test_ctrl_c_writes_what_is_there(tmp_path, monkeypatch):
    from natgrad.experiments.console import ProgressBars

    def stop(self, taken, loss, accuracy):
        raise KeyboardInterrupt

    monkeypatch.setattr(ProgressBars, "step", stop)
    assert compare(tmp_path, "--methods=sgd", "--learning-rate=sgd=0.1", "--no-quality") == 130
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    check(stored)
    assert stored["interrupted"] is True
    assert stored["methods"][0]["status"] == "interrupted"


def test_inspect_shows_layers_and_costs(capsys):
    shape = "--input-shape=1,8,8"
    assert run(["inspect", "tests.test_cli:small_network", shape, "--samples=16"]) == 0
    printed = capsys.readouterr().out
    for text in ("Conv2d", "Linear", "36", "10 x 10", "kfac", "16 samples"):
        assert text in printed


def small_network():
    from torch import nn

    layers = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(4, 10))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tests.test_cli"], "package.module:factory"),
        (["absent_package.module:factory"], "cannot be imported"),
        (["tests.test_cli:small_network", "--structure=cubic"], "cubic"),
        (["tests.test_cli:small_network", "--samples=0"], "at least 1"),
        (["tests.test_cli:small_network", "--input-shape=3"], "fails on the example"),
        ([], "Missing argument"),
    ],
)
def test_inspect_refuses_wrong_input(capsys, arguments, message):
    assert message in refused(capsys, run(["inspect", *arguments]))
