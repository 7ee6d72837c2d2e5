"""Sums over rows and how they add up."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from natgrad.layouts import ParameterLayout
from natgrad.records import Record
from natgrad.statistics.triangles import LowerTriangles


@dataclass(frozen=True, eq=False)
class Statistics(Record):
    """Sums over the rows of one part of the Fisher matrix, of one batch or of many.

    They are additive: the statistics of two batches together are the sum of theirs. Sums, moving
    averages, reductions over processes, moves between devices, checkpoints and returns to an
    earlier state are written here and in :class:`natgrad.records.Record`, once for all structures.
    They know neither damping nor inverses. Tensors are replaced, never changed in place.

    Attributes:
        count: What the mean divides by, the sum of event weights: a scalar, float64.
    """

    count: Tensor

    def followed_by(self, other: Self, decay: float = 1.0) -> Self:
        """Return ``decay · self + other``: the sum, or a step of a moving average.

        Dividing by ``count``, which decays alike, corrects the bias of the average.
        """
        if decay == 0:
            return other
        values = {}
        for field in dataclasses.fields(self):
            own, others = getattr(self, field.name), getattr(other, field.name)
            values[field.name] = _sum(own, others, decay)
        return type(self)(**values)

    def joined(self, other: Self) -> Self:
        """Return the sum with another pass of the same step, whose rows may still wait."""
        return self.followed_by(other)

    def scaled(self, factor: float) -> Self:
        """Return every sum times a factor."""
        return self.mapped(lambda tensor: tensor * factor)

    def with_count(self, count: Tensor) -> Self:
        """Return the same sums with another count, as where a batch had no rows of a layer."""
        return dataclasses.replace(self, count=count)

    def is_finite(self) -> Tensor:
        """Return, on the device, whether no entry is NaN or infinite."""
        return torch.stack([torch.isfinite(t).all() for t in self.tensors()]).all()

    def for_checkpoint(self) -> Statistics | None:
        """Return what a checkpoint keeps of them."""
        return self

    # Over several processes.

    def sums(self) -> dict[str, Any]:
        """Return plain values and tensors that processes add up, see :mod:`natgrad.distributed`."""
        return self.state_dict()

    def rows(self) -> Any:
        """Return plain values and tensors that processes gather; None where there are only sums."""
        return None

    def with_rows(self, found: Sequence[Any], layout: ParameterLayout) -> Self:
        """Return sums over all processes with the rows of all of them.

        Args:
            found: What :meth:`rows` returned in each process; None without any.
            layout: Order of the part's parameters.
        """
        return self

    def renewal(self) -> Any:
        """Return plain values and tensors that a factorisation has changed; mostly None."""
        return None

    def with_renewal(self, found: Any) -> Self:
        """Return the same as a factorisation in another process has left it."""
        return self


def _sum(total: Any, part: Any, decay: float) -> Any:
    if total is None:
        return part
    if isinstance(total, Tensor):
        return total * decay if part is None else torch.add(part, total, alpha=decay)
    if isinstance(total, (Statistics, LowerTriangles)):
        return total.scaled(decay) if part is None else total.followed_by(part, decay)
    return part
