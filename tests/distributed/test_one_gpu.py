"""Wrapped, sharded and cut models on a GPU, in a group of NCCL that has one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import natgrad
from natgrad.distributed.shards import whole
from tests.distributed.networks import batch, make

OPTIMIZERS = ("KFAC", "EKFAC", "SINGD", "FNGD", "ExactNGD")
WAYS = ("wrapped", "in shards", "in pieces", "in shards of pieces")


def shared(way: str, model: Any) -> Any:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = torch.distributed.init_device_mesh("cuda", (1, 1), mesh_dim_names=("data", "pieces"))
    if way == "wrapped":
        return DistributedDataParallel(model)
    if "pieces" in way:
        parallelize_module(model, mesh["pieces"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    for layer in (model[0], model[2], model) if "shards" in way else ():
        fully_shard(layer, mesh=mesh["data"])
    return model


def train(optimizer: str, way: str | None) -> Tensor:
    """Train, and load what distributed checkpoints see of it, in the middle."""
    from torch.distributed.checkpoint import state_dict as states

    plain = make("mlp").cuda()
    model = plain if way is None else shared(way, plain)
    made = getattr(natgrad, optimizer)(model)
    for step in range(4):
        x, y = (one.cuda() for one in batch("mlp", step))
        made.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        made.step()
        if step == 1 and way is not None:
            found = states.get_state_dict(model, made)
            states.set_state_dict(model, made, model_state_dict=found[0], optim_state_dict=found[1])
    return torch.cat([whole(p).detach().flatten() for p in plain.parameters()]).cpu()


def differences(folder: str) -> dict[str, float]:
    """Return how far each way leads from where the plain model ends, over the way moved."""
    found: dict[str, float] = {}
    torch.distributed.init_process_group(
        "nccl", init_method=f"file://{folder}/meeting", rank=0, world_size=1
    )
    try:
        start = torch.cat([p.detach().flatten() for p in make("mlp").parameters()])
        for optimizer in OPTIMIZERS:
            alone = train(optimizer, None)
            for way in WAYS:
                error = (train(optimizer, way) - alone).norm() / (alone - start).norm()
                found[f"{optimizer} {way}"] = float(error)
    finally:
        torch.distributed.destroy_process_group()
    return found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.filterwarnings("ignore")
def test_one_process_of_nccl_takes_the_steps_of_one(tmp_path: Any) -> None:
    found = differences(str(tmp_path))
    assert {name: error for name, error in found.items() if not error < 1e-10} == {}
