"""Some rows and columns of an operator, by products with the whole of it."""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from natgrad.layouts import ParameterLayout
from natgrad.operators.block_diagonal import FisherMatrix
from natgrad.operators.combined import DerivedOperator
from natgrad.operators.diagonal import DiagonalOperator
from natgrad.operators.linear_map import LinearMap
from natgrad.operators.operator import Operator, VectorLayout

Choice = Collection[str] | Tensor | Sequence[int]


@dataclass(frozen=True)
class EntriesLayout:
    """Some entries of parameters, in any order, as the only parameter ``"entries"``.

    Attributes:
        numel: How many there are.
    """

    numel: int

    @property
    def names(self) -> tuple[str, ...]:
        """``("entries",)``."""
        return ("entries",)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Their number."""
        return (self.numel,)

    def to_flat(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the entries."""
        return tensors["entries"]

    def to_dict(self, flat: Tensor) -> dict[str, Tensor]:
        """Return them under their name."""
        return {"entries": flat}


@dataclass(frozen=True, eq=False)
class SubmatrixOperator(DerivedOperator):
    """``F[i, i]``: products with F of vectors that are zero elsewhere.

    Attributes:
        layout: How vectors are cut into parameters.
        operator: F.
        index: i, which entries, ``(P',)``.
    """

    index: Tensor
    semidefinite: ClassVar[bool] = False

    def multiply(self, columns: Tensor) -> Tensor:
        """Return the product with ``(P', k)``."""
        return self.operator.multiply(spread(columns, self.index, self.operator.shape[0]))[
            self.index
        ]

    def diagonal(self) -> Tensor:
        """Return the diagonal."""
        return self.operator.diagonal()[self.index]


@dataclass(frozen=True, eq=False)
class Submatrix(LinearMap):
    """``F[i, j]``.

    Attributes:
        operator: F.
        rows: i.
        columns: j.
        layout: The parameters of the columns.
    """

    operator: Operator
    rows: Tensor
    columns: Tensor
    layout: VectorLayout

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of rows and columns."""
        return len(self.rows), len(self.columns)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the entries."""
        return self.operator.dtype

    @property
    def device(self) -> torch.device:
        """Where the entries are."""
        return self.operator.device

    def multiply(self, columns: Tensor) -> Tensor:
        """Return the product with columns."""
        size = self.operator.shape[0]
        return self.operator.multiply(spread(columns, self.columns, size))[self.rows]

    def multiply_transposed(self, columns: Tensor) -> Tensor:
        """Return the product of the transposed matrix."""
        size = self.operator.shape[0]
        return self.operator.multiply(spread(columns, self.rows, size))[self.columns]

    def to_flat(self, vector: Mapping[str, Tensor]) -> Tensor:
        """Return a dict as a flat vector of the columns."""
        return self.layout.to_flat(vector)


def submatrix_of(operator: Operator, rows: Choice, columns: Choice | None) -> Operator | LinearMap:
    """Return some rows and columns of an operator; see :meth:`Operator.submatrix`."""
    index, layout = _chosen(operator, rows)
    if columns is None and isinstance(operator, DiagonalOperator):
        return DiagonalOperator(layout, operator.entries[index])
    if columns is None:
        return SubmatrixOperator(layout, *_of_parts(operator, index))
    return Submatrix(operator, index, *_chosen(operator, columns))


def _of_parts(operator: Operator, index: Tensor) -> tuple[Operator, Tensor]:
    """Return a Fisher matrix of those parts alone that some entries are in, and where they lie.

    Between parts there is nothing, so that products with the others are not needed.
    """
    if type(operator) is not FisherMatrix:
        return operator, index
    numbers = torch.full((operator.shape[0], 1), -1, device=index.device)
    for number, one in enumerate(operator.parts.values()):
        operator.layout.scatter(one.layout, numbers.new_full((one.shape[0], 1), number), numbers)
    wanted = set(numbers[index, 0].tolist())
    parts = {n: one for k, (n, one) in enumerate(operator.parts.items()) if k in wanted}
    layout = operator.layout.subset(name for one in parts.values() for name in one.layout.names)
    kept = torch.tensor(sorted(wanted), device=index.device)
    places = torch.isin(numbers[:, 0], kept).cumsum(0) - 1
    members = {name: operator.members[name] for name in parts}
    return FisherMatrix(layout, parts, members, operator.structure), places[index]


def _chosen(operator: Operator, choice: Any) -> tuple[Tensor, VectorLayout]:
    """Return which entries are meant, and how they are laid out."""
    names = [choice] if isinstance(choice, str) else choice
    named = isinstance(names, Collection) and not isinstance(names, Tensor)
    if named and len(names) and all(isinstance(one, str) for one in names):
        return _named(operator.layout, names, operator.device)
    size, index = operator.shape[0], _indices(choice, operator)
    in_range = index.dim() == 1 and bool(((index >= 0) & (index < size)).all())
    if not in_range or not len(index) or len(index.unique()) < len(index):
        raise ValueError(
            f"a submatrix takes names, one or more different indices from 0 to {size - 1}, or a "
            f"mask of {size} entries, got {reprlib.repr(choice)}"
        )
    return index, EntriesLayout(len(index))


def _indices(choice: Any, operator: Operator) -> Tensor:
    """Return indices, or those where a mask is true; none of what is neither."""
    try:
        given = torch.as_tensor(choice, device=operator.device)
    except (RuntimeError, TypeError, ValueError):
        return torch.empty(0, dtype=torch.long)
    if given.dtype == torch.bool and given.shape == operator.shape[:1]:
        return given.nonzero()[:, 0]
    whole = not (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool)
    return given.long() if whole else given.new_empty(0, dtype=torch.long)


def _named(
    layout: VectorLayout, names: Collection[str], device: torch.device
) -> tuple[Tensor, VectorLayout]:
    """Return the entries of parameters, or of modules' parameters, in the order of the matrix."""
    chosen: set[str] = set()
    for name in names:
        own = {one for one in layout.names if one == name or one.startswith(f"{name}.")}
        if not own:
            raise ValueError(
                f"no parameter or module {name!r} is in the matrix: there are {list(layout.names)}"
            )
        chosen |= own
    pieces, start = [], 0
    for name, size in zip(layout.names, layout.sizes, strict=True):
        if name in chosen:
            pieces.append(torch.arange(start, start + size, device=device))
        start += size
    index = torch.cat(pieces)
    if isinstance(layout, ParameterLayout):
        return index, layout.subset(chosen)
    return index, EntriesLayout(len(index))


def spread(columns: Tensor, index: Tensor, size: int) -> Tensor:
    """Return columns ``(size, k)`` with given rows ``(P', k)`` at some places, zero elsewhere."""
    result = columns.new_zeros(size, columns.shape[1])
    result[index] = columns
    return result
