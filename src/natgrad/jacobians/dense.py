"""Rows given outright."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from natgrad.jacobians.layer import (
    KroneckerSums,
    LayerJacobian,
    WeightSharing,
    at_least_float32,
    gram_by_gradients,
)
from natgrad.layouts import BlockLayout


class DenseJacobian(LayerJacobian):
    """Rows given outright, for modules natgrad knows no factored form of.

    Args:
        layout: The block's layout.
        rows: ``(N, K, P_l)``.
    """

    def __init__(self, layout: BlockLayout, rows: Tensor) -> None:
        self.layout = layout
        self._rows = at_least_float32(rows)
        self.samples: int
        self.directions: int
        self.samples, self.directions = rows.shape[:2]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the rows."""
        return self._rows.dtype

    @property
    def device(self) -> torch.device:
        """The device of the rows."""
        return self._rows.device

    def over_samples(self) -> tuple[Tensor, Tensor | None]:
        """Return the rows."""
        return self._rows, None

    def with_sums(self, sums: Tensor) -> DenseJacobian:
        """Return other rows of the same layout."""
        result = copy.copy(self)
        result._rows = sums
        return result

    def state(self) -> dict[str, Tensor]:
        """Return the rows."""
        return {"rows": self._rows}

    @property
    def gram_takes_gradients(self) -> bool:
        """Whether ``J Jᵀ`` is had from per-sample gradients: always."""
        return True

    def gram(self, other: LayerJacobian | None = None) -> Tensor:
        """Return ``J J'ᵀ``."""
        return gram_by_gradients(self, self if other is None else other, other is None)

    def matvec(self, vectors: Tensor) -> Tensor:
        """Return ``J v``."""
        return self._rows.flatten(0, 1) @ vectors

    def rmatvec(self, weights: Tensor) -> Tensor:
        """Return ``Jᵀ w``."""
        return self._rows.flatten(0, 1).T @ weights

    def per_sample_gradients(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return rows as matrices ``(n, K, G, d_out, d_in + bias)``."""
        return self.layout.matrix(self._rows[start:stop])

    def combined(self, weights: Tensor) -> DenseJacobian:
        """Combine rows of the same sample."""
        return DenseJacobian(self.layout, torch.einsum("nkj,nkp->njp", weights, self._rows))

    def parted(self, samples: int) -> DenseJacobian:
        """Return the rows of one sample as those of several."""
        return DenseJacobian(self.layout, self._rows[0].unflatten(0, (samples, -1)))

    def kronecker_factors(
        self,
        weight_sharing: WeightSharing = "expand",
        max_factor_size: int | None = None,
        continued: bool = False,
    ) -> KroneckerSums:
        """Return the factors of the product whose partial traces are those of the block.

        ``A = Σ MᵀM / tr``, ``B = Σ M Mᵀ``. Where each unit has one output, that is the block
        itself; of rows that sum all samples, only its diagonal, as they are too few for more.
        """
        layout = self.layout
        large_inputs, large_outputs = layout.large_factors(max_factor_size)
        diagonal = layout.one_hot or large_inputs
        rows = layout.matrix(self._rows.flatten(0, 1)).transpose(0, 1)  # (G, R, d_out, d_in + bias)
        count = rows.new_full((), self.samples)
        units = rows.flatten(1, 2)
        if diagonal or (layout.d_out == 1 and self.summed):
            inputs = units.square().sum(1)
            inputs = inputs if diagonal else torch.diag_embed(inputs)
        else:
            inputs = units.mT @ units
        if layout.d_out == 1:
            positions = torch.zeros_like(count) if continued else count
            outputs = positions.expand(layout.groups, 1, 1)
            return KroneckerSums(inputs, positions, outputs)
        columns = rows.transpose(2, 3).flatten(1, 2)
        outputs = columns.square().sum(1) if large_outputs else columns.mT @ columns
        return KroneckerSums(inputs, columns.square().sum((1, 2)), outputs)
