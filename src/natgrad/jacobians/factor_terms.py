"""The sums that are K-FAC's factors, as rows, before they are multiplied out.

A structured factor K sees a sum ``S = Σ x xᵀ`` only as ``Π(Kᵀ S K)``, which the rows ``x K`` give
without any d × d matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from natgrad.jacobians.embedding import EmbeddingJacobian
from natgrad.jacobians.layer import CHUNK_ELEMENTS, LayerJacobian, WeightSharing
from natgrad.jacobians.linear import LinearJacobian, mean_inputs
from natgrad.jacobians.tied import SumJacobian, is_other_way_round


@dataclass(frozen=True)
class FactorTerm:
    """One term of a K-FAC factor's sum: ``Σ x xᵀ`` of rows, or a diagonal.

    Attributes:
        rows: ``(G, R, d)`` without the bias coordinate, or the diagonal, ``(G, d)``.
        bias: The input a bias sees; None without one.
        kept: Which rows count, ``(R,)`` of 0 and 1; None for all.
    """

    rows: Tensor
    bias: float | None = None
    kept: Tensor | None = None

    @property
    def diagonal(self) -> bool:
        """Whether it is given by its diagonal."""
        return self.rows.dim() == 2

    def chunks(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """Yield rows with their bias coordinate, some at a time, in a type."""
        size = self.rows.shape[2] + (self.bias is not None)
        step = max(1, CHUNK_ELEMENTS // max(1, size * self.rows.shape[0]))
        for start in range(0, max(1, self.rows.shape[1]), step):
            rows = self.rows[:, start : start + step]
            if self.bias is not None:
                rows = torch.cat([rows, rows.new_full((*rows.shape[:2], 1), self.bias)], dim=2)
            if self.kept is not None:
                rows = rows * self.kept[start : start + step].to(rows.dtype).unsqueeze(1)
            yield rows.to(dtype)

    def trace(self) -> Tensor:
        """Return the trace, groups summed."""
        if self.diagonal:
            return self.rows.sum()
        return torch.stack([x.square().sum() for x in self.chunks(self.rows.dtype)]).sum()


@dataclass(frozen=True)
class FactorTerms:
    """K-FAC's sums of one layer, as :class:`natgrad.jacobians.KroneckerSums` in rows.

    Attributes:
        inputs: Terms of ``Σ a aᵀ``; none where an earlier chunk has brought it.
        positions: What its mean divides by.
        outputs: Terms of ``Σ δ δᵀ``, likewise.
        further: Those of another product.
    """

    inputs: tuple[FactorTerm, ...]
    positions: Tensor
    outputs: tuple[FactorTerm, ...]
    further: FactorTerms | None = None

    def followed_by(self, more: FactorTerms | None) -> FactorTerms:
        """Return the same products with further ones."""
        further = more if self.further is None else self.further.followed_by(more)
        return replace(self, further=further)

    def with_terms(self, more: FactorTerms) -> FactorTerms:
        """Return the terms of both."""
        inputs, outputs = self.inputs + more.inputs, self.outputs + more.outputs
        return FactorTerms(inputs, self.positions + more.positions, outputs)


def factor_terms(rows: LayerJacobian, sharing: WeightSharing, continued: bool) -> FactorTerms:
    """Return what :meth:`LayerJacobian.kronecker_factors` sums, before it is multiplied out."""
    if isinstance(rows, SumJacobian):
        return _tied_terms(rows, sharing, continued)
    if isinstance(rows, LinearJacobian):
        return _linear_terms(rows, sharing, continued)
    return _dense_terms(rows, sharing, continued)


def _tied_terms(rows: SumJacobian, sharing: WeightSharing, continued: bool) -> FactorTerms:
    straight = FactorTerms((), torch.zeros((), dtype=rows.dtype, device=rows.device), ())
    turned: FactorTerms | None = None
    for part in rows.parts:
        terms = factor_terms(part, sharing, continued)
        if is_other_way_round(part.layout, rows.layout):
            terms = FactorTerms(terms.outputs, terms.positions, terms.inputs)
            turned = terms if turned is None else turned.with_terms(terms)
        else:
            straight = straight.with_terms(terms)
    return straight.followed_by(turned)


def _dense_terms(rows: LayerJacobian, sharing: WeightSharing, continued: bool) -> FactorTerms:
    """Return the terms of rows without a factored form, ``(R, G, d_out, d_in + bias)``."""
    layout = rows.layout
    sums = rows.kronecker_factors(sharing, 0, continued)
    flat = torch.cat([rows.per_sample_gradients(*chunk).flatten(0, 1) for chunk in rows.chunks()])
    matrices = flat.transpose(0, 1)
    outputs = FactorTerm(matrices.transpose(2, 3).flatten(1, 2))
    assert sums.inputs is not None and sums.outputs is not None
    if layout.d_out == 1:  # The whole block is the input factor.
        outputs = FactorTerm(sums.outputs.flatten(1))
    inputs = FactorTerm(sums.inputs)
    if not (layout.one_hot or (layout.d_out == 1 and rows.summed)):
        inputs = FactorTerm(matrices.flatten(1, 2))
    return FactorTerms((inputs,), sums.positions, (outputs,))


def _linear_terms(rows: LinearJacobian, sharing: WeightSharing, continued: bool) -> FactorTerms:
    delta, active = rows.output_gradients, rows.active_positions
    reduced = sharing == "reduce" and rows.positions > 1
    inputs: tuple[FactorTerm, ...] = ()
    positions = delta.new_zeros(())
    if not continued and isinstance(rows, EmbeddingJacobian):
        # With a size limit of 0 its sums are diagonals, which those of one-hot inputs are anyway.
        sums = rows.kronecker_factors(sharing, 0)
        assert sums.inputs is not None
        inputs, positions = (FactorTerm(sums.inputs),), sums.positions
    elif not continued:
        a, kept = rows.inputs, active
        if reduced:
            a, kept = mean_inputs(a, active)
        bias = rows.bias_value if rows.layout.has_bias else None
        mask = None if kept is None else kept.flatten()
        inputs = (FactorTerm(a.permute(2, 0, 1, 3).flatten(1, 2), bias, mask),)
        positions = delta.new_full((), a.shape[0] * a.shape[1]) if kept is None else kept.sum()
    if reduced:
        delta = delta.sum(2, keepdim=True)
    outputs = FactorTerm(delta.permute(3, 0, 1, 2, 4).flatten(1, 3))
    return FactorTerms(inputs, positions, (outputs,))
