"""Peak memory of a process whose model is sharded by fully_shard, beside AdamW's.

python benchmarks/sharded_memory.py               # a transformer of 13 million parameters
python benchmarks/sharded_memory.py --ranks 1,2   # in one and in two processes (gloo, CPU)

The peak is that of the resident memory of the first process above where it was before the model was
made, over seven steps with two updates of the curvature.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
from networks import Transformer
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

import natgrad
from natgrad.experiments.memory import PeakMemory

WORDS, WIDTH, LAYERS, LENGTH, SAMPLES, STEPS = 512, 512, 4, 32, 4, 7

Make = Callable[[nn.Module], torch.optim.Optimizer]


def kfac(sharing: str) -> Make:
    refresh = natgrad.Refresh(factors=5, inverses=5, early=False, sharing=sharing)
    return lambda model: natgrad.KFAC(model, refresh=refresh)


#: Name → what makes the optimizer of a sharded model.
OPTIMIZERS: dict[str, Make] = {
    "SGD, momentum": lambda model: torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters()),
    "KFAC": kfac("inverses"),
    "KFAC, memory": kfac("memory"),
}


def train(name: str) -> None:
    torch.manual_seed(0)
    model: Any = Transformer(WIDTH, LAYERS, 8, WORDS, LENGTH)
    for block in model.blocks:
        fully_shard(block)
    optimizer = OPTIMIZERS[name](fully_shard(model))
    tokens = torch.randint(WORDS, (SAMPLES, LENGTH + 1))
    for _ in range(STEPS):
        optimizer.zero_grad()
        output = model(tokens[:, :-1])
        functional.cross_entropy(output.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()


def member(rank: int, world: int, name: str, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # Of torch, about the views that modules return.
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    fully_shard(nn.Linear(2, 2))  # What is loaded at first use is nobody's.
    with PeakMemory(torch.device("cpu")) as peak:
        train(name)
    if rank == 0:
        torch.save(peak.bytes, f"{folder}/peak.pt")
    torch.distributed.barrier()


def measured(world: int, name: str) -> float:
    """Return the peak of the first process in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            member, (world, name, folder), nprocs=world, start_method="spawn"
        )
        return float(torch.load(f"{folder}/peak.pt")) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", default="1,2,4", help="numbers of processes")
    ranks = [int(one) for one in parser.parse_args().ranks.split(",")]
    with torch.device("meta"):
        size = sum(p.numel() for p in Transformer(WIDTH, LAYERS, 8, WORDS, LENGTH).parameters())
    print(f"{size:,} parameters, {size * 4 / 2**20:.0f} MiB; torch {torch.__version__}, "
          f"{platform.processor() or platform.machine()}")  # fmt: skip
    print(f"{'peak MiB of a process':<24}" + "".join(f"{world:>8}" for world in ranks))
    for name in OPTIMIZERS:
        row = [measured(world, name) for world in ranks]
        print(f"{name:<24}" + "".join(f"{one:8.0f}" for one in row), flush=True)


if __name__ == "__main__":
    main()
