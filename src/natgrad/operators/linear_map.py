"""Matrices with different rows and columns, by products with them and with their transposes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]


class LinearMap(ABC):
    """An ``R × P`` matrix that is known by its products; it never changes."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """``(R, P)``."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Type of the entries."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the entries are."""

    @abstractmethod
    def multiply(self, columns: Tensor) -> Tensor:
        """Return ``M V``, ``(R, k)``, for ``(P, k)``."""

    @abstractmethod
    def multiply_transposed(self, columns: Tensor) -> Tensor:
        """Return ``Mᵀ U``, ``(P, k)``, for ``(R, k)``."""

    def to_flat(self, vector: Mapping[str, Tensor]) -> Tensor:
        """Return a dict name → tensor as a flat vector, where columns are parameters.

        Raises:
            TypeError: If they are not.
        """
        raise TypeError("the columns of this matrix have no names: give a tensor")

    @property
    def T(self) -> LinearMap:  # noqa: N802
        """The transposed matrix, ``P × R``."""
        return _Transposed(self)

    def __matmul__(self, vector: Any) -> Tensor:
        """Return ``M v``, ``(R,)`` or ``(R, k)``, in the floating type of v.

        Args:
            vector: ``(P,)``, columns ``(P, k)``, or a dict name → tensor where columns are
                parameters.

        Raises:
            TypeError: If it is something else.
            ValueError: If it has a wrong shape or wrong names.
        """
        if isinstance(vector, Mapping):
            check_real(vector.values())
            vector = self.to_flat(vector)
        return product_with(self.multiply, vector, self.shape, self.dtype)

    def to_dense(self) -> Tensor:
        """Return the matrix, by as many products as its shorter side has entries."""
        rows, columns = self.shape
        eye = torch.eye(min(rows, columns), dtype=self.dtype, device=self.device)
        return self.multiply_transposed(eye).mT if rows < columns else self.multiply(eye)

    def to_scipy(self) -> Any:
        """Return a :class:`scipy.sparse.linalg.LinearOperator` on float64 NumPy vectors.

        Raises:
            ImportError: If SciPy is not installed.
        """
        return scipy_operator(
            self.shape, self.multiply, self.multiply_transposed, self.dtype, self.device
        )


@dataclass(frozen=True, eq=False)
class _Transposed(LinearMap):
    """``Mᵀ``."""

    original: LinearMap

    @property
    def shape(self) -> tuple[int, int]:
        """``(P, R)``."""
        rows, columns = self.original.shape
        return columns, rows

    @property
    def dtype(self) -> torch.dtype:
        """Type of the entries."""
        return self.original.dtype

    @property
    def device(self) -> torch.device:
        """Where the entries are."""
        return self.original.device

    @property
    def T(self) -> LinearMap:  # noqa: N802
        """M."""
        return self.original

    def multiply(self, columns: Tensor) -> Tensor:
        """Return ``Mᵀ U``."""
        return self.original.multiply_transposed(columns)

    def multiply_transposed(self, columns: Tensor) -> Tensor:
        """Return ``M V``."""
        return self.original.multiply(columns)


def check_real(vectors: Iterable[Any]) -> None:
    """Raise a TypeError unless all of some vectors are tensors of real numbers."""
    for vector in vectors:
        if not isinstance(vector, Tensor):
            raise TypeError(f"expected a tensor or a dict of tensors, got {type(vector).__name__}")
        if vector.is_complex():
            raise TypeError(
                f"expected real numbers, got {vector.dtype}: multiply real and imaginary parts one "
                "after the other"
            )


def as_given(product: Tensor, vector: Tensor) -> Tensor:
    """Return a product in the type of the vector, in its own if that has no fractions."""
    return product.to(vector.dtype) if vector.is_floating_point() else product


def product_with(
    multiply: Product, vector: Any, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """Return the product of a matrix ``(R, P)`` with real ``(P,)`` or ``(P, k)``, checked.

    Columns of ``dtype`` are multiplied, from ``(P, k)`` to ``(R, k)``; a TypeError or ValueError
    tells what is none.
    """
    check_columns(vector, shape[1])
    own = vector.to(dtype)
    if own.numel() == 0:
        product = own.new_zeros(shape[0], *own.shape[1:])
    else:
        product = multiply(own.unsqueeze(1))[:, 0] if own.dim() == 1 else multiply(own)
    return as_given(product, vector)


def check_columns(vector: Any, size: int) -> None:
    """Raise a TypeError or ValueError unless something is a real vector of a length, or columns."""
    check_real([vector])
    if vector.dim() not in (1, 2) or vector.shape[0] != size:
        raise ValueError(
            f"expected a vector of length {size} or columns ({size}, k), got shape "
            f"{tuple(vector.shape)}"
        )


def scipy_operator(
    shape: tuple[int, int],
    multiply: Product,
    multiply_transposed: Product,
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    """Return a :class:`scipy.sparse.linalg.LinearOperator` on float64 NumPy vectors.

    Args:
        shape: ``(R, P)``.
        multiply: From ``(P, k)`` to ``(R, k)``.
        multiply_transposed: From ``(R, k)`` to ``(P, k)``.
        dtype: Type of what these take.
        device: Where it is.

    Raises:
        ImportError: If SciPy is not installed.
    """
    try:
        from scipy.sparse.linalg import LinearOperator
    except ImportError as error:
        raise ImportError("to_scipy() needs SciPy: pip install scipy") from error

    def on_arrays(product: Product) -> Callable[[Any], Any]:
        def apply(array: Any) -> Any:
            tensor = torch.as_tensor(array, dtype=dtype, device=device)
            columns = product(tensor.reshape(len(tensor), -1))
            found = columns.double().cpu().numpy()
            return found[:, 0] if tensor.dim() == 1 else found

        return apply

    forward, backward = on_arrays(multiply), on_arrays(multiply_transposed)
    return LinearOperator(
        shape, matvec=forward, rmatvec=backward, matmat=forward, rmatmat=backward, dtype="f8"
    )
