"""Rows that are kept, or their second moment once there are more of them than parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import Self

from natgrad import linalg
from natgrad.distributed.exchange import Symmetric
from natgrad.distributed.replicas import Replicas
from natgrad.jacobians import CHUNK_ELEMENTS, Jacobians, LayerJacobian
from natgrad.jacobians.collection import ScaledRows
from natgrad.jacobians.packing import pack, unpack
from natgrad.jacobians.shares import Shares
from natgrad.layouts import ParameterLayout
from natgrad.statistics.statistics import Statistics

if TYPE_CHECKING:
    from natgrad.curvature.structure import Part

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
        found = torch.stack([torch.isfinite(t).all() for t in floating]).all()
        shares = [rows.shares for _, rows in self.pieces if rows.shares is not None]
        return shares[0].all(found) if shares else found

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

    def outlined_rows(self) -> Any:
        """Return what other processes need to know of rows that stay here."""
        return [
            {
                "weight": weight,
                "samples": rows.samples,
                "directions": rows.directions,
                "names": list(rows),
                "scaled": isinstance(rows, ScaledRows),
            }
            for weight, rows in self.pieces
        ] or None

    def with_shares(
        self, own: Self | None, found: Sequence[Any], replicas: Replicas, part: Part
    ) -> Self:
        """Return sums with the rows of all processes, each of which keeps its own.

        They are found by what :meth:`outlined_rows` returned in each process.
        """
        pieces, layout = list(self.pieces), part.layout
        for number in range(max(len(one or ()) for one in found)):
            each = [one[number] if one and number < len(one) else None for one in found]
            present = [one for one in each if one is not None]
            directions, weight = present[0]["directions"], present[0]["weight"]
            lengths = tuple(directions * one["samples"] if one else 0 for one in each)
            names = tuple(dict.fromkeys(name for one in present for name in one["names"]))
            shares = Shares(replicas, lengths, names, part.dtype, layout.device)
            mine = own.pieces[number][1] if each[replicas.rank] and own is not None else None
            rows = Jacobians(layout, {}, 0, directions) if mine is None else copy.copy(mine)
            rows.shares = shares
            if all(one["scaled"] for one in present):
                none = torch.zeros(0, 2, dtype=part.dtype, device=layout.device)
                known = mine if isinstance(mine, ScaledRows) else None
                both = none if known is None else torch.stack([known.scales, known.coordinates], 1)
                rows = ScaledRows(rows, *shares.of_all(both.to(part.dtype)).unbind(1))
            pieces.append((weight, rows))
        return replace(self, pieces=tuple(pieces))._bounded()

    def for_checkpoint(self) -> RowStatistics:
        """Return count and moment: rows belong to one batch, and the next one brings its own."""
        return replace(self, pieces=())


def _add_moment(moment: Tensor | None, rows: Jacobians, weight: float) -> Tensor:
    """Return a moment plus that of some rows."""
    layout = rows.layout
    if rows.shares is not None:
        own = copy.copy(rows)
        own.shares = None
        found = _add_moment(_no_moment(layout, rows.shares), own, weight)
        total: Tensor = rows.shares.replicas.summed(Symmetric(found), layout.device)
        return total if moment is None else moment + total
    if moment is not None and not len(rows):
        return moment  # A process without a share of them.
    first = next(iter(rows.values()))
    lower: Tensor | None = None
    step = max(1, CHUNK_ELEMENTS // max(1, layout.numel * rows.directions))
    for start in range(0, rows.samples, step):
        stop = min(start + step, rows.samples)
        count = (stop - start) * rows.directions
        dense = torch.zeros(count, layout.numel, dtype=first.dtype, device=first.device)
        for block in rows.values():
            flat = block.layout.flat(block.per_sample_gradients(start, stop)).flatten(0, 1)
            pieces = flat.split(list(block.layout.sizes), dim=1)
            for segment, piece in zip(layout.slices(block.layout), pieces, strict=True):
                dense[:, segment] = piece
        lower = linalg.lower_gram(dense, out=lower)
    found = _no_moment(layout, first) if lower is None else linalg.symmetric(lower)
    if moment is None:
        return found if weight == 1.0 else weight * found
    return torch.add(moment, found, alpha=weight)


def _no_moment(layout: ParameterLayout, like: LayerJacobian | Shares) -> Tensor:
    size = layout.numel
    return torch.zeros(size, size, dtype=like.dtype, device=like.device)
