"""Factorisations that do not fail silently: Cholesky with retries, safe eigendecompositions."""

from __future__ import annotations

import os
import warnings

import torch
from torch import Tensor

__all__ = [
    "FactorizationError",
    "add_to_diagonal",
    "check_memory",
    "cholesky",
    "eigh",
    "inverse",
    "inverse_on_range",
    "lower_gram",
    "symmetric",
    "symmetric_pseudo_solve",
    "warn_kept",
]


class FactorizationError(RuntimeError):
    """A matrix could not be factorised, even in float64 and with more damping."""


def check_memory(side: int, count: int, dtype: torch.dtype, device: torch.device) -> None:
    """Make sure that ``count`` matrices of ``side × side`` fit the device's memory.

    Raises:
        ValueError: If they need more than all of it.
    """
    needed = count * side**2 * dtype.itemsize
    if needed < 2**30:
        return
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    elif device.type == "cpu" and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        return
    if needed > total:
        raise ValueError(
            f"the exact curvature of this batch needs {count} matrices of size {side} x {side} "
            f"({needed / 2**30:.0f} GiB), but the device has {total / 2**30:.0f} GiB: use a "
            "smaller batch, fisher='mc', or structure 'kfac'"
        )


def warn_kept(owner: object, name: str, error: FactorizationError) -> None:
    """Warn, once per name and owner, that an old factorisation stays in use."""
    warned: set[str] = owner.__dict__.setdefault("_warned", set())
    if name in warned:
        return
    warned.add(name)
    warnings.warn(
        f"the curvature of {name!r} could not be factorised ({error}); its last good "
        "factorisation stays in use",
        stacklevel=4,
    )


#: Width of the column blocks of :func:`lower_gram`, by measurement on CPUs.
GRAM_BLOCK = 128


def lower_gram(rows: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the lower triangle of ``XᵀX`` for ``X`` (R, d); entries above it mean nothing.

    PyTorch has no symmetric rank-k update. On CPUs, where products of a block are as fast as those
    of the whole, only block rows up to the diagonal are multiplied: for large d little more than
    half. Cholesky and eigendecompositions read no more than the triangle; :func:`symmetric` gives
    the matrix.

    Args:
        rows: ``X``.
        out: Zeros to write the result to, ``(d, d)``; a new tensor by default.
    """
    size = rows.shape[1]
    if rows.device.type != "cpu" or size < 2 * GRAM_BLOCK:
        return rows.T @ rows if out is None else torch.mm(rows.T, rows, out=out)
    if out is None:
        out = rows.new_zeros(size, size)
    for start in range(0, size, GRAM_BLOCK):
        stop = min(start + GRAM_BLOCK, size)
        torch.mm(rows[:, start:stop].T, rows[:, :stop], out=out[start:stop, :stop])
    return out


def symmetric(lower: Tensor) -> Tensor:
    """Return the symmetric matrices ``(..., d, d)`` of which the lower triangles are given."""
    return lower.tril() + lower.tril(-1).mT


def add_to_diagonal(matrix: Tensor, value: float | Tensor) -> Tensor:
    """Return ``matrix + value·I`` for a batch ``(..., d, d)``; ``value`` may be ``(...)``."""
    result = matrix.clone()
    shift = value.unsqueeze(-1) if isinstance(value, Tensor) and value.dim() else value
    result.diagonal(dim1=-2, dim2=-1).add_(shift)
    return result


def cholesky(matrix: Tensor, retries: int = 3) -> Tensor:
    """Return the lower Cholesky factor of a symmetric positive definite ``(..., d, d)``.

    Only the lower triangle is read.

    A failed factorisation is tried again in float64, then with growing multiples of the mean
    diagonal added.

    Raises:
        FactorizationError: If the matrix is not finite or every attempt failed.
    """
    factor, info = torch.linalg.cholesky_ex(matrix)
    # An entry that is not finite spoils the pivots of its row, so their check suffices.
    if not bool((info != 0).any() | ~torch.isfinite(factor.diagonal(dim1=-2, dim2=-1)).all()):
        return factor
    if not bool(torch.isfinite(matrix).all()):
        raise FactorizationError("the matrix has NaN or infinite entries")
    precise = matrix.double()
    mean = precise.diagonal(dim1=-2, dim2=-1).mean(-1).abs().clamp(min=1e-300)
    epsilon = torch.finfo(matrix.dtype).eps
    for attempt in range(retries + 1):
        jitter = mean * (epsilon * 10.0 ** (2 * attempt - 1) if attempt else 0.0)
        factor, info = torch.linalg.cholesky_ex(add_to_diagonal(precise, jitter))
        if not bool((info != 0).any()):
            return factor.to(matrix.dtype)
    raise FactorizationError(
        "the matrix is not positive definite, even with its diagonal raised by "
        f"{epsilon * 10.0 ** (2 * retries - 1):.0e} of its mean"
    )


def inverse(matrix: Tensor) -> Tensor:
    """Return the inverse of a symmetric positive definite ``(..., d, d)`` by Cholesky.

    Raises:
        FactorizationError: As :func:`cholesky`.
    """
    return torch.cholesky_inverse(cholesky(matrix))


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues (ascending) and eigenvectors of a symmetric ``(..., d, d)``.

    Only the lower triangle is read.

    Raises:
        FactorizationError: If the matrix is not finite or the solver did not converge in float64.
    """
    try:
        values, vectors = torch.linalg.eigh(matrix)
        if bool(torch.isfinite(values).all()):
            return values, vectors
    except torch.linalg.LinAlgError:
        pass
    if not bool(torch.isfinite(matrix).all()):
        raise FactorizationError("the matrix has NaN or infinite entries")
    try:
        values, vectors = torch.linalg.eigh(matrix.double())
    except torch.linalg.LinAlgError as error:
        raise FactorizationError(f"the eigendecomposition did not converge: {error}") from error
    return values.to(matrix.dtype), vectors.to(matrix.dtype)


def symmetric_pseudo_solve(values: Tensor, vectors: Tensor, rhs: Tensor, power: int = 1) -> Tensor:
    """Apply the pseudo-inverse ``(V E Vᵀ)^{-power}`` on the range of a positive matrix.

    Eigenvalues below ``d · eps · max`` count as zero.

    Args:
        values: Eigenvalues ``E``, ``(..., d)``.
        vectors: Eigenvectors ``V``, ``(..., d, d)``.
        rhs: ``(..., d, k)``.
        power: Power of the inverse.
    """
    scaled = vectors.mT @ rhs
    return vectors @ (inverse_on_range(values).unsqueeze(-1) ** power * scaled)


def inverse_on_range(values: Tensor) -> Tensor:
    """Return ``1/E`` where an eigenvalue is above ``d · eps · max``, and 0 elsewhere."""
    largest = values.abs().amax(-1, keepdim=True)
    threshold = values.shape[-1] * torch.finfo(values.dtype).eps * largest
    keep = values > threshold
    return torch.where(keep, 1.0 / torch.where(keep, values, torch.ones_like(values)), 0.0)
