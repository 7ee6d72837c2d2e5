"""The coarse correction of two-level K-FAC by dense algebra.

Nothing here looks at how natgrad does it; where an eigenvector is not unique
the one that natgrad took is checked and used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from natgrad.operators.coarse_level import leading_eigenvector as found_eigenvector
from tests import dense


def damped(matrix: Tensor, damping: float | Tensor) -> Tensor:
    """Return ``F + λI`` for one λ or one per parameter."""
    return matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype)


def coarse_basis(
    space: str, gradient: Tensor, f: Tensor, kfac: Tensor, inverse: Tensor, damping: float | Tensor,
    indices: Sequence[Tensor], found: Any = None,
) -> Tensor:  # fmt: skip
    """Return R, (P, m), for blocks that F reaches, given by their flat indices.

    Where the leading eigenvalue of a block of K-FAC's matrix is not simple, which of its
    eigenvectors is taken is up to the structure ``found``.
    """
    first = inverse @ gradient
    if space == "residual":
        wholes = [inverse @ (gradient - damped(f, damping) @ first)]
    elif space == "krylov":
        wholes = [first, inverse @ (f @ first)]
    else:
        wholes = [torch.ones_like(gradient)]
    columns = []
    for index in indices:
        i = index.flatten()
        if not bool(f.diagonal()[i].any()):
            continue
        for whole in wholes:
            column = torch.zeros_like(gradient)
            if space == "spectral":
                column[i] = leading_eigenvector(kfac, i, found)
            else:
                column[i] = whole[i]
            columns.append(column)
    return torch.stack(columns, 1)


def leading_eigenvector(kfac: Tensor, index: Tensor, found: Any) -> Tensor:
    """Return the eigenvector of a block with the largest eigenvalue."""
    block = kfac[index.unsqueeze(1), index]
    values, vectors = torch.linalg.eigh(block)
    if len(values) == 1 or values[-1] - values[-2] > 1e-6 * values[-1]:
        return vectors[:, -1]
    assert found is not None
    whole = torch.zeros(len(kfac), 1, dtype=kfac.dtype)
    coarse = found.coarse
    basis = coarse.fixed_basis(lambda name: found_eigenvector(found.parts[name]))
    for name, vector in basis.items():
        found.layout.scatter(coarse.blocks[name], vector, whole)
    vector = whole[index, 0]
    dense.assert_same(block @ vector, values[-1] * vector)
    return vector


def two_level(
    space: str, form: str, gradient: Tensor, f: Tensor, kfac: Tensor, inverse: Tensor,
    damping: float | Tensor, indices: Sequence[Tensor], found: Any = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the solution and R by dense algebra; columns of R are scaled to length 1."""
    r = coarse_basis(space, gradient, f, kfac, inverse, damping, indices, found)
    norms = r.norm(dim=0)
    r = r[:, norms > 0] / norms[norms > 0]
    matrix = damped(f, damping)
    first = inverse @ gradient
    right = gradient if form == "additive" else gradient - matrix @ first
    coarse = torch.linalg.pinv(r.T @ matrix @ r, hermitian=True, rtol=1e-13)
    return first + r @ (coarse @ (r.T @ right)), r
