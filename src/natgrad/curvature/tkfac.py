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
from typing import Any, ClassVar

import torch
from torch import Tensor

from natgrad.curvature.base import check_choice, refuse_options
from natgrad.curvature.ekfac import second_moments
from natgrad.curvature.factors import discounted_sum, factor_diagonal
from natgrad.curvature.function_space import map_by_columns
from natgrad.curvature.kfac import DampingRule, KroneckerPart
from natgrad.curvature.partitioned import CurvaturePart, PartitionedFisher
from natgrad.curvature.registry import register_structure
from natgrad.jacobians import (
    EmbeddingJacobian,
    Jacobians,
    LayerJacobian,
    LinearJacobian,
    WeightSharing,
)

__all__ = ["TKFACFisher", "TraceRestrictedPart"]


class TraceRestrictedPart(KroneckerPart):
    r"""One layer's trace-restricted Kronecker factors.

    For shared weights *expand* takes every position as a sample of its own
    (``Σ_nkt ‖δ_nkt‖² a_nt a_ntᵀ``), *reduce* the mean input and the summed output gradient of each
    sample. Either way δ is the trace of the exact block, cross terms between positions included;
    where the summed output gradients all cancel, the identity stands for the factors.
    Rows without a factored form give the partial traces ``Σ MᵀM`` and ``Σ MMᵀ``. Groups have one
    pair and one trace each. Embeddings keep the diagonal of ``Φ``, which *expand* makes exact.

    Arguments are those of :class:`~natgrad.curvature.kfac.KroneckerPart`, damping rules included;
    the factors it damps are ``A = √δ Φ`` and ``B = √δ Ψ``.
    """

    traces: Tensor | None = None  # Summed as the factors are, (G,).

    def update(self, jacobians: Jacobians, count: Tensor | float) -> None:
        """Add weighted second moments; batches with NaN or infinite entries are left out."""
        if self.name not in jacobians:
            self.count += float(count)
            return
        rows = jacobians[self.name]
        limit = self.max_factor_size
        if isinstance(rows, LinearJacobian):
            inputs, outputs = _weighted_moments(rows, self.weight_sharing, limit)
        else:
            inputs, outputs = _partial_traces(rows, limit)
        if isinstance(rows, LinearJacobian) and rows.positions > 1:
            traces = second_moments(rows, None, None).sum((1, 2))
        else:
            traces = factor_diagonal(inputs).sum(-1)
        finite = torch.isfinite(traces).all() & torch.isfinite(factor_diagonal(inputs)).all()
        if not bool(finite & torch.isfinite(factor_diagonal(outputs)).all()):
            return
        self.count += float(count)
        self.inputs = discounted_sum(self.inputs, inputs, self._discount)
        self.outputs = discounted_sum(self.outputs, outputs, self._discount)
        self.traces = discounted_sum(self.traces, traces, self._discount)
        self._discount = 1.0

    def discount(self, factor: float) -> None:
        """Discount counts at once, sums together with the next update; with 0 forget them."""
        super().discount(factor)
        if factor == 0.0:
            self.traces = None

    def lower_factors(self) -> tuple[Tensor, Tensor]:
        """Return ``(√δ Φ, √δ Ψ)``, zero where nothing was seen yet."""
        if self.inputs is None or self.outputs is None or self.traces is None:
            return super().lower_factors()
        if self.count == 0:
            return torch.zeros_like(self.inputs), torch.zeros_like(self.outputs)
        root = (self.traces * (self._discount / self.count)).sqrt()
        inputs = _with_trace(self.inputs, root, self.traces)
        return inputs, _with_trace(self.outputs, root, self.traces)

    def function_space_map(
        self, rows: Jacobians, other: Jacobians, damping: float
    ) -> dict[str, Tensor]:
        """Return ``J'(F_l + λI)⁻¹Jᵀ`` by the damping rule, by columns."""
        return map_by_columns(self.name, rows, other, self.solver(damping))

    def state_dict(self) -> dict[str, Any]:
        """Return sums, counts and inverses."""
        return {**super().state_dict(), "traces": self.traces}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore them."""
        super().load_state_dict(state, device)
        self.traces = None if state["traces"] is None else state["traces"].to(device)


@register_structure
class TKFACFisher(PartitionedFisher):
    """One Kronecker product per layer that keeps the layer's trace; memory as K-FAC.

    Options: ``weight_sharing``, ``damping_rule`` and ``max_factor_size`` of
    :class:`TraceRestrictedPart`.
    """

    structure: ClassVar[str] = "tkfac"
    training_options: ClassVar[Mapping[str, Any]] = {"damping_rule": "pi"}

    def make_parts(
        self,
        weight_sharing: WeightSharing = "expand",
        damping_rule: DampingRule = "tikhonov",
        max_factor_size: int | None = 8192,
        **options: Any,
    ) -> dict[str, CurvaturePart]:
        """Return one part per block.

        Raises:
            ValueError: If an option has an unknown value.
            TypeError: If an option is unknown.
        """
        refuse_options(self.structure, options)
        check_choice("weight_sharing", weight_sharing, "expand", "reduce")
        check_choice("damping_rule", damping_rule, "tikhonov", "pi")
        return {
            name: TraceRestrictedPart(
                name, block, self.layout, weight_sharing, damping_rule, max_factor_size
            )
            for name, block in self.blocks.items()
        }


def _weighted_moments(
    rows: LinearJacobian, weight_sharing: WeightSharing, limit: int | None
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
        inputs = _moment(a, weights, limit)
        sizes = a.square().sum(-1)
    return inputs, _moment(delta, sizes.unsqueeze(1).expand(delta.shape[:-1]), limit)


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


def _moment(rows: Tensor, weights: Tensor | None, limit: int | None) -> Tensor:
    """Return ``Σ w x xᵀ`` for ``x`` (..., G, d) and ``w`` (..., G) or 1, or its diagonal."""
    x = rows.movedim(-2, 0).flatten(1, -2)  # (G, R, d)
    scaled = x if weights is None else x * weights.movedim(-1, 0).flatten(1).unsqueeze(-1)
    if limit is not None and x.shape[-1] > limit:
        return (scaled * x).sum(1)
    return scaled.mT @ x


def _partial_traces(rows: LayerJacobian, limit: int | None) -> tuple[Tensor, Tensor]:
    """Return ``Σ MᵀM`` and ``Σ MMᵀ``, or their diagonals."""
    inputs: Tensor | None = None
    outputs: Tensor | None = None
    for start, stop in rows.chunks():
        # Lines of matrices, (n, K, d_out, G, d_in + bias), are what inputs are elsewhere.
        lines = rows.per_sample_gradients(start, stop).transpose(2, 3)
        inputs = discounted_sum(inputs, _moment(lines, None, limit), 1.0)
        outputs = discounted_sum(outputs, _moment(lines.transpose(2, 4), None, limit), 1.0)
    assert inputs is not None and outputs is not None
    return inputs, outputs


def _with_trace(factor: Tensor, trace: Tensor, total: Tensor) -> Tensor:
    """Scale a factor of each group to a given trace ``(G,)``.

    Args:
        factor: A sum of weighted second moments.
        trace: What its trace shall be.
        total: The trace of the exact rows. Beside it the factor may be nothing but rounding, where
            *reduce* sums output gradients that cancel; it is then replaced by the identity.
    """
    size, shape = factor.shape[-1], (-1, *[1] * (factor.dim() - 1))
    present = factor_diagonal(factor).sum(-1)
    lost = present <= torch.finfo(factor.dtype).eps * total
    scaled = factor * (trace / torch.where(lost, 1.0, present)).view(shape)
    ones = torch.ones(size, dtype=factor.dtype, device=factor.device)
    identity = ones if factor.dim() == 2 else torch.diag(ones)
    return torch.where(lost.view(shape), identity * (trace / size).view(shape), scaled)
