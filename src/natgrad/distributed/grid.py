"""Processes in columns, which hold the same layers, and rows, which have one of each column."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from natgrad.distributed.exchange import Sum
from natgrad.distributed.replicas import Replicas


@dataclass(frozen=True)
class Grid:
    """Replicas by what they hold: the process of rank r is in column ``r // height``.

    Source: Pauloski et al., KAISA: an adaptive second-order optimizer framework for deep neural
    networks (2021), whose fraction of gradient workers is ``height`` over all.

    Attributes:
        replicas: All of them.
        height: How many a column has; a divisor of their number.
        column: Those of this process's column.
        row: One of each column, this process among them.
    """

    replicas: Replicas
    height: int
    column: Replicas
    row: Replicas

    @classmethod
    def of(cls, replicas: Replicas, height: int) -> Grid:
        """Return the grid of some replicas, for which all of them make groups where needed."""
        number, alone = replicas.number, Replicas()
        if height in (1, number):
            lying = height == 1
            return cls(replicas, height, *((alone, replicas) if lying else (replicas, alone)))
        ranks = torch.distributed.get_process_group_ranks(replicas.group)
        column, seat = divmod(replicas.rank, height)
        members = ranks[column * height : (column + 1) * height], ranks[seat::height]
        made = [
            Replicas(torch.distributed.new_group(each, use_local_synchronization=True))
            for each in members
        ]
        return cls(replicas, height, *made)

    @property
    def columns(self) -> int:
        """How many columns there are."""
        return self.replicas.number // self.height

    def sum(self, value: Any, device: torch.device, column: int) -> Sum:
        """Begin to add up what all processes have, for those of a column.

        Others have their own value back, or a part of the sum.
        """
        stages: list[tuple[Any, int | None]] = []
        if not self.row.are_alone:
            stages.append((self.row.group, column))
        if not self.column.are_alone and column == self.replicas.rank // self.height:
            stages.append((self.column.group, None))
        return Sum(value, self.replicas.group, device, self.replicas.outlines, stages)

    def gathered(self, value: Any, device: torch.device, column: int) -> list[Any]:
        """Return what all have, in the order of ranks, in processes of a column; else nothing."""
        of_row = self.row.gathered(value, device, column)
        if column != self.replicas.rank // self.height:
            return []
        of_rows = self.column.gathered(of_row, device)
        return [one for of_column in zip(*of_rows, strict=True) for one in of_column]
