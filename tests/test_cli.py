import functools
import io
import json
import os
import runpy
import sys

import numpy as np
import pytest

from natgrad.cli import run
from natgrad.version import __version__
from tests import processes
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
    printed = capsys.readouterr().out
    for command in ("compare", "theory", "claims", "inspect", "plan"):
        assert command in printed
    assert not printed.partition("Commands:")[2].count("...")  # Every line is whole.


def test_compare_writes_documented_results_and_prints_a_table(tmp_path, capsys):
    assert compare(tmp_path, "--methods=sgd,adamw") == 0
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    check(stored)
    assert stored["config"]["methods"] == ["sgd", "adamw"]
    printed = capsys.readouterr().out
    for text in ("SGD", "AdamW", "peak", str(tmp_path / "out" / "report.html")):
        assert text in printed


@pytest.mark.usefixtures("undrawn")
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
        (["--output=/proc/nowhere"], "/proc/nowhere/results.json cannot be written: No such file"),
    ],
)
def test_wrong_input_ends_with_one_sentence_and_writes_nothing(
    tmp_path, capsys, monkeypatch, options, message
):
    monkeypatch.delenv("NATGRAD_DATA", raising=False)
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


@pytest.mark.usefixtures("undrawn")
def test_ctrl_c_writes_what_is_there(tmp_path, monkeypatch, capsys):
    from natgrad.experiments.console import ProgressBars

    def stop(self, taken, loss, accuracy):
        raise KeyboardInterrupt

    monkeypatch.setattr(ProgressBars, "step", stop)
    assert compare(tmp_path, "--methods=sgd", "--learning-rate=sgd=0.1", "--no-quality") == 130
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    check(stored)
    assert stored["interrupted"] is True
    assert stored["methods"][0]["status"] == "interrupted"
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"natgrad: interrupted; {tmp_path / 'out'} holds what was measured, --resume "
                     "goes on from it."]  # fmt: skip


def test_ctrl_c_before_anything_is_there_is_one_line(monkeypatch, capsys):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("natgrad.cli.inspect.load_model", stop)
    assert run(["inspect", "tests.test_cli:small_network"]) == 130
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "natgrad: interrupted; nothing was written.\n")


def python_m_natgrad(folder, *arguments):
    """Do what ``python -m natgrad arguments`` does, in a process that has loaded torch."""
    os.chdir(folder)
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), stream)
    sys.argv = ["natgrad", *arguments]
    sys.path.insert(0, "")
    runpy.run_module("natgrad", run_name="__main__", alter_sys=True)


@pytest.mark.parametrize(
    ("arguments", "status", "stdout", "stderr"),
    [
        (["--version"], 0, f"natgrad {__version__}\n", ""),
        (["inspect", "slow:model"], 130, "", "natgrad: interrupted; nothing was written.\n"),
    ],
    ids=["version", "ctrl-c"],
)
def test_the_module_is_the_command(tmp_path, arguments, status, stdout, stderr):
    (tmp_path / "slow.py").write_text(
        "import os, signal\n\n"
        # Processes started in the background inherit that it is ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n\n"
        "def model():\n    os.kill(os.getpid(), signal.SIGINT)\n"
    )
    process = processes.start(python_m_natgrad, tmp_path, *arguments)
    assert processes.finish(process) == status
    assert [(tmp_path / name).read_text() for name in ("stdout", "stderr")] == [stdout, stderr]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "no_color", "coloured"),
    [(Terminal, "", True), (Terminal, "1", False), (io.StringIO, "", False)],
)
def test_colours_are_for_terminals_only(monkeypatch, stream, no_color, coloured):
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", no_color)
    output = stream()
    monkeypatch.setattr("sys.stdout", output)
    assert run(["plan", "tests.test_cli:small_network", "--ranks=1"]) == 0
    assert "kfac" in output.getvalue()
    from natgrad.cli.invocation import make_console

    make_console().print("[red]red[/red]")
    assert ("\x1b[31mred" in output.getvalue()) == coloured
    if stream is not Terminal:
        assert "\x1b" not in output.getvalue()


@pytest.mark.parametrize("command", ["compare", "theory", "claims", "inspect", "plan"])
def test_every_command_has_json_and_says_what_it_does(command, capsys):
    assert run([command, "--help"]) == 0
    printed = capsys.readouterr().out
    assert "--json" in printed and "--help" in printed
    assert "[default: " in printed


@pytest.mark.usefixtures("undrawn")
def test_theory_prints_json_alone(tmp_path, capsys):
    options = ["--train-samples=6", "--test-samples=4", "--width=8", "--json"]
    assert run(["theory", "conditions", *options, f"--output={tmp_path / 'out'}"]) == 0
    captured = capsys.readouterr()
    assert captured.out == (tmp_path / "out" / "results.json").read_text()
    assert "conditions: completed" in captured.err


