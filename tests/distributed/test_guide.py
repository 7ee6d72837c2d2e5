"""The guide's code blocks, one after the other, and its example, in two processes."""

from __future__ import annotations

import os
import re
import signal
import socket
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.nn import functional

import natgrad
from tests import processes
from tests.scripts import run_script

GUIDE = Path(__file__).parents[2] / "docs" / "distributed.md"
EXAMPLE = Path(__file__).parents[2] / "examples" / "distributed_images.py"
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
    loader, unequal = (
        torch.utils.data.DataLoader(data, batch_size=size) for size in (8, 8 + 4 * rank)
    )
    names: dict[str, Any] = {
        "torch": torch, "natgrad": natgrad, "F": functional, "model": model, "loader": loader,
    }  # fmt: skip
    before = [p.clone() for p in model.parameters()]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="natgrad")
        for block in BLOCKS:
            names["loader"] = unequal if "islice" in block else loader
            exec(compile(block, str(GUIDE), "exec"), names)
    moved = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
    result = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.save((all(moved), result), f"{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)


@pytest.mark.slow
def test_the_guide_runs(tmp_path: Path) -> None:
    assert len(BLOCKS) == 8
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (tmp_path / "port").write_text(str(free.getsockname()[1]))
    processes.replicas(run, tmp_path)
    (moved, first), (_, second) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert moved and torch.equal(first, second) and first.isfinite().all()


def write_images(folder: Path) -> None:
    """Write a tiny Fashion-MNIST."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 64), ("t10k", 10)):
        images = generator.integers(0, 256, (count, 28, 28))
        for kind, array in (("images-idx3", images), ("labels-idx1", np.arange(count) % 10)):
            head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            content = head + array.astype(np.uint8).tobytes()
            (folder / f"{part}-{kind}-ubyte").write_bytes(content)


def printed(arguments: list[str]) -> list[str]:
    """Run the example; return the loss and accuracy that it prints."""
    done = run_script(EXAMPLE, *arguments, "--double", "--epochs=1", "--samples=64")
    assert done.returncode == 0, done.stdout + done.stderr
    return re.findall(r"epoch 1: (loss \S+, test accuracy \S+)", done.stdout)


def torchrun(function: Any, *arguments: Any, restarts: int = 0) -> list[Any]:
    """Do what ``torchrun --standalone --nproc_per_node 2`` does, with a function for a script."""
    handled = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    kept = {number: signal.getsignal(number) for number in handled}
    config = LaunchConfig(
        1, 1, 2, run_id="guide", rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        start_method="forkserver", max_restarts=restarts, local_addr="localhost",
    )  # fmt: skip
    try:
        found = elastic_launch(config, function)(*arguments)
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
    return [found[rank] for rank in sorted(found)]


@pytest.mark.slow
def test_the_example_prints_the_same_under_torchrun(tmp_path: Path) -> None:
    write_images(tmp_path)
    arguments = ["--data", str(tmp_path), "--batch-size=16"]
    (alone,) = printed(arguments)
    for options in ([], ["--shard"]):
        assert torchrun(printed, [*arguments, *options]) == [[alone], []]
