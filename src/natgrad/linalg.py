"""Factorisations that do not fail silently: Cholesky with retries, safe eigendecompositions."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class FactorizationError(RuntimeError, ValueError):
    """A matrix could not be factorised, even in float64 and with more damping."""


def check_memory(
    side: int,
    count: int,
    dtype: torch.dtype,
    device: torch.device,
    what: str = "the exact curvature of this batch",
    advice: str = "use a smaller batch, fisher='mc', or structure 'kfac'",
) -> None:
    """Raise a ValueError unless ``count`` matrices of ``side × side`` fit the device's memory."""
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
            f"{what} needs {count} matrices of size {side} x {side} "
            f"({needed / 2**30:.0f} GiB), but the device has {total / 2**30:.0f} GiB: {advice}"
        )


_pending = threading.local()


@contextmanager
def unawaited() -> Iterator[list[Tensor]]:
    """Let factorisations inside not wait for the device to tell whether they succeeded.

    Yields:
        A list that receives, for each of them, a scalar on the device: whether it failed. Its
        result then means nothing, and whoever reads the list has to do it again outside.
    """
    outer = getattr(_pending, "failures", None)
    failures: list[Tensor] = []
    _pending.failures = failures
    try:
        yield failures
    finally:
        _pending.failures = outer


def constant(values: Any, beside: Tensor) -> Tensor:
    """Return numbers as a tensor of another one's type and device, without waiting for that."""
    return torch.tensor(values, dtype=beside.dtype).to(beside.device, non_blocking=True)


def _succeeded(failed: Tensor) -> bool:
    """Return whether a factorisation did not fail; True for now where nobody waits for that."""
    failures: list[Tensor] | None = getattr(_pending, "failures", None)
    if failures is None:
        return not bool(failed)
    failures.append(failed)
    return True


def require(condition: Tensor, otherwise: str) -> None:
    """Raise a FactorizationError with a reason unless a scalar on the device is true.

    Inside :func:`unawaited` it is noted instead.
    """
    if not _succeeded(~condition):
        raise FactorizationError(otherwise)


def require_finite(values: Tensor, otherwise: str) -> None:
    """Raise or note, as :func:`require`, unless all values are finite."""
    require(torch.isfinite(values).all(), otherwise)


def note_failure() -> None:
    """Note a failed factorisation inside :func:`unawaited`, whose error goes no further."""
    failures: list[Tensor] | None = getattr(_pending, "failures", None)
    if failures is not None:
        failures.append(torch.tensor(True))


def waits() -> bool:
    """Return whether results are waited for, as everywhere but inside :func:`unawaited`."""
    return getattr(_pending, "failures", None) is None


#: Matrices of up to so many entries are stacked on CPUs, where the calls themselves cost most; on
#: accelerators all are.
STACKED_ENTRIES = 2**14


