"""The sums of which Kronecker factors are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from natgrad.distributed.exchange import Symmetric
from natgrad.jacobians import KroneckerSums
from natgrad.jacobians.tied import added
from natgrad.statistics.statistics import Statistics
from natgrad.statistics.triangles import LEAST_SIZE, LowerTriangles

__all__ = [
    "KroneckerStatistics",
    "factor_diagonal",
    "merging_weights",
    "whole",
]

#: A sum of outer products, ``(G, d, d)``, or its diagonal, ``(G, d)``.
Factor = Tensor | LowerTriangles


@dataclass(frozen=True, eq=False)
class KroneckerStatistics(Statistics):
    r"""Second moments of one layer's inputs and output gradients.

    Matrices are right in their lower triangles, which is all that factorisations read, and all that
    is kept of large ones.

    The products ``B_i ⊗ A_i`` of uses of a parameter the one way round and the other, as of an
    embedding tied to the output layer, are merged into one that keeps their trace,

    .. math:: A = \sum_i tr(B_i) A_i / \sum_i tr(A_i) tr(B_i), \qquad B = \sum_i tr(A_i) B_i,

    the partial traces of their sum: exact where all uses are proportional, and the same however
    each product's scale is split between its factors.

    Attributes:
        inputs: ``Σ a aᵀ``, ``(G, d_in + bias, d_in + bias)``, its lower triangles, or its diagonal
            ``(G, d_in + bias)``; None in a further chunk of output gradients of samples that are
            counted already.
        positions: What the mean of ``inputs`` divides by, mostly how many terms it sums; a scalar
            or one number per group.
        outputs: ``Σ δ δᵀ``, ``(G, d_out, d_out)``, its lower triangles, or its diagonal.
        turned: The sums of uses the other way round, with inputs and outputs exchanged.
    """

    inputs: Factor | None
    positions: Tensor
    outputs: Factor | None
    turned: KroneckerStatistics | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Keep the lower triangles of large matrices."""
        for name in ("inputs", "outputs"):
            factor = getattr(self, name)
            if isinstance(factor, Tensor) and factor.dim() == 3 and factor.shape[-1] >= LEAST_SIZE:
                object.__setattr__(self, name, LowerTriangles.of(factor))

    @classmethod
    def of(cls, count: Tensor, sums: KroneckerSums) -> KroneckerStatistics:
        """Return the statistics of sums over a batch."""
        turned = None if sums.turned is None else cls.of(count, sums.turned)
        return KroneckerStatistics(count, sums.inputs, sums.positions, sums.outputs, turned=turned)

    def is_finite(self) -> Tensor:
        """Return whether the diagonals are finite: Σ x xᵀ is exactly if its diagonal is."""
        flags = [torch.isfinite(_diagonal(f)).all() for f in self._factors()]
        return torch.stack([*flags, torch.isfinite(self.count)]).all()

    def _factors(self) -> list[Factor]:
        own = [factor for factor in (self.inputs, self.outputs) if factor is not None]
        return own if self.turned is None else own + self.turned._factors()

    def sums(self) -> dict[str, Any]:
        """Return the sums, of symmetric matrices half."""
        state = super().sums()
        for name in ("inputs", "outputs"):
            factor = getattr(self, name)
            if isinstance(factor, LowerTriangles) or (factor is not None and factor.dim() == 3):
                state[name] = Symmetric(whole(factor))
        if self.turned is not None:
            state["turned"] = self.turned.sums()
        return state

    def trace(self) -> Tensor:
        """Return the trace of the mean B ⊗ A, groups summed."""
        if self.turned is not None:
            a, b = self.mean_factors()
            return (factor_diagonal(a).sum(-1) * factor_diagonal(b).sum(-1)).sum()
        assert self.inputs is not None and self.outputs is not None
        a, b = (_diagonal(factor).sum(-1) for factor in (self.inputs, self.outputs))
        a = a / self.positions.clamp(min=1e-30)
        return (a * b * self.count.clamp(min=1e-300).reciprocal().to(b.dtype)).sum()

    def mean_factors(self) -> tuple[Tensor, Tensor]:
        """Return ``(A, B)``, right in their lower triangles."""
        inputs, outputs = self._merged()
        return inputs, outputs * self.count.clamp(min=1e-300).reciprocal().to(outputs.dtype)

    def _merged(self) -> tuple[Tensor, Tensor]:
        """Return A and B times the count."""
        pairs, positions = [], []
        for one in (self, self.turned):
            if one is not None and one.inputs is not None and one.outputs is not None:
                pairs.append((whole(one.inputs), whole(one.outputs)))
                positions.append(one.positions)
        (inputs, outputs), number = pairs[0], positions[0].clamp(min=1e-30)
        if len(pairs) == 1:
            number = number.reshape(-1, *[1] * (inputs.dim() - 1)) if number.dim() else number
            return inputs / number, outputs
        traces = [(factor_diagonal(a).sum(), factor_diagonal(b).sum()) for a, b in pairs]
        (v, w), (v_turned, w_turned) = merging_weights(traces, positions)
        a = added(inputs * v, pairs[1][0] * v_turned)
        b = added(outputs * w, pairs[1][1] * w_turned)
        assert a is not None and b is not None
        return a, b


def merging_weights(
    traces: Sequence[tuple[Tensor, Tensor]], positions: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Return the weights of the sums of every use in merged factors A and B.

    Args:
        traces: Those of every use's sums of inputs and of outputs.
        positions: What the mean of every use's product divides by.
    """
    # Sums that a long absence has made small count as little, but for none at all.
    shares = [torch.where(count > 0, 1.0 / count, 0.0) for count in positions]
    uses = list(zip(traces, shares, strict=True))
    total = torch.stack([a * b * share for (a, b), share in uses]).sum()
    total = torch.where(total > 0, total, torch.ones_like(total))
    return [(b * share / total, a * share) for (a, b), share in uses]


def whole(factor: Factor) -> Tensor:
    """Return a factor as a tensor, ``(G, d, d)`` or its diagonal ``(G, d)``."""
    return factor if isinstance(factor, Tensor) else factor.matrices()


def _diagonal(factor: Factor) -> Tensor:
    return factor_diagonal(factor) if isinstance(factor, Tensor) else factor.diagonal()


def factor_diagonal(factor: Tensor) -> Tensor:
    """Return the diagonal ``(G, d)`` of a factor, ``(G, d, d)`` or already its diagonal."""
    return factor.diagonal(dim1=-2, dim2=-1) if factor.dim() == 3 else factor
