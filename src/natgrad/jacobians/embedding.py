"""Rows of embeddings."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from natgrad.jacobians.layer import LayerJacobian, WeightSharing
from natgrad.jacobians.linear import LinearJacobian
from natgrad.jacobians.positions import Draw
from natgrad.layouts import BlockLayout


class EmbeddingJacobian(LinearJacobian):
    """Rows of an embedding: a linear map of one-hot inputs, kept as indices.

    Args:
        layout: A transposed layout with ``d_in`` the vocabulary size ``V``.
        indices: Token indices, ``(N, T)``.
        output_gradients: ``δ``, ``(N, K, T, 1, d)``, already zero where the token is the padding
            index.
        partial: As in :class:`LinearJacobian`.
    """

    def __init__(
        self,
        layout: BlockLayout,
        indices: Tensor,
        output_gradients: Tensor,
        *,
        partial: Tensor | None = None,
    ) -> None:
        super().__init__(layout, torch.empty(0), output_gradients, partial=partial)
        self.indices: Tensor = indices

    @property
    def inputs(self) -> Tensor:
        """One-hot inputs ``(N, T, 1, V)``, built only when asked for."""
        one_hot = torch.nn.functional.one_hot(self.indices, self.layout.d_in)
        return one_hot.unsqueeze(2).to(self.dtype)

    def product_rows(
        self, weight_sharing: WeightSharing, rows_per_unit: float | None, draw: Draw
    ) -> tuple[LayerJacobian, ...]:
        """Return one for all, as positions seldom have an input in common."""
        setting: WeightSharing = "expand" if weight_sharing == "split" else weight_sharing
        return super().product_rows(setting, rows_per_unit, draw)

    def over_samples(self) -> tuple[Tensor, Tensor | None]:
        """Return ``δ`` and the indices."""
        return self.output_gradients, self.indices

    def state(self) -> dict[str, Tensor]:
        """Return the indices and ``δ``."""
        return {"indices": self.indices, "output_gradients": self.output_gradients}

    def _share_inputs(self, samples: int) -> None:
        self.indices = self.indices.expand(samples, *self.indices.shape[1:])

    def _take_inputs(self, positions: Tensor, drawn: object) -> None:
        self.indices = self.indices[:, positions]

    def _take_samples(self, samples: Tensor) -> None:
        self.indices = self.indices[samples]

    def _input_products(self, other: LinearJacobian, start: int, stop: int, first: int) -> Tensor:
        assert isinstance(other, EmbeddingJacobian)
        left = self.indices[start:stop].reshape(-1, 1)
        return (left == other.indices[first:].reshape(1, -1)).to(self.dtype).unsqueeze(0)

    def _gram_operations(
        self, other: LinearJacobian, route: Literal["positions", "gradients"]
    ) -> float:
        # Inner products of one-hot inputs are comparisons, so d_in does not count.
        if route == "gradients":
            return super()._gram_operations(other, route)
        pairs = float(self.positions) * other.positions
        return pairs * float(self.rows) * other.rows * (self.layout.d_out + 1)

    def _apply(self, matrices: Tensor) -> Tensor:
        return matrices[..., self.indices].movedim(2, -1)

    def _contract(self, gradients: Tensor) -> Tensor:
        result = gradients.new_zeros(gradients.shape[0], 1, self.layout.d_in, self.layout.d_out)
        return result.index_add_(2, self.indices.reshape(-1), gradients).mT

    def _sample_gradients(self, start: int, stop: int) -> Tensor:
        delta = self.output_gradients[start:stop, :, :, 0]  # (n, K, T, d)
        n, k = delta.shape[:2]
        result = delta.new_zeros(n, k, self.layout.d_in, self.layout.d_out)
        index = self.indices[start:stop, None, :, None].expand(-1, k, -1, self.layout.d_out)
        return result.scatter_add_(2, index, delta).mT.unsqueeze(2)

    def _input_second_moment(self, weights: Tensor | None, diagonal: bool) -> Tensor:
        ones = (
            weights if weights is not None else self.output_gradients.new_ones(self.indices.shape)
        )
        counts = ones.new_zeros(self.layout.d_in)
        return counts.index_add_(0, self.indices.reshape(-1), ones.reshape(-1)).unsqueeze(0)

    def _reduced_second_moment(
        self, active: Tensor | None, diagonal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        # The mean one-hot vector of a sample is dense in V; its second moment is kept diagonal.
        weights = (
            active if active is not None else self.output_gradients.new_ones(self.indices.shape)
        )
        counts = weights.sum(1)
        shares = weights / counts.clamp(min=1.0).unsqueeze(1)
        same = (self.indices.unsqueeze(1) == self.indices.unsqueeze(2)).to(shares.dtype)
        # Σ_n ā_nv² = Σ_n Σ_{t,t'} [v_t = v_t' = v] s_t s_t'
        mass = shares * torch.einsum("nts,ns->nt", same, shares)
        moment = mass.new_zeros(self.layout.d_in)
        moment.index_add_(0, self.indices.reshape(-1), mass.reshape(-1))
        return shares, moment.unsqueeze(0), (counts > 0).to(mass.dtype).sum()