def test_inspect_prints_json(capsys):
    arguments = ["tests.test_cli:small_network", "--input-shape=1,8,8", "--structure=unit-wise"]
    assert run(["inspect", *arguments, "--samples=16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["structure"], found["samples"]) == ("unit_wise", 16)
    assert [layer["positions"] for layer in found["layers"]] == [36, 1]
    assert found["parameters"] == sum(layer["parameters"] for layer in found["layers"]) == 90
    assert found["memory"] == sum(layer["memory"] for layer in found["layers"]) > 0


def test_the_environment_says_where_built_in_data_are(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("NATGRAD_DATA", str(tmp_path / "nowhere"))
    for command in (["compare"], ["theory", "dynamics"]):
        sentence = refused(capsys, run([*command, "--data=mnist", f"--output={tmp_path / 'out'}"]))
        assert f"{tmp_path / 'nowhere'} does not exist" in sentence


def test_inspect_shows_layers_and_costs(capsys):
    shape = "--input-shape=1,8,8"
    assert run(["inspect", "tests.test_cli:small_network", shape, "--samples=16"]) == 0
    printed = capsys.readouterr().out
    for text in ("Conv2d", "Linear", "36", "10 x 10", "kfac", "16 samples"):
        assert text in printed


def test_inspect_shows_the_spectrum_on_data(capsys):
    arguments = ["tests.test_cli:small_network", "--data=tests.test_cli:small_data"]
    assert run(["inspect", *arguments, "--fisher=exact"]) == 0
    printed = capsys.readouterr().out
    for text in ("on 12 samples: 90 eigenvalues", "eigenvector in", "less, or zero", "dimension"):
        assert text in printed
    assert run(["inspect", *arguments, "--fisher=exact", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["spectrum"]
    assert (found["samples"], found["parameters"], len(found["top"])) == (12, 90, 10)
    assert sum(found["decades"].values()) + found["rest"] == pytest.approx(90)


def small_data():
    import torch

    return [(torch.randn(6, 1, 8, 8), torch.randint(0, 10, (6,))) for _ in range(2)]


def small_network():
    from torch import nn

    layers = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(4, 10))


def for_pixels():
    from torch import nn

    return nn.Conv2d(1, 3, 3, padding=1), nn.CrossEntropyLoss(ignore_index=255)


def pixels():
    import torch

    labels = torch.randint(0, 3, (6, 4, 4))
    labels[:, 0] = 255
    return [(torch.randn(6, 1, 4, 4), labels)]


def test_inspect_takes_the_loss_of_the_factory_and_the_positions_of_the_data(capsys):
    arguments = ["tests.test_cli:for_pixels", "--data=tests.test_cli:pixels", "--fisher=empirical"]
    assert run(["inspect", *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [layer["positions"] for layer in found["layers"]] == [16]
    assert found["spectrum"]["trace"] > 0
    sentence = refused(capsys, run(["inspect", "tests.test_cli:two_networks"]))
    assert "likelihood behind the factory's loss cannot be told: give --likelihood" in sentence


def two_networks():
    from torch import nn

    return nn.Linear(3, 4), nn.Linear(4, 1)


def test_inspect_leaves_out_columns_where_the_terminal_is_narrow(capsys, monkeypatch):
    from rich.console import Console

    for width, kept in ((60, False), (120, True)):
        narrow = functools.partial(Console, width=width)
        monkeypatch.setattr(sys.modules["natgrad.cli.inspect"], "make_console", narrow)
        assert run(["inspect", "tests.test_cli:small_network"]) == 0
        printed = capsys.readouterr().out
        assert "…" not in printed and ("10 x 10" in printed) == kept
        assert max(map(len, printed.splitlines())) <= width


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tests.test_cli"], "package.module:factory"),
        (["absent_package.module:factory"], "cannot be imported"),
        (["tests.test_cli:small_network", "--structure=cubic"], "cubic"),
        (["tests.test_cli:small_network", "--samples=0"], "at least 1"),
        (["tests.test_cli:small_network", "--data-samples=0"], "at least 1"),
        (["tests.test_cli:small_network", "--data=tests.test_cli:nothing"], "no attribute"),
        (["tests.test_cli:small_network", "--input-shape=3"], "fails on the example"),
        ([], "Missing argument"),
    ],
)
def test_inspect_refuses_wrong_input(capsys, arguments, message):
    assert message in refused(capsys, run(["inspect", *arguments]))
