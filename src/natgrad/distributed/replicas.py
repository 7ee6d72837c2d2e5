"""Data-parallel processes: averages over them, and which samples of a batch each has."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.distributed.exchange import (
    Outlines,
    Sum,
    gathered,
    laid_end_to_end,
    passed_round,
)
from natgrad.distributed.shards import is_sharded, reduces_gradients


@dataclass(frozen=True)
class Place:
    """Which samples of a batch a process has; by default all.

    Attributes:
        before: Samples of the processes of lower rank.
        samples: Its own.
        total: Those of all processes.
    """

    before: int = 0
    samples: int = 1
    total: int = 1

    @property
    def is_shared(self) -> bool:
        """Whether other processes have samples, too."""
        return self.total > self.samples

    def of_all(self, samples: int) -> int:
        """Return how many samples all processes have of a layer of which this one has some.

        It may have several for each sample of the batch.
        """
        return -(-samples * self.total // self.samples) if self.is_shared else samples


WHOLE_BATCH = Place()


class PlacedGenerator(torch.Generator):
    """A generator that knows the place of the samples it draws for.

    Attributes:
        place: The place; all of the batch by default.
    """

    place: Place = WHOLE_BATCH


def drawn(
    fill: Callable[..., Tensor],
    shape: Sequence[int],
    generator: torch.Generator | None,
    *,
    dim: int = 0,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Return random numbers that depend on the place of a sample in the batch of all processes.

    Every process draws for all samples and takes those of its own, so that their number changes
    nothing.

    Args:
        fill: Fills a tensor in place, such as :meth:`torch.Tensor.normal_`.
        shape: Shape of what is returned.
        generator: Source of randomness, by default torch's global one; it may know the place.
        dim: Dimension of the samples.
        dtype: Type of the numbers.
        device: Where they are wanted; they are drawn on the generator's device.
    """
    place, own, whole = getattr(generator, "place", WHOLE_BATCH), shape[dim], list(shape)
    before = place.before if place.is_shared else 0
    if place.is_shared:
        whole[dim] += place.total - place.samples
    source = device if generator is None else generator.device
    numbers = fill(torch.empty(whole, dtype=dtype, device=source), generator=generator)
    return numbers.narrow(dim, before, own).to(device)


