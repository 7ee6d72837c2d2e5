"""No connection is opened by importing natgrad, training with it, or its commands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

#: An audit hook, which Python code cannot get round or take off again.
FORBID = """
import sys

def forbid(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        raise RuntimeError(f"the network was used: {event} {arguments}")

sys.addaudithook(forbid)
"""

TRAIN = """
import torch, natgrad
model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
optimizer = natgrad.KFAC(model)
x, y = torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 0])
torch.nn.functional.cross_entropy(model(x), y).backward()
optimizer.step()
natgrad.Laplace(model, [(x, y)], "categorical").predict(x)
"""

COMPARE = """
from natgrad.cli import run
options = ["--train-samples=30", "--test-samples=20", "--width=8", "--steps=2", "--no-quality"]
rates = ["--methods=sgd,kfac", "--learning-rate=sgd=0.1"]
status = run(["compare", *options, *rates, "--first-order-steps=2", f"--output={sys.argv[1]}"])
assert status == 0, status
"""

CONNECT = "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')"


def runs(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", FORBID + program, str(folder)]
    return subprocess.run(command, capture_output=True, text=True)


def test_nothing_is_asked_of_the_network(tmp_path: Path) -> None:
    done = runs(TRAIN + COMPARE, tmp_path / "out")
    assert done.returncode == 0, done.stderr


def test_a_connection_would_be_noticed(tmp_path: Path) -> None:
    done = runs(CONNECT, tmp_path)
    assert done.returncode != 0 and "the network was used" in done.stderr
