"""Averages over data-parallel processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Replicas"]


@dataclass(frozen=True)
class Replicas:
    """The processes that hold replicas of a model and train it together; by default this one alone.

    A process group as such says nothing about a model: where none is wrapped and none is named,
    nobody else is waited for.

    Attributes:
        group: Their process group, or None for no others.
    """

    group: Any = None

    @classmethod
    def of(cls, model: nn.Module, process_group: Any = None) -> Replicas:
        """Return the replicas of a model.

        Args:
            model: The model, perhaps inside DistributedDataParallel, or compiled.
            process_group: Their group, where no wrapper tells.
        """
        while process_group is None:
            if isinstance(model, nn.parallel.DistributedDataParallel):
                return cls(model.process_group)
            inner = getattr(model, "_orig_mod", None)
            if not isinstance(inner, nn.Module):
                break
            model = inner
        return cls(process_group)

    def found_around(self, model: nn.Module) -> Replicas:
        """Return the replicas that the present forward pass of a model tells of.

        It may have been wrapped after the optimizer was made.
        """
        if self.group is not None:
            return self
        wrapper = nn.parallel.DistributedDataParallel._active_ddp_module
        if wrapper is None or all(module is not model for module in wrapper.modules()):
            return self
        return Replicas(wrapper.process_group)

    def average(self, values: Mapping[str, Tensor]) -> None:
        """Average values over the replicas in place, so that they stay equal."""
        if self.group is None:
            return
        world = torch.distributed.get_world_size(self.group)
        if world == 1:
            return
        for value in values.values():
            torch.distributed.all_reduce(value, group=self.group)
            value.div_(world)
