"""How many of the positions that share a weight are enough for its second moments."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from natgrad.jacobians.layer import LayerJacobian, WeightSharing
from natgrad.jacobians.linear import LinearJacobian
from natgrad.layouts import BlockLayout

__all__ = ["enough_rows", "random_subset", "with_enough_rows"]


def random_subset(size: int, count: int, seed: int, device: torch.device) -> Tensor:
    """Return ``count`` of the indices below ``size``, drawn uniformly, in ascending order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(size, generator=generator)[:count].sort().values.to(device)


def enough_rows(layout: BlockLayout, rows_per_unit: float | None) -> int | None:
    """Return how many rows suffice for a layer's factors; None where all are taken."""
    if rows_per_unit is None:
        return None
    return math.ceil(rows_per_unit * max(layout.d_augmented, layout.d_out))


def with_enough_rows(
    rows: LayerJacobian, rows_per_unit: float | None, weight_sharing: WeightSharing, seed: int
) -> LayerJacobian:
    """Return rows at a random subset of positions where there are more than enough.

    Args:
        rows: The layer's rows.
        rows_per_unit: Rows that suffice, per unit of the larger factor; None for all.
        weight_sharing: "reduce" sums over positions, so that none may be left out.
        seed: Seed of the subset.
    """
    limit = enough_rows(rows.layout, rows_per_unit)
    if limit is None or weight_sharing == "reduce" or not isinstance(rows, LinearJacobian):
        return rows
    kept = max(1, -(-limit // rows.samples))
    if kept >= rows.positions:
        return rows
    return rows.subsampled(random_subset(rows.positions, kept, seed, rows.device))