@dataclass(frozen=True)
class Replicas:
    """The processes that hold replicas of a model and train it together; by default this one alone.

    A process group as such says nothing about a model: where none is wrapped and none is named,
    nobody else is waited for.

    Attributes:
        group: Their process group, or None for no others.
        outlines: Of values they have exchanged.
        everyone: These and those that have other pieces of the same layers and the same samples,
            in tensor parallelism; None for these alone.
        by_wrapper: Whether passes that they make together run inside DistributedDataParallel, and
            others are those of this process alone.
    """

    group: Any = None
    outlines: Outlines = field(default_factory=dict, compare=False, repr=False)
    everyone: Any = None
    by_wrapper: bool = False

    @classmethod
    def of(cls, model: nn.Module, process_group: Any = None) -> Replicas:
        """Return the replicas of a model.

        Args:
            model: The model, perhaps inside DistributedDataParallel, or compiled.
            process_group: Their group, where no wrapper tells.
        """
        while process_group is None:
            if isinstance(model, nn.parallel.DistributedDataParallel):
                return cls._of_wrapper(model)
            inner = getattr(model, "_orig_mod", None)
            if not isinstance(inner, nn.Module):
                break
            model = inner
        return cls(process_group)

    @classmethod
    def _of_wrapper(cls, wrapper: Any) -> Replicas:
        # Without the reducer of C++ no pass tells whether it is one of the wrapper.
        return cls(wrapper.process_group, by_wrapper=not wrapper._use_python_reducer)

    def found_around(self, model: nn.Module) -> Replicas | None:
        """Return the replicas that the present forward pass of a model tells of.

        It may have been wrapped after the optimizer was made. None if the pass goes past the
        wrapper, as where the first process evaluates.

        Raises:
            ValueError: If it runs inside :class:`torch.distributed.algorithms.Join`, or is that of
                a stage of a pipeline.
        """
        _refuse_stages()
        wrapper = _wrapper_around(model)
        if wrapper is None:
            return None if self.by_wrapper else self
        if wrapper._join_config.enable:
            raise ValueError(
                "inside torch's Join some processes stop earlier than others, and curvature needs "
                "all of them in every step: leave Join out, and let those that have no batch left "
                "go on with empty ones (x[:0]), as docs/distributed.md shows"
            )
        return self if self.group is not None else self._of_wrapper(wrapper)

    @staticmethod
    def average_after(model: nn.Module) -> bool:
        """Return whether the backward pass of the present forward pass averages gradients.

        It does not inside ``no_sync``, where another pass follows.
        """
        wrapper = _wrapper_around(model)
        if wrapper is not None:
            return bool(wrapper.require_backward_grad_sync)
        return reduces_gradients(model)

    @cached_property
    def number(self) -> int:
        """How many there are."""
        return 1 if self.group is None else torch.distributed.get_world_size(self.group)

    @cached_property
    def rank(self) -> int:
        """The number of this one among them."""
        return 0 if self.group is None else torch.distributed.get_rank(self.group)

    @cached_property
    def are_alone(self) -> bool:
        """Whether there is nobody else to wait for."""
        return self.number == 1

    def average(self, values: Mapping[str, Tensor]) -> None:
        """Average values over the replicas in place, so that they stay equal.

        Over all that have a piece of the model, as of those in shards each measures its own.
        """
        if self.are_alone or not values:
            return
        group = self.group if self.everyone is None else self.everyone
        number, each = torch.distributed.get_world_size(group), list(values.values())
        for dtype in sorted({value.dtype for value in each}, key=str):
            own = [value for value in each if value.dtype == dtype]
            flat = torch.cat([value.reshape(-1).to(own[0].device) for value in own])
            torch.distributed.all_reduce(flat, group=group)
            pieces = flat.div_(number).split([value.numel() for value in own])
            for value, piece in zip(own, pieces, strict=True):
                value.copy_(piece.view_as(value))

    def follow_first(self, values: Iterable[Tensor]) -> None:
        """Set values, in place, to those of the first of them, but for shards, which differ."""
        first = torch.distributed.get_global_rank(self.group, 0)
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for value in (one for one in values if not is_sharded(one)):
            by_type.setdefault(value.dtype, []).append(value.detach())
        for dtype in sorted(by_type, key=str):
            own = by_type[dtype]
            flat = torch.cat([value.reshape(-1) for value in own])
            torch.distributed.broadcast(flat, first, group=self.group)
            pieces = flat.split([value.numel() for value in own])
            for value, piece in zip(own, pieces, strict=True):
                value.copy_(piece.view_as(value))

    def told(self, numbers: Sequence[int], device: torch.device) -> list[list[int]]:
        """Return what each of them tells, in the order of ranks.

        Args:
            numbers: What this one tells.
            device: Where the group sends from.
        """
        own = torch.tensor(numbers, device=device)
        found = [torch.empty_like(own) for _ in range(self.number)]
        torch.distributed.all_gather(found, own, group=self.group)
        return torch.stack(found).tolist()

    def any(self, flag: bool, device: torch.device) -> bool:
        """Return whether a flag is up in one of them."""
        return flag if self.are_alone else any(one for (one,) in self.told([int(flag)], device))

    def gathered(
        self,
        value: Any,
        device: torch.device,
        owner: int | None = None,
        like: Sequence[Any] | None = None,
    ) -> list[Any]:
        """Return a value of nested tensors of each, see :mod:`natgrad.distributed.exchange`.

        Args:
            value: What this one has.
            device: Where tensors lie.
            owner: The one that wants them; all by default.
            like: What each has, as tensors on the meta device, where all know that.
        """
        if self.are_alone:
            return [value]
        return gathered(value, self.group, device, self.outlines, owner, like)

    def summed(self, value: Any, device: torch.device) -> Any:
        """Return the sum of a value of nested tensors, likewise."""
        if self.are_alone:
            return value
        return Sum(value, self.group, device, self.outlines).result()

    def passed_round(self, value: Any, device: torch.device, steps: int) -> Iterator[Any]:
        """Yield values of others, likewise, that are passed on from one process to the next."""
        return passed_round(value, self.group, device, self.outlines, steps)

    def laid_end_to_end(self, own: Tensor, lengths: Sequence[int]) -> Tensor:
        """Return the rows ``(n_r, ...)`` of all of them, of which each has so many."""
        if self.are_alone:
            return own
        return laid_end_to_end(own, lengths, self.group)

    def added_up(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor that all of them have in the same shape."""
        if self.are_alone:
            return value
        total = value.contiguous().clone()
        torch.distributed.all_reduce(total, group=self.group)
        return total

    def placed(
        self, samples: int, flags: Sequence[bool], device: torch.device
    ) -> tuple[Place, list[list[bool]]]:
        """Return which samples of a batch are those of this process, and the flags of each.

        Args:
            samples: How many it has.
            flags: What the others are to know of.
            device: Where the group sends from.
        """
        if self.are_alone:
            return WHOLE_BATCH, [list(flags)]
        each = self.told([samples, *map(int, flags)], device)
        numbers = [one[0] for one in each]
        place = Place(sum(numbers[: self.rank]), samples, sum(numbers))
        return place, [[bool(flag) for flag in one[1:]] for one in each]


def check_alone(model: nn.Module, what: str) -> None:
    """Raise a ValueError for a model of several processes, of which each would see its own data."""
    if not Replicas.of(model).are_alone:
        raise ValueError(
            f"{what} is made of the data of one process, and the model is in "
            "DistributedDataParallel: pass model.module, and all of the data, in one process or in "
            "each"
        )


def _refuse_stages() -> None:
    """Raise a ValueError in a forward pass of a stage of torch's pipelines."""
    package = "torch.distributed.pipelining."
    frame = sys._getframe() if f"{package}stage" in sys.modules else None
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith(package):
            raise ValueError(
                "the model is a stage of a pipeline (torch.distributed.pipelining), of which the "
                "last one alone has the output that curvature is of: share the layers with "
                "fully_shard or parallelize_module in place of stages"
            )
        frame = frame.f_back


def _wrapper_around(model: nn.Module) -> Any:
    """Return the wrapper whose forward pass runs and holds a model; refuse what is no module."""
    if hasattr(model, "set_requires_gradient_sync") and not hasattr(model, "unshard"):
        raise ValueError(
            "the model is replicated by replicate() of torch.distributed._composable, which shows "
            "no one that its passes are of several processes: wrap it in DistributedDataParallel"
        )
    wrapper = nn.parallel.DistributedDataParallel._active_ddp_module
    holds = wrapper is not None and any(module is model for module in wrapper.modules())
    return wrapper if holds else None
