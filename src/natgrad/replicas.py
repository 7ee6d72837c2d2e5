"""Averages over data-parallel processes."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["average_over_replicas"]


def average_over_replicas(values: dict[str, Tensor]) -> None:
    """Average values over data-parallel processes in place, so that replicas stay equal."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    world = distributed.get_world_size()
    if world == 1:
        return
    for value in values.values():
        distributed.all_reduce(value)
        value.div_(world)
