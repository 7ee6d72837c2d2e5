"""Code in processes of their own, forked from a server that has loaded torch once."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

#: For tests of parameters in shards, which torch 2.6 does not keep on CPUs.
shards_on_cpus = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="this torch shards on GPUs only"
)

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "torch.distributed",
        "torch.distributed.checkpoint",
        "torch._dynamo",
        "natgrad.decentralized",
        "natgrad.experiments.methods",
        "natgrad.optim",
        "natgrad.residuals",
        "natgrad.wave_functions",
        "matplotlib.pyplot",
        "rich.progress",
        "pytest",
        "hypothesis",
    ]
)
#: Seconds after which a process is taken to hang.
PATIENCE = 240.0
#: How the report of a process begins that died in native code.
FATAL = "Fatal Python error"


class NativeCrash(RuntimeError):
    """A process died in native code."""


def start(function: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Start a function in a process of its own, with one thread."""
    process = CONTEXT.Process(target=_call, args=(function, *arguments))
    process.start()
    return process


def _call(function: Callable[..., None], *arguments: Any) -> None:
    torch.set_num_threads(1)
    function(*arguments)


def finish(process: BaseProcess, timeout: float = PATIENCE) -> int | None:
    """Wait for the end of a process; return its exit status."""
    process.join(timeout)
    if process.is_alive():
        process.kill()
        raise TimeoutError(f"the process still ran after {timeout:g} seconds")
    return process.exitcode


def replicas(function: Callable[[int, int, str], None], folder: Path, world: int = 2) -> None:
    """Run ``function(rank, world, folder)`` in every process; it joins a group and saves itself."""
    torch.multiprocessing.start_processes(
        function, (world, str(folder)), nprocs=world, start_method="forkserver"
    )


def run(
    function: Callable[..., Any],
    *arguments: Any,
    world: int = 2,
    join: bool = True,
    timeout: float = PATIENCE,
) -> list[Any]:
    """Run ``function(rank, *arguments)`` in every process of a group; return what they return.

    Where one dies in native code (torch's own, as natgrad has none; seen once, in gloo's processes
    with shards of layers in pieces) all are started once more, and a warning says so.

    Args:
        function: A function of a module.
        arguments: What it is given besides the rank.
        world: Number of processes.
        join: Whether they form torch's group of gloo; else the function does it itself.
        timeout: Seconds after which a process tells where it is and fails.

    Raises:
        RuntimeError: If a process raises, dies or hangs; with its traceback.
    """
    try:
        return _run(function, arguments, world, join, timeout)
    except NativeCrash as crash:
        warnings.warn(f"started again: {crash}", stacklevel=2)
        return _run(function, arguments, world, join, timeout)


def _run(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    world: int,
    join: bool,
    timeout: float,
) -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        shared = (function, arguments, world, join, timeout, folder)
        group = torch.multiprocessing.start_processes(
            _member, shared, nprocs=world, join=False, start_method="forkserver"
        )
        latest = time.monotonic() + timeout + 30
        try:
            while not group.join(max(0.0, latest - time.monotonic())):
                if time.monotonic() > latest:
                    raise TimeoutError(f"processes still ran after {timeout:g} seconds")
        except Exception as error:
            for process in group.processes:
                process.kill()
            said = [file.read_text() for file in sorted(Path(folder).glob("*.txt"))]
            message = f"{function.__name__} failed: {error}\n{''.join(said)}"
            crashes = [one[one.index(FATAL) :].splitlines()[:12] for one in said if FATAL in one]
            if crashes:  # Last, as the ends of long reports are what is read.
                raise NativeCrash("\n".join([message, *map("\n".join, crashes)])) from None
            raise RuntimeError(message) from None
        files = (f"{folder}/{rank}.pt" for rank in range(world))
        return [torch.load(file, weights_only=False) for file in files]


def _member(
    rank: int,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    world: int,
    join: bool,
    timeout: float,
    folder: str,
) -> None:
    stack = open(f"{folder}/{rank}.txt", "w")
    faulthandler.enable(stack)
    faulthandler.dump_traceback_later(timeout, exit=True, file=stack)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if join:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
        )
    torch.save(function(rank, *arguments), f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    # Tearing a gloo group down while a wrapper is alive can deadlock inside torch.
    os._exit(0)
