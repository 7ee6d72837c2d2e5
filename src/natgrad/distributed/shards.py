"""Parameters that FSDP2's ``fully_shard`` keeps in shards: whole where they are looked at.

A shard is never preconditioned as a matrix. Gradients are gathered, natural gradients are made of
whole matrices in every process, and each moves its own shard.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "is_sharded",
    "mesh_group",
    "own_shard",
    "shard_count",
    "sharded_like",
    "whole",
    "whole_parameters",
]


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is kept in shards."""
    return hasattr(tensor, "device_mesh")


def mesh_group(model: nn.Module) -> Any:
    """Return the processes that a model's parameters are sharded over; None if they are not.

    Those that a forward pass has left whole are sharded again, as they tell nothing.

    Raises:
        ValueError: If they are sharded otherwise than by FSDP2 over one mesh: of one dimension, or
            of two, in replicas of shards, that hold all processes.
    """
    units: list[Any] = [module for module in model.modules() if hasattr(module, "unshard")]
    for unit in units:
        unit.reshard()
    sharded: dict[str, Any] = {n: p for n, p in model.named_parameters() if is_sharded(p)}
    if not sharded:
        return None
    held = {p for unit in units for p in unit.parameters()}
    mesh = next(iter(sharded.values())).device_mesh
    for name, parameter in sharded.items():
        kinds = [placement.is_shard() for placement in parameter.placements]
        of_all = mesh.size() == torch.distributed.get_world_size()
        known = kinds == [True] or (kinds == [False, True] and of_all)
        if parameter not in held or parameter.device_mesh != mesh or not known:
            raise ValueError(
                f"parameter {name!r} is spread over {parameter.device_mesh} as "
                f"{parameter.placements}, and natgrad takes whole parameters, or those that "
                "fully_shard (FSDP2) has sharded over one mesh, in one dimension or in replicas"
            )
    return mesh.get_group() if mesh.ndim == 1 else torch.distributed.group.WORLD


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with all of its shards, in which all processes take part."""
    shards: Any = tensor
    return shards.full_tensor() if is_sharded(tensor) else tensor


def own_shard(tensor: Tensor) -> Tensor:
    """Return what this process has of a tensor."""
    shards: Any = tensor
    return shards.to_local() if is_sharded(tensor) else tensor


def shard_count(tensor: Tensor) -> int:
    """Return into how many shards a tensor is cut."""
    cut: Any = tensor
    if not is_sharded(tensor):
        return 1
    sizes = zip(cut.device_mesh.shape, cut.placements, strict=True)
    return math.prod(size for size, placement in sizes if placement.is_shard())


def sharded_like(value: Tensor, parameter: Tensor) -> Tensor:
    """Return a whole value, the same in all processes, in shards like a parameter's."""
    if not is_sharded(parameter) or is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    like: Any = parameter
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


@contextmanager
def whole_parameters(model: nn.Module, shards_again: bool = False) -> Iterator[None]:
    """Have a model's parameters whole, and keep them so through backward passes inside.

    Such passes neither reduce gradients nor shard parameters again.

    Args:
        model: The model.
        shards_again: Whether to do that at the end, as where no backward pass follows that does.
    """
    units: list[Any] = [module for module in model.modules() if hasattr(module, "unshard")]
    before = []
    for unit in units:
        unit.unshard()
        state = unit._get_fsdp_state()  # What no public method reads is only put back.
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        names = ("reduce_grads", "all_reduce_grads", "reshard_after_backward")
        held = [(state._state_ctx, "is_last_backward")]
        held += [(group, name) for group in groups if group is not None for name in names]
        before += [(owner, name, getattr(owner, name)) for owner, name in held]
    for owner, name, _ in before:
        setattr(owner, name, False)
    try:
        yield
    finally:
        for owner, name, value in reversed(before):
            setattr(owner, name, value)
        for unit in units if shards_again else ():
            unit.reshard()
