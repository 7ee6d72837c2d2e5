"""No connection is opened by natgrad's commands, nor (test_import.py) by importing and training."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from natgrad.cli import run
from tests import processes

#: An audit hook, which Python code cannot get round or take off again.
FORBID = """
import sys

def forbid(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        raise RuntimeError(f"the network was used: {event} {arguments}")

sys.addaudithook(forbid)
"""


def compare(folder: Path) -> None:
    exec(FORBID, {})
    options = ["--train-samples=30", "--test-samples=20", "--width=8", "--steps=2", "--no-quality"]
    rates = ["--methods=sgd,kfac", "--learning-rate=sgd=0.1", "--first-order-steps=2"]
    assert run(["compare", *options, *rates, f"--output={folder}"]) == 0


def test_commands_ask_nothing_of_the_network(tmp_path: Path) -> None:
    assert processes.finish(processes.start(compare, tmp_path / "out")) == 0


def test_a_connection_would_be_noticed() -> None:
    program = "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')"
    command = [sys.executable, "-c", FORBID + program]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and "the network was used" in done.stderr
