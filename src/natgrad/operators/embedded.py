"""A matrix about some of the entries, zero at all others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from natgrad.operators.combined import DerivedOperator
from natgrad.operators.submatrix import spread


@dataclass(frozen=True, eq=False)
class EmbeddedOperator(DerivedOperator):
    """``E F Eᵀ`` with the columns of the identity that an index picks, E.

    Attributes:
        layout: How vectors are cut into parameters.
        operator: F.
        index: Which entries F is about, ``(P',)``.
    """

    index: Tensor

    def multiply(self, columns: Tensor) -> Tensor:
        """Return ``E F Eᵀ V``."""
        return spread(self.operator.multiply(columns[self.index]), self.index, self.layout.numel)

    def trace(self) -> Tensor:
        """Return ``tr F``."""
        return self.operator.trace()

    def diagonal(self) -> Tensor:
        """Return the diagonal, zero at other entries."""
        column = self.operator.diagonal().unsqueeze(1)
        return spread(column, self.index, self.layout.numel)[:, 0]

    def eigenvalues(self) -> Tensor:
        """Return those of F, and zeros."""
        values = self.operator.eigenvalues()
        return torch.cat([values, values.new_zeros(self.layout.numel - len(values))])
