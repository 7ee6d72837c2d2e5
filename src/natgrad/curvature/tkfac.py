r"""TKFAC: every layer's block as one Kronecker product with the block's own trace.

.. math:: F_l \approx \delta\, \Psi \otimes \Phi, \qquad
          \Phi \propto \sum_{nk} \|\delta_{nk}\|^2 a_n a_n^\top, \quad
          \Psi \propto \sum_{nk} \|a_n\|^2 \delta_{nk} \delta_{nk}^\top, \quad
          \delta = \frac{1}{count} \sum_{nk} \|M_{nk}\|^2

with ``tr Φ = tr Ψ = 1`` (Gao et al. 2021). Without shared positions ``δΦ`` and ``δΨ`` are the two
partial traces of the exact block. Unlike K-FAC it knows that large inputs may come with small
output gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from natgrad.curvature.cost import Cost, Elements, Workload
from natgrad.curvature.kfac import KroneckerFactors, check_factors, zero_factors
from natgrad.curvature.structure import Part, Structure, register_structure
from natgrad.jacobians import (
    FIRST_DRAW,
    Draw,
    EmbeddingJacobian,
    Jacobians,
    LayerJacobian,
    LinearJacobian,
    WeightSharing,
)
from natgrad.jacobians.moments import second_moments
from natgrad.layouts import BlockLayout
from natgrad.operators import KroneckerOperator
from natgrad.statistics import KroneckerStatistics, Statistics
from natgrad.statistics.kronecker import factor_diagonal, whole


@dataclass(frozen=True, eq=False)
class TraceStatistics(KroneckerStatistics):
    """Weighted second moments: ``inputs`` Σ ‖δ‖² a aᵀ, ``outputs`` Σ ‖a‖² δ δᵀ.

    Attributes:
        traces: Trace of the exact rows, per group, ``(G,)``.
    """

    traces: Tensor

    def is_finite(self) -> Tensor:
        """Return whether traces and diagonals are finite."""
        return super().is_finite() & torch.isfinite(self.traces).all()

    def trace(self) -> Tensor:
        """Return δ, groups summed."""
        return (self.traces * self.count.clamp(min=1e-300).reciprocal().to(self.traces.dtype)).sum()

    def mean_factors(self) -> tuple[Tensor, Tensor]:
        """Return ``(√δ Φ, √δ Ψ)``."""
        assert self.inputs is not None and self.outputs is not None
        mean = self.traces * self.count.clamp(min=1e-300).reciprocal().to(self.traces.dtype)
        root = mean.sqrt()
        inputs = _with_trace(whole(self.inputs), root, self.traces)
        return inputs, _with_trace(whole(self.outputs), root, self.traces)


@register_structure
@dataclass(frozen=True)
class TraceKronecker(Structure):
    """One Kronecker product per layer that keeps the layer's trace; memory as K-FAC.

    For shared weights *expand* takes every position as a sample of its own
    (``Σ_nkt ‖δ_nkt‖² a_nt a_ntᵀ``), *reduce* the mean input and the summed output gradient of each
    sample. Either way δ is the trace of the exact block, cross terms between positions included;
    where the summed output gradients all cancel, the identity stands for the factors.
    Rows without a factored form give the partial traces ``Σ MᵀM`` and ``Σ MMᵀ``. Groups have one
    pair and one trace each. Embeddings keep the diagonal of ``Φ``, which *expand* makes exact.

    Attributes:
        weight_sharing: ``"expand"`` or ``"reduce"``, as above.
        factored_damping: As in K-FAC; the factors damped are ``√δ Φ`` and ``√δ Ψ``.
        max_factor_size: Larger factors are kept as their diagonal, and those of outputs from an
            eighth of it on where they are more than eight times the inputs; None for no limit.

    Raises:
        ValueError: If an option is out of range.
    """

    name: ClassVar[str] = "tkfac"
    shareable: ClassVar[bool] = True
    object_options: ClassVar[Mapping[str, Any]] = {"factored_damping": False}

    weight_sharing: WeightSharing = "expand"
    factored_damping: bool = True
    max_factor_size: int | None = 8192

    def __post_init__(self) -> None:
        """Check the options."""
        check_factors(self.weight_sharing, None, splits=False)

    def statistics(
        self,
        part: Part,
        rows: Jacobians,
        count: Tensor,
        *,
        previous: Statistics | None = None,
        draw: Draw = FIRST_DRAW,
        continued: bool = False,
    ) -> TraceStatistics:
        """Sum weighted second moments."""
        return trace_statistics(rows[part.name], count, self.weight_sharing, self.max_factor_size)

    def operator(self, part: Part, statistics: Statistics | None) -> KroneckerOperator:
        """Return ``√δΨ ⊗ √δΦ``."""
        if statistics is None:
            return KroneckerOperator(part.block, *zero_factors(part), self.factored_damping)
        assert isinstance(statistics, TraceStatistics)
        return KroneckerOperator(part.block, *statistics.mean_factors(), self.factored_damping)

    def _kfac(self) -> KroneckerFactors:
        return KroneckerFactors(
            self.weight_sharing, self.factored_damping, self.max_factor_size, None
        )

    def takes_rows(self, block: BlockLayout, rows: int) -> bool:
        """Return whether rows are cheaper to precondition than the gradient they sum to."""
        return self._kfac().takes_rows(block, rows)

    def cost(self, part: Part, workload: Workload) -> Cost:
        """Return the cost, that of K-FAC with all rows."""
        return self._kfac().cost(part, workload)

    def elements(self, part: Part, workload: Workload) -> Elements:
        """Return the elements of K-FAC, and a trace per group."""
        found, groups = self._kfac().elements(part, workload), part.block.groups
        return replace(found, statistics=found.statistics + groups, sums=found.sums + groups)


def trace_statistics(
    rows: LayerJacobian, count: Tensor, weight_sharing: WeightSharing, max_factor_size: int | None
) -> TraceStatistics:
    """Return the weighted second moments of one layer's rows; larger factors as diagonals."""
    large = rows.layout.large_factors(max_factor_size)
    if isinstance(rows, LinearJacobian):
        inputs, outputs = _weighted_moments(rows, weight_sharing, large)
    else:
        inputs, outputs = _partial_traces(rows, large)
    if isinstance(rows, LinearJacobian) and rows.positions > 1:
        traces = second_moments(rows, None, None).sum((1, 2))
    else:
        traces = factor_diagonal(inputs).sum(-1)
    return TraceStatistics(count, inputs, traces.new_zeros(()), outputs, traces)


