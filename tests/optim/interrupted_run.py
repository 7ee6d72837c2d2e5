"""A run that saves its state after every step and may be killed at any time."""

from __future__ import annotations

import os
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

import natgrad


def save(path: Path, state: dict[str, Any]) -> None:
    """Replace a file by another one, whatever happens meanwhile."""
    temporary = path.with_name(path.name + ".partial")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def train(path: Path, total: int, report: Connection) -> None:
    """Go on from what was saved up to a number of steps; tell every step that is saved."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 32), torch.nn.Tanh(), torch.nn.Linear(32, 3))
    optimizer = natgrad.KFAC(model, lr=0.05, refresh=natgrad.Refresh(factors=2, inverses=3))
    step = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    report.send_bytes(str(step).encode())
    while step < total:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 6, generator=generator)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), (x[:, 0] > 0).long()).backward()
        optimizer.step()
        step += 1
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        save(path, state)
        report.send_bytes(str(step).encode())
