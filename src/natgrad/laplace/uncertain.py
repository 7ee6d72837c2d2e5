"""The uncertain entries of the parameters, and the matrix of these with a prior added to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from natgrad.laplace.subnetwork import uncertain_entries
from natgrad.layouts import BlockLayout
from natgrad.operators import DenseOperator, FisherMatrix, Operator
from natgrad.operators.combined import DerivedOperator
from natgrad.operators.submatrix import spread

Damping = float | dict[str, float]


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


@dataclass(frozen=True)
class UncertainMatrix:
    """A Fisher matrix with what is certain left out.

    Attributes:
        matrix: F, of parameters some of whose entries are uncertain.
        blocks: Layer → how its parameters are laid out.
        masks: Parameter → which of its entries are uncertain; None for all.
    """

    matrix: FisherMatrix
    blocks: dict[str, BlockLayout]
    masks: Mapping[str, Tensor] | None = None

    @cached_property
    def entries(self) -> dict[str, Tensor | None]:
        """Part → which of its entries are uncertain; None for all."""
        parts = self.matrix.parts.items()
        return {name: uncertain_entries(self.masks, part.layout) for name, part in parts}

    @cached_property
    def parts(self) -> dict[str, Operator]:
        """Part → the matrix of its uncertain entries."""
        parts = dict(self.matrix.parts)
        for name, index in self.entries.items():
            if index is not None:
                parts[name] = cast("Operator", parts[name].submatrix(index))
        return parts

    @cached_property
    def owners(self) -> dict[str, Tensor]:
        """Part → the number of the layer that every uncertain entry belongs to."""
        blocks = enumerate(self.blocks.values())
        numbers = {name: index for index, block in blocks for name in block.names}
        found = {}
        for name, part in self.matrix.parts.items():
            pieces = zip(part.layout.names, part.layout.sizes, strict=True)
            each = torch.cat([torch.full((size,), numbers[n]) for n, size in pieces])
            index = self.entries[name]
            found[name] = each if index is None else each[index.cpu()]
        return found

    def of_parts(self, flat: Tensor) -> dict[str, Tensor]:
        """Return part → the uncertain entries of a vector ``(P,)`` of whole parameters."""
        found = {}
        for name, part in self.matrix.parts.items():
            own, index = self.matrix.layout.gather(part.layout, flat), self.entries[name]
            found[name] = own if index is None else own[index]
        return found

    def inverse(self, damping: Damping) -> FisherMatrix:
        """Return the inverse with a damping, one or one for each layer, as :meth:`_embedded`."""
        matrix, equal = self._with_equal_damping(damping)
        return self._embedded(matrix.inverse(equal))

    def inverse_root(self, damping: Damping) -> FisherMatrix:
        """Return the root of the inverse, likewise."""
        matrix, equal = self._with_equal_damping(damping)
        return self._embedded(matrix.inverse_root(equal))

    def _with_equal_damping(self, damping: Damping) -> tuple[FisherMatrix, Damping]:
        """Return a matrix whose parts have one damping each, and these.

        Parts of several layers with a damping each take all but the least of it into themselves.
        """
        parts = dict(self.parts)
        if isinstance(damping, dict):
            of_layers = torch.tensor([damping[n] for n in self.blocks], dtype=torch.float64)
            damping = {}
            for name, part in parts.items():
                each = of_layers[self.owners[name]]
                damping[name] = float(each.min())
                if bool((each > each.min()).any()):
                    dense = part.to_dense()
                    extra = torch.diag((each - each.min()).to(dense))
                    parts[name] = DenseOperator(part.layout, dense + extra)
        if self.masks is None:
            return dataclasses.replace(self.matrix, parts=parts), damping
        whole = self.matrix
        return FisherMatrix(whole.layout, parts, whole.members, whole.structure), damping

    def _embedded(self, matrix: FisherMatrix) -> FisherMatrix:
        """Return a matrix of the uncertain entries as one of whole parameters, zero elsewhere."""
        if self.masks is None:
            return matrix
        parts = dict(matrix.parts)
        for name, index in self.entries.items():
            if index is not None:
                layout = self.matrix.parts[name].layout
                parts[name] = EmbeddedOperator(layout, parts[name], index)
        return dataclasses.replace(matrix, parts=parts)
