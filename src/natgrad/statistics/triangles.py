"""Lower triangles of large symmetric matrices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import Self

from natgrad.records import Record

#: Matrices of fewer rows are kept whole: so many small copies cost more than they save.
LEAST_SIZE = 256

#: Block rows of a triangle.
BLOCKS = 8


@dataclass(frozen=True, eq=False)
class LowerTriangles(Record):
    """Lower triangles of ``(..., d, d)``, in 9/16 of the memory.

    Of eight block rows each is kept up to the diagonal, its last block whole. Copying them takes
    next to no time, unlike turning half of the triangle over, which would save a little more.

    Attributes:
        entries: The block rows one after the other, ``(..., e)``.
        size: d.
    """

    entries: Tensor
    size: int

    @property
    def shape(self) -> torch.Size:
        """That of the matrices, ``(..., d, d)``."""
        return torch.Size([*self.entries.shape[:-1], self.size, self.size])

    @property
    def dtype(self) -> torch.dtype:
        """The type of the entries."""
        return self.entries.dtype

    @classmethod
    def of(cls, matrices: Tensor) -> Self:
        """Return the lower triangles of ``(..., d, d)``; what is above them is not looked at."""
        size = matrices.shape[-1]
        rows = [matrices[..., start:stop, :stop].flatten(-2) for start, stop in _blocks(size)]
        return cls(torch.cat(rows, dim=-1), size)

    def matrices(self) -> Tensor:
        """Return matrices ``(..., d, d)`` of which the lower triangles are these."""
        result = self.entries.new_zeros(*self.entries.shape[:-1], self.size, self.size)
        first = 0
        for start, stop in _blocks(self.size):
            end = first + (stop - start) * stop
            block = self.entries[..., first:end].unflatten(-1, (stop - start, stop))
            result[..., start:stop, :stop] = block
            first = end
        return result

    def diagonal(self) -> Tensor:
        """Return the diagonals ``(..., d)``."""
        first, pieces = 0, []
        for start, stop in _blocks(self.size):
            pieces.append(self.entries[..., first + start :: stop + 1][..., : stop - start])
            first += (stop - start) * stop
        return torch.cat(pieces, dim=-1)

    def scaled(self, factor: float) -> Self:
        """Return the triangles times a factor."""
        return replace(self, entries=self.entries * factor)

    def followed_by(self, other: Self, decay: float) -> Self:
        """Return ``decay · self + other``."""
        return replace(self, entries=torch.add(other.entries, self.entries, alpha=decay))


def kept_entries(size: int) -> int:
    """Return how many entries of a symmetric ``(size, size)`` statistics keep."""
    if size < LEAST_SIZE:
        return size**2
    return sum((stop - start) * stop for start, stop in _blocks(size))


def _blocks(size: int) -> Iterator[tuple[int, int]]:
    step = -(-size // BLOCKS)
    for start in range(0, size, step):
        yield start, min(start + step, size)