def map_stacked(function: Callable[[Tensor], Any], matrices: Sequence[Tensor]) -> list[Any]:
    """Return ``function(matrix)`` for every one of some batches ``(..., d, d)`` of matrices.

    Those of one shape are stacked for one call, as a device factorises many matrices at once much
    faster than one by one.

    Args:
        function: Takes ``(n, ..., d, d)``; returns a tensor or a tuple of tensors with the same
            first dimension.
        matrices: The batches.
    """
    results: list[Any] = [None] * len(matrices)
    groups: dict[Any, list[int]] = {}
    for index, matrix in enumerate(matrices):
        alone = matrix.device.type == "cpu" and matrix.numel() > STACKED_ENTRIES
        key = (matrix.shape, matrix.dtype, matrix.device, index if alone else None)
        groups.setdefault(key, []).append(index)
    for indices in groups.values():
        if len(indices) == 1:
            results[indices[0]] = function(matrices[indices[0]])
            continue
        found = function(torch.stack([matrices[index] for index in indices]))
        for place, index in enumerate(indices):
            whole = isinstance(found, Tensor)
            results[index] = found[place] if whole else tuple(part[place] for part in found)
    return results


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
        out: What the result is added to, ``(d, d)``; a new tensor of zeros by default.
    """
    size = rows.shape[1]
    if rows.device.type != "cpu" or size < 2 * GRAM_BLOCK:
        return rows.T @ rows if out is None else out.addmm_(rows.T, rows)
    if out is None:
        out = rows.new_zeros(size, size)
    for start in range(0, size, GRAM_BLOCK):
        stop = min(start + GRAM_BLOCK, size)
        out[start:stop, :stop].addmm_(rows[:, start:stop].T, rows[:, :stop])
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


def cholesky(matrix: Tensor) -> Tensor:
    """Return the lower Cholesky factor of a symmetric positive definite ``(..., d, d)``.

    Only the lower triangle is read.

    A failed factorisation is tried again in float64, then with three growing multiples of the mean
    diagonal added.

    Raises:
        FactorizationError: If the matrix is not finite or every attempt failed.
    """
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix)
    # An entry that is not finite spoils the pivots of its row, so their check suffices.
    if _succeeded((info != 0).any() | ~torch.isfinite(factor.diagonal(dim1=-2, dim2=-1)).all()):
        return factor
    if not bool(torch.isfinite(matrix).all()):
        raise FactorizationError("the matrix has NaN or infinite entries")
    precise = matrix.double()
    mean = precise.diagonal(dim1=-2, dim2=-1).mean(-1).abs().clamp(min=1e-300)
    epsilon = torch.finfo(matrix.dtype).eps
    for raised in (0.0, 10.0 * epsilon, 1e3 * epsilon, 1e5 * epsilon):
        factor, info = torch.linalg.cholesky_ex(add_to_diagonal(precise, mean * raised))
        if not bool((info != 0).any()):
            return factor.to(matrix.dtype)
    raise FactorizationError(
        f"the matrix is not positive definite, even with its diagonal raised by {raised:.0e} of "
        "its mean"
    )


def inverse(matrix: Tensor) -> Tensor:
    """Return the inverse of a symmetric positive definite ``(..., d, d)`` by Cholesky.

    Raises:
        FactorizationError: As :func:`cholesky`.
    """
    factor = cholesky(matrix)
    try:
        return torch.cholesky_inverse(factor)
    except torch.linalg.LinAlgError as error:  # A pivot that underflows in the matrix's type.
        raise FactorizationError("the inverse of the matrix overflows") from error


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues (ascending) and eigenvectors of a symmetric ``(..., d, d)``.

    Only the lower triangle is read.

    Raises:
        FactorizationError: If the matrix is not finite or the solver did not converge in float64.
    """
    try:
        values, vectors = torch.linalg.eigh(matrix)
        if _succeeded(~torch.isfinite(values).all()):
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


def symmetric_pseudo_solve(values: Tensor, vectors: Tensor, rhs: Tensor) -> Tensor:
    """Apply the pseudo-inverse of a positive ``V E Vᵀ`` on its range to ``(..., d, k)``.

    Eigenvalues below ``d · eps · max`` count as zero.
    """
    return vectors @ (inverse_on_range(values).unsqueeze(-1) * (vectors.mT @ rhs))


def inverse_on_range(values: Tensor) -> Tensor:
    """Return ``1/E`` where an eigenvalue is above ``d · eps · max``, and 0 elsewhere."""
    keep = values > rounding(values)
    return torch.where(keep, 1.0 / torch.where(keep, values, torch.ones_like(values)), 0.0)


def log_determinant(values: Tensor, damping: float = 0.0, *, positive: bool = True) -> Tensor:
    """Return ``Σ log(E + damping)`` of matrices by their eigenvalues ``(..., d)``.

    Without damping it is −inf where an eigenvalue is none above ``d · eps · max``, the maximum of
    its own matrix: what the pseudo-inverse leaves out. Negative eigenvalues are rounding where the
    matrix is positive; where it need not be, the result is NaN unless damping makes it definite.
    """
    if not positive:
        shifted = torch.where(values.abs() <= rounding(values), 0.0, values) + damping
        return torch.where((shifted == 0).any(), -math.inf, shifted.log().sum())
    if damping > 0:
        return (values.clamp(min=0.0) + damping).log().sum()
    return torch.where(values > rounding(values), values, 0.0).log().sum()


def rounding(values: Tensor) -> Tensor:
    """Return ``d · eps · max``, ``(..., 1)``, up to which eigenvalues ``(..., d)`` are rounding."""
    if values.shape[-1] == 0:
        return values.new_zeros(*values.shape[:-1], 1)
    largest = values.abs().amax(-1, keepdim=True)
    return values.shape[-1] * torch.finfo(values.dtype).eps * largest


def rotate(left: Tensor | None, matrices: Tensor, right: Tensor | None) -> Tensor:
    """Return ``U_Lᵀ M U_R``; None stands for the identity."""
    rotated = matrices if left is None else left.mT @ matrices
    return rotated if right is None else rotated @ right


def rotate_back(left: Tensor | None, matrices: Tensor, right: Tensor | None) -> Tensor:
    """Return ``U_L M U_Rᵀ``; None stands for the identity."""
    rotated = matrices if left is None else left @ matrices
    return rotated if right is None else rotated @ right.mT
