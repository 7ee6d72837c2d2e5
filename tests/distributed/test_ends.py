"""Processes that die: the others end, too, and torchrun's next attempt goes on where they were."""

from __future__ import annotations

import datetime
import os
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from tests import processes
from tests.distributed.networks import batch, make, soon, weights
from tests.distributed.test_guide import torchrun
from tests.methods import make_optimizer

pytestmark = pytest.mark.slow

STEPS = 6


def optimizer_of(model: nn.Module) -> Any:
    return make_optimizer(natgrad.KFAC, model, **soon(natgrad.KFAC))


def take_step(model: nn.Module, optimizer: Any, step: int, rank: int | None) -> None:
    x, y = batch("mlp", step)
    if rank is not None:
        x, y = x.chunk(2)[rank], y.chunk(2)[rank]
    optimizer.zero_grad()
    functional.cross_entropy(model(x), y).backward()
    optimizer.step()


def left_alone(rank: int, folder: str, way: str) -> None:
    """The second process dies, or stops, before a step with an update."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/{way}", rank=rank, world_size=2,
        timeout=datetime.timedelta(seconds=4),
    )  # fmt: skip
    model = nn.parallel.DistributedDataParallel(make("mlp"))
    optimizer = optimizer_of(model)
    for step in range(3):
        if step == 2 and rank:
            time.sleep(30.0 if way == "stops" else 0.0)
            os._exit(1)
        begin = time.monotonic()
        try:
            take_step(model, optimizer, step, rank)
        except RuntimeError:
            took = time.monotonic() - begin
            Path(folder, f"{way}.txt").write_text(f"{took}\n{traceback.format_exc()}")
            os._exit(0)


@pytest.mark.parametrize("way", ["dies", "stops"])
def test_a_process_left_alone_ends_and_names_the_collective(tmp_path: Path, way: str) -> None:
    both = [processes.start(left_alone, rank, str(tmp_path), way) for rank in range(2)]
    assert processes.finish(both[0], 60.0) == 0
    both[1].kill()
    both[1].join()
    took, _, said = (tmp_path / f"{way}.txt").read_text().partition("\n")
    assert float(took) < 20
    assert "in all_gather" in said or "in all_reduce" in said


def attempt(folder: str) -> Tensor:
    """Train, and save after every step; the first attempt ends in the middle of a step."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank, path = torch.distributed.get_rank(), Path(folder, "checkpoint.pt")
    plain = make("mlp")
    model = nn.parallel.DistributedDataParallel(plain)
    optimizer = optimizer_of(model)
    begin = 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        plain.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        begin = saved["step"]
    for step in range(begin, STEPS):
        if step == 3 and rank and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            raise RuntimeError("this process ends")
        take_step(model, optimizer, step, rank)
        state = {"model": plain.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
        if rank == 0:
            torch.save(state, path.with_suffix(".new"))
            path.with_suffix(".new").rename(path)
        torch.distributed.barrier()
    return torch.cat([weights(plain), torch.tensor([float(begin)])])


def test_torchrun_goes_on_after_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Else the second attempt may find the addresses of the first one in torch's store.
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    first, second = torchrun(attempt, str(tmp_path), restarts=1)
    assert torch.equal(first, second) and first[-1] == 3
    plain = make("mlp")
    optimizer = optimizer_of(plain)
    for step in range(STEPS):
        take_step(plain, optimizer, step, None)
    alone, start = weights(plain), weights(make("mlp"))
    assert float((first[:-1] - alone).norm() / (alone - start).norm()) < 1e-10
