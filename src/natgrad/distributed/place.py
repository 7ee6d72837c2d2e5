"""Where the samples of a process are in the batch of all processes, and random numbers for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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