def _weighted_moments(
    rows: LinearJacobian, weight_sharing: WeightSharing, large: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """Return ``Σ ‖δ‖² a aᵀ`` and ``Σ ‖a‖² δ δᵀ`` over samples, directions and positions."""
    reduced = weight_sharing == "reduce" and rows.positions > 1
    delta = rows.output_gradients.sum(2, keepdim=True) if reduced else rows.output_gradients
    weights = delta.square().sum((1, 4))  # (N, T, G)
    if isinstance(rows, EmbeddingJacobian):
        mass = _token_mass(rows) if reduced else torch.ones_like(weights[..., 0])
        inputs = mass.new_zeros(rows.layout.d_in)
        inputs.index_add_(0, rows.indices.flatten(), (mass * weights[..., 0]).flatten())
        inputs = inputs.unsqueeze(0)
        sizes = mass.sum(1).view(-1, 1, 1) if reduced else mass.unsqueeze(2)
    else:
        a = _mean_inputs(rows) if reduced else rows.augmented_inputs()
        inputs = _moment(a, weights, large[0])
        sizes = a.square().sum(-1)
    return inputs, _moment(delta, sizes.unsqueeze(1).expand(delta.shape[:-1]), large[1])


def _shares(rows: LinearJacobian) -> Tensor:
    """Return what each position that counts has of its sample's mean, ``(N, T)``."""
    active = rows.active_positions
    if active is None:
        return rows.output_gradients.new_full((rows.samples, rows.positions), 1.0 / rows.positions)
    return active / active.sum(1, keepdim=True).clamp(min=1.0)


def _mean_inputs(rows: LinearJacobian) -> Tensor:
    return (rows.augmented_inputs() * _shares(rows)[:, :, None, None]).sum(1, keepdim=True)


def _token_mass(rows: EmbeddingJacobian) -> Tensor:
    """Return ``m`` (N, T) whose sum over a token's positions is its mean one-hot entry squared."""
    shares = _shares(rows)
    same = (rows.indices.unsqueeze(1) == rows.indices.unsqueeze(2)).to(shares.dtype)
    return shares * torch.einsum("nts,ns->nt", same, shares)


def _moment(rows: Tensor, weights: Tensor | None, diagonal: bool) -> Tensor:
    """Return ``Σ w x xᵀ`` for ``x`` (..., G, d) and ``w`` (..., G) or 1, or its diagonal."""
    x = rows.movedim(-2, 0).flatten(1, -2)  # (G, R, d)
    scaled = x if weights is None else x * weights.movedim(-1, 0).flatten(1).unsqueeze(-1)
    if diagonal:
        return (scaled * x).sum(1)
    return scaled.mT @ x


def _partial_traces(rows: LayerJacobian, large: tuple[bool, bool]) -> tuple[Tensor, Tensor]:
    """Return ``Σ MᵀM`` and ``Σ MMᵀ``, or their diagonals."""
    inputs: Tensor | None = None
    outputs: Tensor | None = None
    for start, stop in rows.chunks():
        # Lines of matrices, (n, K, d_out, G, d_in + bias), are what inputs are elsewhere.
        lines = rows.per_sample_gradients(start, stop).transpose(2, 3)
        both = lines, lines.transpose(2, 4)
        found = [_moment(x, None, diagonal) for x, diagonal in zip(both, large, strict=True)]
        inputs = found[0] if inputs is None else inputs + found[0]
        outputs = found[1] if outputs is None else outputs + found[1]
    assert inputs is not None and outputs is not None
    return inputs, outputs


def _with_trace(factor: Tensor, trace: Tensor, total: Tensor) -> Tensor:
    """Scale a factor, a sum of weighted second moments, of each group to a given trace ``(G,)``.

    Beside the trace of the exact rows it may be nothing but rounding, where *reduce* sums output
    gradients that cancel; it is then replaced by the identity.
    """
    size, shape = factor.shape[-1], (-1, *[1] * (factor.dim() - 1))
    present = factor_diagonal(factor).sum(-1)
    lost = present <= torch.finfo(factor.dtype).eps * total
    scaled = factor * (trace / torch.where(lost, 1.0, present)).view(shape)
    ones = torch.ones(size, dtype=factor.dtype, device=factor.device)
    identity = ones if factor.dim() == 2 else torch.diag(ones)
    return torch.where(lost.view(shape), identity * (trace / size).view(shape), scaled)
