"""Factors of few entries by the name of their structure."""

from __future__ import annotations

from typing import get_args

import torch

from natgrad.operators.expanded_matrices import (
    DenseMatrix,
    ExpandedMatrix,
    LowerToeplitzMatrix,
    LowerTriangularMatrix,
    UpperToeplitzMatrix,
    UpperTriangularMatrix,
)
from natgrad.operators.sparse_matrices import (
    BlockDiagonalMatrix,
    DiagonalMatrix,
    HierarchicalMatrix,
)
from natgrad.operators.structured_matrix import FactorStructure, StructuredMatrix

_STRUCTURES: dict[str, type[StructuredMatrix]] = {
    cls.structure: cls
    for cls in (
        DenseMatrix,
        DiagonalMatrix,
        BlockDiagonalMatrix,
        LowerTriangularMatrix,
        UpperTriangularMatrix,
        LowerToeplitzMatrix,
        UpperToeplitzMatrix,
        HierarchicalMatrix,
    )
}


def identity_matrix(
    structure: FactorStructure,
    groups: int,
    size: int,
    *,
    block_size: int = 32,
    hierarchical_sizes: tuple[int, int] = (16, 16),
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> StructuredMatrix:
    """Return one identity matrix per group in a structure.

    Args:
        structure: ``"dense"``, ``"diagonal"``, ``"block_diagonal"``, ``"lower_triangular"``,
            ``"upper_triangular"``, ``"lower_toeplitz"``, ``"upper_toeplitz"`` or
            ``"hierarchical"``.
        groups: G.
        size: d, at least 1.
        block_size: Size of the blocks of ``"block_diagonal"``; the last one has what is left of d.
        hierarchical_sizes: ``(k₁, k₂)``, sizes of the dense corners of ``"hierarchical"``; what
            does not fit d is taken off the middle, then off the last, then off the first.
        dtype: Type of the entries.
        device: Device of the entries.

    Raises:
        ValueError: If the structure is unknown or a size is out of range.
    """
    if structure not in _STRUCTURES:
        raise ValueError(
            f"a factor structure must be one of {', '.join(get_args(FactorStructure))}, got "
            f"{structure!r}"
        )
    if size < 1:
        raise ValueError(f"a structured matrix must have a size of at least 1, got {size}")
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    if len(hierarchical_sizes) != 2 or min(hierarchical_sizes) < 0:
        raise ValueError(
            f"hierarchical_sizes must be two sizes >= 0 of the dense corners, got "
            f"{hierarchical_sizes}"
        )
    like = torch.empty(0, dtype=dtype, device=device)
    cls = _STRUCTURES[structure]
    if cls is DiagonalMatrix:
        return DiagonalMatrix(size, (like.new_ones(groups, size),))
    if cls is BlockDiagonalMatrix:
        side = min(block_size, size)
        rest = size % side
        blocks = like.new_zeros(groups, size // side, side, side)
        return BlockDiagonalMatrix(size, (blocks, like.new_zeros(groups, rest, rest))).identity()
    if cls is HierarchicalMatrix:
        first = min(hierarchical_sizes[0], size)
        last = min(hierarchical_sizes[1], size - first)
        middle = size - first - last
        shapes = (
            (first, first), (first, middle), (first, last), (middle,), (last, middle), (last, last)
        )  # fmt: skip
        parts = tuple(like.new_zeros(groups, *shape) for shape in shapes)
        return HierarchicalMatrix(size, parts).identity()
    assert issubclass(cls, ExpandedMatrix)
    return cls.identities(groups, size, like)
