"""Rows of a parameter that unlike layers share."""

from __future__ import annotations

import torch
from torch import Tensor

from natgrad.jacobians.layer import (
    KroneckerSums,
    LayerJacobian,
    WeightSharing,
    added,
    gram_by_gradients,
)
from natgrad.jacobians.positions import Draw
from natgrad.layouts import BlockLayout


class SumJacobian(LayerJacobian):
    """Sum of several uses of one parameter that have no common factored form.

    An embedding tied to the output layer is the usual case: its weight acts once on one-hot
    inputs and once, transposed, on hidden states.

    Args:
        parts: Jacobians of the same parameter with the same ``N`` and ``K``.
        layout: The block's layout; by default that of the first part stored the ordinary way round.
    """

    def __init__(self, parts: list[LayerJacobian], layout: BlockLayout | None = None) -> None:
        self.parts: list[LayerJacobian] = sorted(parts, key=lambda part: part.layout.transposed)
        self.layout: BlockLayout = self.parts[0].layout if layout is None else layout
        self.samples: int = parts[0].samples
        self.directions: int = parts[0].directions

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first part."""
        return self.parts[0].dtype

    @property
    def device(self) -> torch.device:
        """The device of the first part."""
        return self.parts[0].device

    def in_type(self, dtype: torch.dtype) -> SumJacobian:
        """Return the rows of every use in a floating-point type."""
        result = super().in_type(dtype)
        result.parts = [part.in_type(dtype) for part in self.parts]
        return result

    def state(self) -> dict[str, Tensor]:
        """Return every part's tensors under its number."""
        return {f"{i}.{k}": v for i, part in enumerate(self.parts) for k, v in part.state().items()}

    @property
    def gram_takes_gradients(self) -> bool:
        """Whether ``J Jᵀ`` is had from per-sample gradients: always."""
        return True

    def gram(self, other: LayerJacobian | None = None) -> Tensor:
        """Return ``J J'ᵀ`` with the cross terms between uses."""
        return gram_by_gradients(self, self if other is None else other, other is None)

    def matvec(self, vectors: Tensor) -> Tensor:
        """Return ``J v``."""
        result = self.parts[0].matvec(vectors)
        for part in self.parts[1:]:
            result = result + part.matvec(vectors)
        return result

    def rmatvec(self, weights: Tensor) -> Tensor:
        """Return ``Jᵀ w``."""
        result = self.parts[0].rmatvec(weights)
        for part in self.parts[1:]:
            result = result + part.rmatvec(weights)
        return result

    def per_sample_gradients(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the summed rows as matrices of the block's layout."""
        total: Tensor | None = None
        for part in self.parts:
            rows = part.layout.flat(part.per_sample_gradients(start, stop))
            total = rows if total is None else total + rows
        assert total is not None
        return self.layout.matrix(total)

    def combined(self, weights: Tensor) -> SumJacobian:
        """Combine the rows of every use."""
        return SumJacobian([part.combined(weights) for part in self.parts], self.layout)

    def parted(self, samples: int) -> SumJacobian:
        """Part the rows of every use."""
        return SumJacobian([part.parted(samples) for part in self.parts], self.layout)

    def of_ragged(self) -> SumJacobian:
        """Mark the rows of every use."""
        return SumJacobian([part.of_ragged() for part in self.parts], self.layout)

    def product_rows(
        self, weight_sharing: WeightSharing, rows_per_unit: float | None, draw: Draw
    ) -> tuple[LayerJacobian, ...]:
        """Return the means, and the deviations, of all uses, at all positions."""
        if weight_sharing != "split":
            return (self,)
        found = [part.product_rows(weight_sharing, None, draw) for part in self.parts]
        split = [[one[0] for one in found], [one[1] for one in found if len(one) > 1]]
        return tuple(SumJacobian(parts, self.layout) for parts in split if parts)

    def kronecker_factors(
        self,
        weight_sharing: WeightSharing = "expand",
        max_factor_size: int | None = None,
        continued: bool = False,
    ) -> KroneckerSums:
        """Return the factors of uses the one way round, and of those the other way round."""
        straight: KroneckerSums | None = None
        turned: KroneckerSums | None = None
        for part in self.parts:
            sums = part.kronecker_factors(weight_sharing, max_factor_size, continued)
            if is_other_way_round(part.layout, self.layout):
                sums = KroneckerSums(sums.outputs, sums.positions, sums.inputs)
                turned = _pooled(turned, sums)
            else:
                straight = _pooled(straight, sums)
        if straight is None:
            none = torch.zeros((), dtype=self.dtype, device=self.device)
            straight = KroneckerSums(None, none, None)
        return straight.followed_by(turned)


def _pooled(total: KroneckerSums | None, more: KroneckerSums) -> KroneckerSums:
    if total is None:
        return more
    inputs, outputs = added(total.inputs, more.inputs), added(total.outputs, more.outputs)
    return KroneckerSums(inputs, total.positions + more.positions, outputs)


def is_other_way_round(layout: BlockLayout, reference: BlockLayout) -> bool:
    """Return whether a layout's matrices are those of the reference, transposed.

    Of a bias, plain rows are one row and those of a linear layer one column.
    """
    shape = (layout.d_out, layout.d_augmented)
    wanted = (reference.d_out, reference.d_augmented)
    return layout.transposed != reference.transposed or shape == wanted[::-1] != wanted
