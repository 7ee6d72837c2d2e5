"""Symmetric matrices in half the memory, to be sent."""

from __future__ import annotations

import torch
from torch import Tensor


def packed_triangles(matrices: Tensor) -> Tensor:
    """Return the lower triangles of ``(..., d, d)``, ``(..., 2m + 1, m)`` with m = ⌈d/2⌉.

    It is LAPACK's rectangular full packed format: the triangle of the last m rows and columns,
    turned over, fills the corner that the first m columns leave empty. An odd d gets a row and a
    column of zeros in front.
    """
    d = matrices.shape[-1]
    if d % 2:
        matrices, d = torch.nn.functional.pad(matrices, (1, 0, 1, 0)), d + 1
    m = d // 2
    packed = matrices.new_zeros(*matrices.shape[:-2], d + 1, m)
    packed[..., 1:, :] = matrices[..., :m].tril()
    packed[..., :m, :] += matrices[..., m:, m:].tril().mT
    return packed


def unpacked_triangles(packed: Tensor, d: int) -> Tensor:
    """Return the symmetric matrices ``(..., d, d)`` of :func:`packed_triangles`."""
    m = packed.shape[-1]
    lower = packed.new_zeros(*packed.shape[:-2], 2 * m, 2 * m)
    lower[..., :m] = packed[..., 1:, :].tril()
    lower[..., m:, m:] = packed[..., :m, :].triu().mT
    whole = lower + lower.tril(-1).mT
    return whole[..., 2 * m - d :, 2 * m - d :]
