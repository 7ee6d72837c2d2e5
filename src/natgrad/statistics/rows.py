"""Rows that are kept, or their second moment once there are more of them than parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from natgrad import linalg
from natgrad.distributed.exchange import Symmetric
from natgrad.jacobians import CHUNK_ELEMENTS, Jacobians
from natgrad.jacobians.packing import pack, unpack
from natgrad.jacobians.scaled import ScaledRows
from natgrad.layouts import ParameterLayout
from natgrad.statistics.statistics import Statistics

__all__ = ["Pieces", "RowStatistics"]

#: Rows of several batches, each with the weight of its squares.
Pieces = tuple[tuple[float, Jacobians], ...]


@dataclass(frozen=True, eq=False)
class RowStatistics(Statistics):
    """Jacobian rows of one part, factored; they add by concatenation.

    Attributes:
        pieces: The rows, in the order they came, with weights.
        moment: ``JᵀJ``, ``(P_l, P_l)``, once there are more rows than ``limit``.
        limit: Most rows kept before they are summed; None for no limit.
    """

    pieces: Pieces = ()
    moment: Tensor | None = None
    limit: int | None = None

    @classmethod
    def of(cls, rows: Jacobians, count: Tensor, limit: int | None) -> Self:
        """Return the statistics of the rows of one batch."""
        return cls(count, ((1.0, rows),), None, limit)._bounded()

    @property
    def number(self) -> int:
        """Number of rows kept."""
        return sum(rows.rows for _, rows in self.pieces)

    def followed_by(self, other: Self, decay: float = 1.0) -> Self:
        """Return ``decay · self + other``."""
        if decay == 0:
            return other
        joined = replace(
            self,
            count=self.count * decay + other.count,
            pieces=tuple((weight * decay, rows) for weight, rows in self.pieces) + other.pieces,
            moment=None if self.moment is None else self.moment * decay,
        )
        if other.moment is not None:
            own = joined.moment
            joined = replace(joined, moment=other.moment if own is None else own + other.moment)
        return joined._bounded()

    def _bounded(self) -> Self:
        """Return the same with rows summed where there are too many of them."""
        if not self.pieces:
            return self
        layout, number = self.pieces[-1][1].layout, self.number
        # Scaled rows are damped one by one, so they cannot be summed.
        scaled = any(isinstance(rows, ScaledRows) for _, rows in self.pieces)
        if self.limit is not None:
            size = number if scaled else min(number, layout.numel)
            linalg.check_memory(size, 2, layout.dtype, layout.device)
        keeps = self.limit is None or scaled or number <= self.limit
        if self.moment is None and keeps:
            return self
        moment = self.moment
        for weight, rows in self.pieces:
            moment = _add_moment(moment, rows, weight)
        return replace(self, pieces=(), moment=moment)

    def scaled(self, factor: float) -> Self:
        """Return every sum times a factor."""
        return replace(
            self,
            count=self.count * factor,
            pieces=tuple((weight * factor, rows) for weight, rows in self.pieces),
            moment=None if self.moment is None else self.moment * factor,
        )

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Return the statistics with a function applied to count and moment; rows stay."""
        moment = None if self.moment is None else function(self.moment)
        return replace(self, count=function(self.count), moment=moment)

    def tensors(self) -> Iterator[Tensor]:
        """Yield every tensor, those of the rows included."""
        yield self.count
        if self.moment is not None:
            yield self.moment
        for _, rows in self.pieces:
            for block in rows.values():
                yield from block.state().values()

    def is_finite(self) -> Tensor:
        """Return whether no entry is NaN or infinite."""
        floating = [t for t in self.tensors() if t.is_floating_point()]
        return torch.stack([torch.isfinite(t).all() for t in floating]).all()

    def sums(self) -> dict[str, Any]:
        """Return count and moment."""
        state = replace(self, pieces=()).state_dict()
        if self.moment is not None:
            state["moment"] = Symmetric(self.moment)
        return state

    def rows(self) -> Any:
        """Return the rows."""
        return [(weight, pack(rows)) for weight, rows in self.pieces] or None

    def with_rows(self, found: Sequence[Any], layout: ParameterLayout) -> Self:
        """Return sums with the rows of all processes, in the order of their ranks."""
        pieces = tuple(
            (weight, unpack(rows, layout, self.count.device))
            for one in found
            for weight, rows in one or ()
        )
        return replace(self, pieces=self.pieces + pieces)._bounded()

    def for_checkpoint(self) -> RowStatistics:
        """Return count and moment: rows belong to one batch, and the next one brings its own."""
        return replace(self, pieces=())


def _add_moment(moment: Tensor | None, rows: Jacobians, weight: float) -> Tensor:
    """Return a moment plus that of some rows."""
    layout = rows.layout
    if moment is None:
        first = next(iter(rows.values()))
        size = layout.numel
        moment = torch.zeros(size, size, dtype=first.dtype, device=first.device)
    step = max(1, CHUNK_ELEMENTS // max(1, layout.numel * rows.directions))
    for start in range(0, rows.samples, step):
        stop = min(start + step, rows.samples)
        dense = moment.new_zeros((stop - start) * rows.directions, layout.numel)
        for block in rows.values():
            flat = block.layout.flat(block.per_sample_gradients(start, stop)).flatten(0, 1)
            pieces = flat.split(list(block.layout.sizes), dim=1)
            for segment, piece in zip(layout.slices(block.layout), pieces, strict=True):
                dense[:, segment] = piece
        gram = linalg.symmetric(linalg.lower_gram(dense))
        moment = torch.add(moment, gram, alpha=weight)
    return moment
