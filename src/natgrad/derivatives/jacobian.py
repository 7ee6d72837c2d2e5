"""The Jacobian of a model's outputs, by products alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.derivatives.passes import Passes, derivatives, pushed_forward
from natgrad.fisher.batches import Batch, check_fixed_order
from natgrad.operators.linear_map import LinearMap


@dataclass(frozen=True, eq=False)
class JacobianMatrix(LinearMap):
    """``J = ∂outputs/∂θ``, ``R × P``, of all samples' outputs, one sample after the other.

    Rows are entries of the output of every batch as ``reshape(-1)`` lays them out. A product reads
    the data once: ``J V`` takes two backward passes per batch and one more per column, ``Jᵀ U`` one
    per column. Its transposed matrix is ``J.T``.

    Attributes:
        passes: The model and the data.
        rows: R.
    """

    passes: Passes
    rows: int

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Parameter names in the order of the columns."""
        return self.passes.layout.names

    @property
    def shape(self) -> tuple[int, int]:
        """``(R, P)``."""
        return self.rows, self.passes.layout.numel

    @property
    def dtype(self) -> torch.dtype:
        """Type of the entries."""
        return self.passes.layout.dtype

    @property
    def device(self) -> torch.device:
        """Where the entries are."""
        return self.passes.layout.device

    def to_flat(self, vector: Mapping[str, Tensor]) -> Tensor:
        """Return a dict of parameters as a flat vector."""
        return self.passes.layout.to_flat(vector)

    def multiply(self, columns: Tensor) -> Tensor:
        """Return ``J V``, ``(R, k)``."""
        pieces = []
        for one in self.passes:
            found = pushed_forward(one.output, self.passes, columns)
            pieces.append(torch.stack([piece.reshape(-1) for piece in found], 1))
        return torch.cat(pieces).to(self.dtype)

    def multiply_transposed(self, columns: Tensor) -> Tensor:
        """Return ``Jᵀ U``, ``(P, k)``."""
        total = columns.new_zeros(self.shape[1], columns.shape[1])
        start = 0
        for one in self.passes:
            own = columns[start : start + one.output.numel()]
            vectors = [column.view_as(one.output) for column in own.unbind(1)]
            total += torch.stack(derivatives(one.output, self.passes, vectors), 1)
            start += one.output.numel()
        return total


def jacobian_matrix(
    model: nn.Module,
    data: Batch | Iterable[Batch],
    *,
    output: Callable[[Any], Tensor] | None = None,
) -> JacobianMatrix:
    """Return the Jacobian of a model's outputs with respect to its parameters, matrix-free.

    Args:
        model: Any module; it runs in its present train or eval mode, once now and at every product.
        data: A pair ``(inputs, targets)`` or a re-iterable of such pairs in a fixed order. Targets
            are not looked at and may be None.
        output: Picks the tensor of interest out of the model's output.

    Returns:
        J, ``R × P`` with R the entries of all outputs.

    Raises:
        ValueError: If the model has no trainable parameter, or the data cannot be read again or
            come in another order then.

    Example:
        >>> J = natgrad.jacobian_matrix(model, (x, None))
        >>> change = J @ {name: 1e-3 * p for name, p in model.named_parameters()}
        >>> gradient = J.T @ torch.ones(J.shape[0])
    """
    check_fixed_order(data)
    passes = Passes.of(model, data, None, output)
    return JacobianMatrix(passes, sum(one.output.numel() for one in passes))
