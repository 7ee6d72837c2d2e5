"""A CNN on Fashion-MNIST by K-FAC in several processes: replicas, or shards of FSDP2.

    torchrun --nproc_per_node 2 examples/distributed_images.py --data DIR            # DDP
    torchrun --nproc_per_node 2 examples/distributed_images.py --data DIR --shard    # FSDP2
    python examples/distributed_images.py --data DIR                                 # one process

DIR (or the environment variable NATGRAD_DATA) holds Fashion-MNIST. All three train on the same
joint batches: with ``--double`` they print the same numbers, in single precision rounding drives
them apart a little. With GPUs each process takes one.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from natgrad.experiments.data import DataError, load_dataset


def network() -> nn.Sequential:
    """Return a small convolutional network, the same in every process."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(784, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def spread(model: nn.Sequential, shard: bool) -> Any:
    """Return the model in replicas or in shards; in one process as it is."""
    if not dist.is_initialized():
        return model
    if not shard:
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    for layer in model:
        if any(True for _ in layer.parameters()):
            fully_shard(layer)
    return fully_shard(model)


def mean(value: Tensor) -> float:
    """Return the mean over all processes."""
    value = value.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return float(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("NATGRAD_DATA"))
    parser.add_argument("--shard", action="store_true", help="FSDP2 instead of replicas")
    parser.add_argument("--double", action="store_true", help="in float64")
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=256, help="of all processes together")
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()
    if options.data is None:
        parser.error("--data or NATGRAD_DATA must name the folder of Fashion-MNIST")
    rank, world = 0, 1
    if "RANK" in os.environ:
        dist.init_process_group()
        rank, world = dist.get_rank(), dist.get_world_size()
    has_gpu = torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if has_gpu else "cpu")
    try:
        data = load_dataset("fashion_mnist", options.data, train_samples=options.samples)
    except DataError as error:
        parser.error(str(error))
    dtype = torch.float64 if options.double else torch.float32
    model = spread(network().to(device, dtype), options.shard)
    optimizer = natgrad.KFAC(model)
    steps = options.epochs * (len(data.train_inputs) // options.batch_size)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    order, start = torch.Generator().manual_seed(0), time.perf_counter()
    for epoch in range(options.epochs):
        shuffled = torch.randperm(len(data.train_inputs), generator=order)
        for batch in shuffled.split(options.batch_size)[: steps // options.epochs]:
            own = batch.chunk(world)[rank]
            x, y = data.train_inputs[own].to(device, dtype), data.train_labels[own].to(device)
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x.reshape(-1, 1, 28, 28)), y)
            loss.backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            x, y = data.test_inputs.to(device, dtype), data.test_labels.to(device)
            right = model(x.reshape(-1, 1, 28, 28)).argmax(1) == y
        accuracy, last = 100 * mean(right.float().mean()), mean(loss)
        if rank == 0:
            took = time.perf_counter() - start
            print(
                f"epoch {epoch + 1}: loss {last:.4f}, test accuracy {accuracy:.2f} %, {took:.0f} s"
            )
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
