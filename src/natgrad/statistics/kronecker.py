"""The sums of which Kronecker factors are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from natgrad.distributed.exchange import Symmetric
from natgrad.jacobians import KroneckerSums
from natgrad.jacobians.layer import added
from natgrad.statistics.statistics import Statistics
from natgrad.statistics.triangles import LEAST_SIZE, LowerTriangles

#: A sum of outer products, ``(G, d, d)``, or its diagonal, ``(G, d)``.
Factor = Tensor | LowerTriangles


@dataclass(frozen=True, eq=False)
class KroneckerStatistics(Statistics):
    r"""Second moments of one layer's inputs and output gradients.

    Matrices are right in their lower triangles, which is all that factorisations read, and all that
    is kept of large ones.

    Several products ``B_i ⊗ A_i`` (of uses of a parameter the one way round and the other, as of an
    embedding tied to the output layer; of means over positions and of deviations from them) are
    merged into one that keeps their trace,

    .. math:: A = \sum_i tr(B_i) A_i / \sum_i tr(A_i) tr(B_i), \qquad B = \sum_i tr(A_i) B_i,

    the partial traces of their sum: exact where all are proportional, and the same however each
    product's scale is split between its factors.

    Attributes:
        inputs: ``Σ a aᵀ``, ``(G, d_in + bias, d_in + bias)``, its lower triangles, or its diagonal
            ``(G, d_in + bias)``; None in a further chunk of output gradients of samples that are
            counted already.
        positions: What the mean of ``inputs`` divides by, mostly how many terms it sums; a scalar
            or one number per group.
        outputs: ``Σ δ δᵀ``, ``(G, d_out, d_out)``, its lower triangles, or its diagonal.
        further: The sums of another product.
        input_sum: ``Σ a``, ``(G, d_in + bias)``, where ``inputs`` is a diagonal that is kept about
            the mean; else None.
    """

    inputs: Factor | None
    positions: Tensor
    outputs: Factor | None
    further: KroneckerStatistics | None = field(default=None, kw_only=True)
    input_sum: Tensor | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Keep the lower triangles of large matrices."""
        for name in ("inputs", "outputs"):
            factor = getattr(self, name)
            if isinstance(factor, Tensor) and factor.dim() == 3 and factor.shape[-1] >= LEAST_SIZE:
                object.__setattr__(self, name, LowerTriangles.of(factor))

    @classmethod
    def of(
        cls, count: Tensor, sums: KroneckerSums, about_mean: bool = False
    ) -> KroneckerStatistics:
        """Return statistics of sums over a batch, diagonals of inputs perhaps about means."""
        further = None if sums.further is None else cls.of(count, sums.further, about_mean)
        total = sums.input_sum if about_mean else None
        own = sums.inputs, sums.positions, sums.outputs
        return KroneckerStatistics(count, *own, further=further, input_sum=total)

    def is_finite(self) -> Tensor:
        """Return whether the diagonals are finite: Σ x xᵀ is exactly if its diagonal is."""
        flags = [torch.isfinite(self.count)]
        for one in self._products():
            for factor in (one.inputs, one.outputs):
                if factor is not None:
                    flags.append(torch.isfinite(_diagonal(factor)).all())
        return torch.stack(flags).all()

    def _products(self) -> list[KroneckerStatistics]:
        return [self, *([] if self.further is None else self.further._products())]

    def sums(self) -> dict[str, Any]:
        """Return the sums, of symmetric matrices half."""
        state = super().sums()
        for name in ("inputs", "outputs"):
            factor = getattr(self, name)
            if isinstance(factor, LowerTriangles) or (factor is not None and factor.dim() == 3):
                state[name] = Symmetric(factor)
        if self.further is not None:
            state["further"] = self.further.sums()
        return state

    def trace(self) -> Tensor:
        """Return the trace of the mean B ⊗ A, groups summed."""
        traces = []
        for one in self._whole_products():
            a, b = _diagonal(one.inputs).sum(-1), _diagonal(one.outputs).sum(-1)
            traces.append((a * b * _reciprocal(one.positions)).sum())
        return torch.stack(traces).sum() * self._per_count(traces[0].dtype)

    def _whole_products(self) -> list[Any]:
        """Return the products of which both factors have been seen."""
        products = self._products()
        return [x for x in products if x.inputs is not None and x.outputs is not None]

    def _per_count(self, dtype: torch.dtype) -> Tensor:
        return self.count.clamp(min=1e-300).reciprocal().to(dtype)

    def mean_factors(self) -> tuple[Tensor, Tensor]:
        """Return ``(A, B)``, right in their lower triangles."""
        inputs: Tensor | None = None
        outputs: Tensor | None = None
        for (v, w), one in zip(self._weights(), self._whole_products(), strict=True):
            inputs, b = added(inputs, _each(v, whole(one.inputs))), whole(one.outputs)
            outputs = added(outputs, b if w is None else _each(w, b))
        assert inputs is not None and outputs is not None
        return inputs, outputs * self._per_count(outputs.dtype)

    def mean_rows(self) -> tuple[Tensor, Tensor] | None:
        """Return l and r, ``(G, m, d)``, with ``A = diag(…) + lᵀr`` for A about the mean inputs.

        There is one row for each product: ``r = Σ a`` and ``l = r/(Σ 1)²`` of a single one. None
        where no product has them.
        """
        products = self._whole_products()
        if all(one.input_sum is None for one in products):
            return None
        left, right = [], []
        for one, (v, _) in zip(products, self._weights(), strict=True):
            if one.input_sum is not None:
                right.append(one.input_sum)
                left.append(_each(v * _reciprocal(one.positions), one.input_sum))
        return torch.stack(left, 1), torch.stack(right, 1)

    def _weights(self) -> list[tuple[Tensor, Tensor | None]]:
        """Return the weights of every product's sums in A and in B."""
        products = self._whole_products()
        if len(products) == 1:
            return [(products[0].positions.clamp(min=1e-30).reciprocal(), None)]
        traces = [(_diagonal(x.inputs).sum(-1), _diagonal(x.outputs).sum(-1)) for x in products]
        return list(merging_weights(traces, [one.positions for one in products]))


