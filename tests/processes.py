"""Code in processes of their own, forked from a server that has loaded torch once."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "torch.distributed",
        "torch._dynamo",
        "natgrad",
        "matplotlib.pyplot",
        "rich.progress",
        "pytest",
    ]
)


def start(function: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Start a function in a process of its own, with one thread."""
    process = CONTEXT.Process(target=_call, args=(function, *arguments))
    process.start()
    return process


def _call(function: Callable[..., None], *arguments: Any) -> None:
    torch.set_num_threads(1)
    function(*arguments)


def finish(process: BaseProcess, timeout: float = 240) -> int | None:
    """Wait for the end of a process; return its exit status."""
    process.join(timeout)
    if process.is_alive():
        process.kill()
        raise TimeoutError(f"the process still ran after {timeout:g} seconds")
    return process.exitcode


def replicas(function: Callable[[int, int, str], None], folder: Path, world: int = 2) -> None:
    """Run ``function(rank, world, folder)`` in every replica of a group."""
    torch.multiprocessing.start_processes(
        function, (world, str(folder)), nprocs=world, start_method="forkserver"
    )


def run_script(
    path: Path, *arguments: str | Path, folder: Path, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run a script as ``python path arguments`` does; what it prints goes through a folder."""
    files = [folder / f"{path.stem}.{stream}" for stream in ("stdout", "stderr")]
    command = [str(path), *map(str, arguments)]
    status = finish(start(_run_script, command, files, environment))
    assert status is not None
    return subprocess.CompletedProcess(command, status, *(file.read_text() for file in files))


def _run_script(command: list[str], files: list[Path], environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for stream, file in zip((1, 2), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    runpy.run_path(command[0], run_name="__main__")
