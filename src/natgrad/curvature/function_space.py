"""How an operator on one layer's parameters looks in function space, for any kind of rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from natgrad.jacobians import Jacobians

__all__ = ["map_by_columns"]


def map_by_columns(
    name: str, rows: Jacobians, other: Jacobians, solver: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Return ``{name: J' H Jᵀ}`` of one block, applying ``H`` to some rows of ``J`` at a time.

    Args:
        name: Block name.
        rows: ``J``; a block missing here or in ``other`` contributes nothing.
        other: ``J'``.
        solver: ``V ↦ H V`` for flat block vectors ``(P_l, k)``.
    """
    if name not in rows or name not in other:
        return {}
    left, right = other[name], rows[name]
    pieces = []
    for start, stop in right.chunks():
        columns = right.layout.flat(right.per_sample_gradients(start, stop)).flatten(0, 1).T
        pieces.append(left.matvec(solver(columns)))
    return {name: torch.cat(pieces, dim=1)}