def _each(weight: Tensor, factor: Tensor) -> Tensor:
    """Return a factor of every group times its weight, or that of all, in the factor's type."""
    return factor * (weight.view(-1, *[1] * (factor.dim() - 1)) if weight.dim() else weight)


def merging_weights(
    traces: Sequence[tuple[Tensor, Tensor]], positions: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Return the weights of the sums of every product in merged factors A and B.

    Args:
        traces: Those of every product's sums of inputs and of outputs, in all or per group.
        positions: What the mean of every product divides by.
    """
    products = [(a, b, _reciprocal(count)) for (a, b), count in zip(traces, positions, strict=True)]
    total = torch.stack([a * b * share for a, b, share in products]).sum(0)
    total = torch.where(total > 0, total, torch.ones_like(total))
    return [(b * share / total, a * share) for a, b, share in products]


def _reciprocal(count: Tensor) -> Tensor:
    # Sums that a long absence has made small count as little, but for none at all.
    return torch.where(count > 0, 1.0 / count, 0.0)


def whole(factor: Factor) -> Tensor:
    """Return a factor as a tensor, ``(G, d, d)`` or its diagonal ``(G, d)``."""
    return factor if isinstance(factor, Tensor) else factor.matrices()


def _diagonal(factor: Factor) -> Tensor:
    diagonal = factor_diagonal(factor) if isinstance(factor, Tensor) else factor.diagonal()
    return diagonal.contiguous()  # Sums round by how entries lie in memory.


def factor_diagonal(factor: Tensor) -> Tensor:
    """Return the diagonal ``(G, d)`` of a factor, ``(G, d, d)`` or already its diagonal."""
    return factor.diagonal(dim1=-2, dim2=-1) if factor.dim() == 3 else factor
