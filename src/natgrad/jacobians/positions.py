"""How many of the positions that share a weight are enough for its second moments."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from natgrad.distributed.replicas import WHOLE_BATCH, Place
from natgrad.layouts import BlockLayout


@dataclass(frozen=True)
class Draw:
    """Which random subset of a batch's rows an update takes.

    Attributes:
        number: Number of the update, its seed.
        place: Which samples of the batch the rows are of.
    """

    number: int = 0
    place: Place = WHOLE_BATCH


FIRST_DRAW = Draw()


def random_subset(size: int, count: int, seed: int, device: torch.device) -> Tensor:
    """Return ``count`` of the indices below ``size``, drawn uniformly, in ascending order."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(size, generator=generator)[:count].sort().values
    return chosen.to(device, non_blocking=True)


def random_samples(samples: int, limit: int, draw: Draw) -> tuple[list[int] | None, float]:
    """Return which samples an update takes, at most ``limit`` in all processes, and their weight.

    None stands for all of them. They are equally far apart from a random beginning on, so that
    every sample is taken equally often and every process has its part of them.
    """
    place, total = draw.place, draw.place.of_all(samples)
    if total <= limit:
        return None, 1.0
    before = place.before * samples // place.samples if place.is_shared else 0
    begin = float(torch.rand((), generator=torch.Generator().manual_seed(draw.number)))
    chosen = [int((i + begin) * total / limit) for i in range(limit)]
    return [i - before for i in chosen if before <= i < before + samples], total / limit


def enough_rows(layout: BlockLayout, rows_per_unit: float | None) -> int | None:
    """Return how many rows suffice for a layer's factors; None where all are taken."""
    if rows_per_unit is None:
        return None
    return math.ceil(rows_per_unit * max(layout.d_augmented, layout.d_out))
