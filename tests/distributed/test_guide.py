"""The guide's code blocks, one after the other, and its example, in two processes."""

from __future__ import annotations

import os
import re
import socket
import struct
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import natgrad
from tests import processes

GUIDE = Path(__file__).parents[2] / "docs" / "distributed.md"
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.S)


def run(rank: int, world: int, path: str) -> None:
    os.chdir(path)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=Path("port").read_text(),
    )  # fmt: skip
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    torch.manual_seed(rank)
    data = torch.utils.data.TensorDataset(torch.randn(48, 6), torch.randint(0, 3, (48,)))
    loader = torch.utils.data.DataLoader(data, batch_size=8)
    names: dict[str, Any] = {
        "torch": torch, "natgrad": natgrad, "F": functional, "model": model, "loader": loader,
    }  # fmt: skip
    before = [p.clone() for p in model.parameters()]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="natgrad")
        for block in BLOCKS:
            exec(compile(block, str(GUIDE), "exec"), names)
    moved = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
    result = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.save((all(moved), result), f"{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)


@pytest.mark.slow
def test_the_guide_runs(tmp_path: Path) -> None:
    assert len(BLOCKS) == 7
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (tmp_path / "port").write_text(str(free.getsockname()[1]))
    processes.replicas(run, tmp_path)
    (moved, first), (_, second) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert moved and torch.equal(first, second) and first.isfinite().all()


# Not of the example: another test took the port; a thread of gloo outlived Python (torch 2.13).
OF_THE_LAUNCH = ("EADDRINUSE", "terminate called without an active exception")


def write_images(folder: Path) -> None:
    """Write a tiny Fashion-MNIST."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 64), ("t10k", 10)):
        images = generator.integers(0, 256, (count, 28, 28))
        for kind, array in (("images-idx3", images), ("labels-idx1", np.arange(count) % 10)):
            head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            content = head + array.astype(np.uint8).tobytes()
            (folder / f"{part}-{kind}-ubyte").write_bytes(content)


@pytest.mark.slow
def test_the_example_prints_the_same_under_torchrun(tmp_path: Path) -> None:
    write_images(tmp_path)
    script = str(Path(__file__).parents[2] / "examples" / "distributed_images.py")
    arguments = [script, "--data", str(tmp_path), "--double", "--epochs", "1"]
    arguments += ["--samples", "64", "--batch-size", "16"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    printed = []
    for command in ([*arguments], [*launcher, *arguments], [*launcher, *arguments, "--shard"]):
        for _ in range(4):
            result = subprocess.run(
                [sys.executable, *command], env=environment, capture_output=True, text=True,
                timeout=200,
            )  # fmt: skip
            if not any(fault in result.stderr for fault in OF_THE_LAUNCH):
                break
        assert result.returncode == 0, result.stdout + result.stderr
        printed.append(re.findall(r"epoch 1: (loss \S+, test accuracy \S+)", result.stdout))
    assert printed[0] == printed[1] == printed[2] and len(printed[0]) == 1
