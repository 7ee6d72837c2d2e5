"""Rows given outright."""

from __future__ import annotations

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

__all__ = ["DenseJacobian"]


class DenseJacobian(LayerJacobian):
    """Rows given outright, for modules natgrad knows no factored form of.

    Args:
        layout: A layout with one group, one unit and ``d_in = P_l``.
        rows: ``(N, K, P_l)``.
    """

    def __init__(self, layout: BlockLayout, rows: Tensor) -> None:
        self.layout = layout
        self._rows = at_least_float32(rows)
        self.samples, self.directions = rows.shape[:2]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the rows."""
        return self._rows.dtype

    @property
    def device(self) -> torch.device:
        """The device of the rows."""
        return self._rows.device

    def state(self) -> dict[str, Tensor]:
        """Return the rows."""
        return {"rows": self._rows}

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
        """Return rows ``(n, K, 1, 1, P_l)``."""
        return self._rows[start:stop, :, None, None, :]

    def combined(self, weights: Tensor) -> DenseJacobian:
        """Combine rows of the same sample."""
        return DenseJacobian(self.layout, torch.einsum("nkj,nkp->njp", weights, self._rows))

    def kronecker_factors(
        self,
        weight_sharing: WeightSharing = "expand",
        max_factor_size: int | None = None,
        continued: bool = False,
    ) -> KroneckerSums:
        """Return the whole block as input factor, with a 1 × 1 output factor.

        The output factor is scaled so that both, once normalised, multiply to the exact block.
        """
        rows = self._rows.flatten(0, 1)
        if max_factor_size is not None and self.layout.numel > max_factor_size:
            inputs = rows.square().sum(0)
        else:
            inputs = rows.T @ rows
        count = rows.new_tensor(0.0 if continued else float(self.samples))
        return KroneckerSums(inputs.unsqueeze(0), count, count.reshape(1, 1, 1))
