r"""Layer Jacobians: the rows every curvature structure and every kernel is made of.

For one layer with inputs ``a`` of shape ``(N, T, G, d_in)`` and output gradients ``δ`` of shape
``(N, K, T, G, d_out)`` the Jacobian row of sample ``n`` and pulled-back vector ``k`` is

.. math:: M_{nk} = \sum_t \delta_{nkt} \, a_{nt}^\top
          \in \mathbb{R}^{G \times d_{out} \times d_{in}}

with ``T`` shared positions (pixels of a convolution, tokens of a sequence, calls of a reused
layer) and ``G`` groups. Rows are indexed by ``n * K + k``. They stay factored: nothing of size
``N·K × P`` is built except by :meth:`LayerJacobian.to_dense` and, in bounded chunks, where forming
per-sample gradients costs fewer operations than the ``T × T`` products.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from natgrad.layouts import BlockLayout, ParameterLayout

__all__ = [
    "DenseJacobian",
    "EmbeddingJacobian",
    "Jacobians",
    "KroneckerSums",
    "LayerJacobian",
    "LinearJacobian",
    "SumJacobian",
    "WeightSharing",
]

WeightSharing = Literal["expand", "reduce"]

# Largest temporary, in elements, that a chunked product may allocate (2^25 float32 = 128 MiB).
CHUNK_ELEMENTS = 2**25


@dataclass
class KroneckerSums:
    """Un-normalised second moments of one layer.

    Attributes:
        inputs: ``Σ a aᵀ``, ``(G, d_in + bias, d_in + bias)``, or its diagonal ``(G, d_in + bias)``;
            None where an earlier chunk of the same samples has brought it already.
        positions: How many terms ``inputs`` sums, as a tensor.
        outputs: ``Σ δ δᵀ``, ``(G, d_out, d_out)``, or its diagonal ``(G, d_out)``.
    """

    inputs: Tensor | None
    positions: Tensor
    outputs: Tensor


class LayerJacobian(ABC):
    """The Jacobian rows of one block, ``(N·K, P_l)``, never formed unless asked for.

    Attributes:
        layout: The block's layout.
        samples: Number of samples ``N``.
        directions: Pulled-back vectors per sample ``K``.
    """

    layout: BlockLayout
    samples: int
    directions: int

    @property
    def rows(self) -> int:
        """Number of rows, ``N·K``."""
        return self.samples * self.directions

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype rows are computed in."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device the rows live on."""

    @abstractmethod
    def gram(self, other: LayerJacobian | None = None) -> Tensor:
        """Return ``J J'ᵀ`` of shape ``(N·K, N'·K')``; ``other=None`` means ``J' = J``."""

    @abstractmethod
    def matvec(self, vectors: Tensor) -> Tensor:
        """Return ``J v`` of shape ``(N·K, c)`` for flat block vectors ``(P_l, c)``."""

    @abstractmethod
    def rmatvec(self, weights: Tensor) -> Tensor:
        """Return ``Jᵀ w`` of shape ``(P_l, c)`` for row weights ``(N·K, c)``."""

    @abstractmethod
    def per_sample_gradients(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return rows of samples ``start:stop`` as matrices ``(n, K, G, d_out, d_in + bias)``."""

    @abstractmethod
    def kronecker_factors(
        self,
        weight_sharing: WeightSharing = "expand",
        max_factor_size: int | None = None,
        continued: bool = False,
    ) -> KroneckerSums:
        """Return the un-normalised Kronecker factors.

        Args:
            weight_sharing: ``"expand"`` treats every position as a sample of its own;
                ``"reduce"`` averages inputs and sums output gradients over positions first
                (Eschenhagen et al. 2023).
            max_factor_size: Factors larger than this are kept as their diagonal.
            continued: The rows are a further chunk of directions of samples counted already.
        """

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Return the tensors that hold the rows, for checkpoints."""

    def is_finite(self) -> bool:
        """Return whether no entry of the rows is NaN or infinite."""
        return all(bool(torch.isfinite(tensor).all()) for tensor in self.state().values())

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Yield sample ranges whose per-sample gradients fit the chunk budget."""
        step = max(1, CHUNK_ELEMENTS // max(1, self.directions * self.layout.numel))
        for start in range(0, self.samples, step):
            yield start, min(start + step, self.samples)

    def diagonal(self) -> Tensor:
        """Return ``Σ_nk M_nk²`` entry by entry, flat ``(P_l,)``."""
        total: Tensor | None = None
        for start, stop in self.chunks():
            part = self.per_sample_gradients(start, stop).square().sum((0, 1))
            total = part if total is None else total.add_(part)
        assert total is not None
        return self.layout.flat(total)

    def squared_norm(self) -> Tensor:
        """Return ``Σ_nk ‖M_nk‖²``, the trace of ``JᵀJ``."""
        return self.diagonal().sum()

    def unit_factors(self) -> tuple[Tensor, Tensor] | None:
        """Return ``(a, s)`` with ``Σ_r s_rgo a_rg a_rgᵀ`` the second moment of unit ``(g, o)``.

        Shapes are ``(R, G, d_in + bias)`` and ``(R, G, d_out)``, with ``R = N`` when positions
        are not shared and ``R = N·K`` when each group has one unit. Otherwise ``None``: the rows
        of different units then have no common factor.
        """
        if self.layout.d_out != 1:
            return None
        rows = self.per_sample_gradients().flatten(0, 1)[:, :, 0]
        return rows, rows.new_ones(*rows.shape[:2], 1)

    def unit_blocks(self) -> Tensor:
        """Return every unit's second moment, ``(G·d_out, d_in + bias, d_in + bias)``."""
        layout = self.layout
        units = layout.groups * layout.d_out
        total = torch.zeros(
            units, layout.d_augmented, layout.d_augmented, dtype=self.dtype, device=self.device
        )
        factors = self.unit_factors()
        if factors is not None:
            inputs, weights = factors
            for group in range(layout.groups):
                a = inputs[:, group]
                s = weights[:, group]
                step = max(1, CHUNK_ELEMENTS // max(1, a.numel()))
                for first in range(0, layout.d_out, step):
                    scaled = a.unsqueeze(0) * s[:, first : first + step].T.unsqueeze(2)
                    base = group * layout.d_out + first
                    torch.matmul(scaled.mT, a, out=total[base : base + scaled.shape[0]])
            return total
        for start, stop in self.chunks():
            rows = self.per_sample_gradients(start, stop)
            n, k, groups, d_out, d_in = rows.shape
            rows = rows.permute(2, 3, 0, 1, 4).reshape(groups * d_out, n * k, d_in)
            total.baddbmm_(rows.mT, rows)
        return total

    def to_dense(self) -> Tensor:
        """Return all rows, ``(N·K, P_l)``."""
        return self.layout.flat(self.per_sample_gradients()).reshape(self.rows, -1)


class LinearJacobian(LayerJacobian):
    """Rows ``M_nk = Σ_t δ_nkt a_ntᵀ`` of linear maps with shared positions and groups.

    Args:
        layout: The block's layout.
        inputs: Layer inputs, ``(N, T, G, d_in)``, or a function that makes them when first needed
            (convolutions build their patches only then).
        output_gradients: ``δ``, ``(N, K, T, G, d_out)``.
        bias_value: The input a bias sees: 1 for ordinary layers.
        skip_silent: Leave positions whose ``δ`` is exactly zero (ignored or padded tokens) out of
            the input factor and its count.
    """

    def __init__(
        self,
        layout: BlockLayout,
        inputs: Tensor | Callable[[], Tensor],
        output_gradients: Tensor,
        *,
        bias_value: float = 1.0,
        skip_silent: bool = False,
    ) -> None:
        self.layout = layout
        self._inputs = inputs if callable(inputs) else _at_least_float32(inputs)
        self.output_gradients = _at_least_float32(output_gradients)
        self.samples, self.directions, self.positions = self.output_gradients.shape[:3]
        self.bias_value = bias_value
        self.skip_silent = skip_silent
        self._active: Tensor | None = None

    @property
    def active_positions(self) -> Tensor | None:
        """Which positions ``(N, T)`` count in the input factor, as 0 or 1; None for all.

        It may be set, where these rows are one chunk of several over ``K``.
        """
        if self._active is None and self.skip_silent:
            silent = (self.output_gradients == 0).all(-1).all(3).all(1)
            self._active = (~silent).to(self.dtype)
        return self._active

    @active_positions.setter
    def active_positions(self, active: Tensor | None) -> None:
        self._active = active

    @property
    def inputs(self) -> Tensor:
        """Layer inputs ``a``, ``(N, T, G, d_in)``, without the bias coordinate."""
        if callable(self._inputs):
            self._inputs = _at_least_float32(self._inputs())
        return self._inputs

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of ``δ``."""
        return self.output_gradients.dtype

    @property
    def device(self) -> torch.device:
        """The device of ``δ``."""
        return self.output_gradients.device

    def state(self) -> dict[str, Tensor]:
        """Return ``a`` and ``δ``."""
        return {"inputs": self.inputs, "output_gradients": self.output_gradients}

    def augmented_inputs(self) -> Tensor:
        """Return inputs with the bias coordinate appended, ``(N, T, G, d_in + bias)``."""
        a = self.inputs
        if not self.layout.has_bias:
            return a
        return torch.cat([a, a.new_full((*a.shape[:-1], 1), self.bias_value)], dim=-1)

    # The four primitives that depend on how inputs are stored; embeddings replace them.

    def _input_products(self, other: LinearJacobian, start: int, stop: int, first: int) -> Tensor:
        """Return ``a_nt · a'_mt'`` as ``(G, n·T, m·T')`` for n in start:stop, m ≥ first."""
        left = self.inputs[start:stop].permute(2, 0, 1, 3).flatten(1, 2)
        right = other.inputs[first:].permute(2, 0, 1, 3).flatten(1, 2)
        if self.layout.groups == 1:
            products = (left[0] @ right[0].T).unsqueeze(0)
        else:
            products = left @ right.mT
        if self.layout.has_bias:
            products = products + self.bias_value * other.bias_value
        return products

    def _apply(self, matrices: Tensor) -> Tensor:
        """Return ``V a`` of shape ``(c, G, N·T, d_out)`` for matrices ``(c, G, d_out, d_in+)``."""
        d_in = self.layout.d_in
        a = self.inputs.permute(2, 0, 1, 3).flatten(1, 2)
        result = a @ matrices[..., :d_in].mT
        if self.layout.has_bias:
            result = result + self.bias_value * matrices[..., d_in].unsqueeze(-2)
        return result

    def _contract(self, gradients: Tensor) -> Tensor:
        """Return ``Σ_nt g_nt a_ntᵀ`` as ``(c, G, d_out, d_in+)`` for ``g`` (c, G, N·T, d_out)."""
        a = self.inputs.permute(2, 0, 1, 3).flatten(1, 2)
        weight = gradients.mT @ a
        if not self.layout.has_bias:
            return weight
        return torch.cat([weight, self.bias_value * gradients.sum(-2).unsqueeze(-1)], dim=-1)

    def _sample_gradients(self, start: int, stop: int) -> Tensor:
        """Return ``M_nk`` for n in start:stop as ``(n, K, G, d_out, d_in+)``."""
        delta = self.output_gradients[start:stop].permute(0, 1, 3, 4, 2)
        a = self.inputs[start:stop].permute(0, 2, 1, 3).unsqueeze(1)
        weight = delta @ a
        if not self.layout.has_bias:
            return weight
        return torch.cat([weight, self.bias_value * delta.sum(-1, keepdim=True)], dim=-1)

    def _input_second_moment(self, weights: Tensor | None, size_limit: int | None) -> Tensor:
        """Return ``Σ w a aᵀ`` per group, with ``w`` of shape ``(N, T)`` or all ones."""
        return self._second_moment_of(self.inputs, weights, size_limit)

    def _second_moment_of(
        self, inputs: Tensor, weights: Tensor | None, size_limit: int | None
    ) -> Tensor:
        layout = self.layout
        a = inputs.permute(2, 0, 1, 3).flatten(1, 2)  # (G, N·T, d_in)
        scaled = a if weights is None else a * weights.reshape(1, -1, 1)
        count = a.new_tensor(float(a.shape[1])) if weights is None else weights.sum().to(a.dtype)
        if size_limit is not None and layout.d_augmented > size_limit:
            moment = (scaled * a).sum(1)
            if not layout.has_bias:
                return moment
            corner = (count * self.bias_value**2).expand(layout.groups, 1)
            return torch.cat([moment, corner], dim=1)
        if layout.groups == 1:
            moment = (scaled[0].T @ a[0]).unsqueeze(0)
        else:
            moment = scaled.mT @ a
        if not layout.has_bias:
            return moment
        # [aᵀa, aᵀ1; 1ᵀa, n] without copying the activations beside a column of ones.
        d = layout.d_in
        full = moment.new_empty(layout.groups, d + 1, d + 1)
        full[:, :d, :d] = moment
        border = scaled.sum(1) * self.bias_value
        full[:, :d, d] = border
        full[:, d, :d] = border
        full[:, d, d] = count * self.bias_value**2
        return full

    def gram(self, other: LayerJacobian | None = None) -> Tensor:
        """Return ``J J'ᵀ``, by the route that takes fewer operations.

        *Positions* multiplies inner products, ``Σ_tt' (a_nt·a'_mt')(δ_nkt·δ'_mk't')``;
        *gradients* forms per-sample gradients in chunks. With one position (``T = 1``) the first
        is the Hadamard product ``(a a'ᵀ) ∘ (δ δ'ᵀ)``.
        """
        symmetric = other is None or other is self
        right = self if other is None else other
        if not isinstance(right, LinearJacobian) or type(right) is not type(self):
            return _gram_by_gradients(self, right, symmetric)
        if self._gram_operations(right, "positions") <= self._gram_operations(right, "gradients"):
            return self._gram_by_positions(right, symmetric)
        return _gram_by_gradients(self, right, symmetric)

    def _gram_operations(
        self, other: LinearJacobian, route: Literal["positions", "gradients"]
    ) -> float:
        layout = self.layout
        entries = float(self.rows) * other.rows
        if route == "positions":
            pairs = float(self.positions) * other.positions
            inner = float(self.samples) * other.samples * layout.d_in
            return layout.groups * pairs * (inner + entries * (layout.d_out + 1))
        forming = float(self.rows) * self.positions + float(other.rows) * other.positions
        return layout.numel * (forming + entries)

    def _gram_by_positions(self, other: LinearJacobian, symmetric: bool) -> Tensor:
        n, k, t = self.samples, self.directions, self.positions
        m, k2, t2 = other.samples, other.directions, other.positions
        result = torch.empty(n, k, m, k2, dtype=self.dtype, device=self.device)
        # One row chunk allocates n·K·T × M·K'·T'. A symmetric Gram also goes by chunks so that
        # only the upper part is multiplied and the rest is mirrored.
        step = max(1, CHUNK_ELEMENTS // max(1, k * t * m * k2 * t2))
        if symmetric:
            step = min(step, max(1, -(-n // 8)))
        delta2 = other.output_gradients.permute(3, 0, 1, 2, 4)  # (G, M, K', T', d_out)
        for start in range(0, n, step):
            stop = min(start + step, n)
            first = start if symmetric else 0
            delta = self.output_gradients[start:stop].permute(3, 0, 1, 2, 4)
            inner = self._input_products(other, start, stop, first)
            for group in range(self.layout.groups):
                products = delta[group].flatten(0, 2) @ delta2[group, first:].flatten(0, 2).T
                products = products.view(stop - start, k, t, m - first, k2, t2)
                weights = inner[group].view(stop - start, 1, t, m - first, 1, t2)
                part = products.mul_(weights)
                part = part.sum((2, 5)) if t * t2 > 1 else part[:, :, 0, :, :, 0]
                block = result[start:stop, :, first:]
                if group == 0:
                    block.copy_(part)
                else:
                    block.add_(part)
            if symmetric and stop < n:
                mirrored = result[start:stop, :, stop:].permute(2, 3, 0, 1)
                result[stop:, :, start:stop] = mirrored
        return result.view(n * k, m * k2)

    def matvec(self, vectors: Tensor) -> Tensor:
        """Return ``J v``: one product with the inputs, one reduction with ``δ``."""
        matrices = self.layout.matrix(vectors.T)
        applied = self._apply(matrices)  # (c, G, N·T, d_out)
        applied = applied.unflatten(2, (self.samples, self.positions))
        return torch.einsum("nktgo,cgnto->nkc", self.output_gradients, applied).flatten(0, 1)

    def rmatvec(self, weights: Tensor) -> Tensor:
        """Return ``Jᵀ w``: combine ``δ`` over ``K`` first, then one weight-gradient product."""
        w = weights.view(self.samples, self.directions, -1)
        combined = torch.einsum("nkc,nktgo->cgnto", w, self.output_gradients)
        return self.layout.flat(self._contract(combined.flatten(2, 3))).T

    def per_sample_gradients(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return ``M_nk`` of samples ``start:stop``, ``(n, K, G, d_out, d_in + bias)``."""
        return self._sample_gradients(start, self.samples if stop is None else stop)

    def diagonal(self) -> Tensor:
        """Return ``Σ_nk M_nk²``; one product of squares when positions are not shared."""
        if self.positions != 1:
            return super().diagonal()
        inputs, weights = cast("tuple[Tensor, Tensor]", self.unit_factors())
        return self.layout.flat(torch.einsum("ngo,ngi->goi", weights, inputs.square()))

    def unit_factors(self) -> tuple[Tensor, Tensor] | None:
        """Return ``a`` with its bias coordinate and ``s = Σ_k δ²`` when ``T = 1``."""
        if self.positions != 1:
            return super().unit_factors()
        return self.augmented_inputs()[:, 0], self.output_gradients[:, :, 0].square().sum(1)

    def kronecker_factors(
        self,
        weight_sharing: WeightSharing = "expand",
        max_factor_size: int | None = None,
        continued: bool = False,
    ) -> KroneckerSums:
        """Return ``Σ a aᵀ`` and ``Σ δ δᵀ`` over samples and positions (or samples, reduced)."""
        delta = self.output_gradients
        active = self.active_positions
        moment: Tensor | None = None
        positions = delta.new_zeros(())
        if continued:
            if weight_sharing == "reduce":
                delta = delta.sum(2, keepdim=True)
        elif weight_sharing == "reduce" and self.positions > 1:
            _, moment, positions = self._reduced_second_moment(active, max_factor_size)
            delta = delta.sum(2, keepdim=True)
        else:
            moment = self._input_second_moment(active, max_factor_size)
            positions = (
                delta.new_tensor(float(self.samples * self.positions))
                if active is None
                else active.sum()
            )
        flat = delta.permute(3, 0, 1, 2, 4).flatten(1, 3)  # (G, N·K·T, d_out)
        if max_factor_size is not None and self.layout.d_out > max_factor_size:
            outputs = flat.square().sum(1)
        elif self.layout.groups == 1:
            outputs = (flat[0].T @ flat[0]).unsqueeze(0)
        else:
            outputs = flat.mT @ flat
        return KroneckerSums(moment, positions, outputs)

    def _reduced_second_moment(
        self, active: Tensor | None, size_limit: int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        inputs = self.inputs
        if active is None:
            mean = inputs.mean(1, keepdim=True)
            weights = None
            positions = inputs.new_tensor(float(self.samples))
        else:
            counts = active.sum(1)
            mean = (inputs * active[:, :, None, None]).sum(1, keepdim=True)
            mean = mean / counts.clamp(min=1.0)[:, None, None, None]
            weights = (counts > 0).to(inputs.dtype).unsqueeze(1)
            positions = weights.sum()
        return mean, self._second_moment_of(mean, weights, size_limit), positions


class EmbeddingJacobian(LinearJacobian):
    """Rows of an embedding: a linear map of one-hot inputs, kept as indices.

    Args:
        layout: A transposed layout with ``d_in`` the vocabulary size ``V``.
        indices: Token indices, ``(N, T)``.
        output_gradients: ``δ``, ``(N, K, T, 1, d)``, already zero where the token is the padding
            index.
        skip_silent: As in :class:`LinearJacobian`.
    """

    def __init__(
        self,
        layout: BlockLayout,
        indices: Tensor,
        output_gradients: Tensor,
        *,
        skip_silent: bool = False,
    ) -> None:
        super().__init__(layout, torch.empty(0), output_gradients, skip_silent=skip_silent)
        self.indices = indices

    @property
    def inputs(self) -> Tensor:
        """One-hot inputs ``(N, T, 1, V)``, built only when asked for."""
        one_hot = torch.nn.functional.one_hot(self.indices, self.layout.d_in)
        return one_hot.unsqueeze(2).to(self.dtype)

    def state(self) -> dict[str, Tensor]:
        """Return the indices and ``δ``."""
        return {"indices": self.indices, "output_gradients": self.output_gradients}

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
        return matrices[..., self.indices.reshape(-1)].mT

    def _contract(self, gradients: Tensor) -> Tensor:
        result = gradients.new_zeros(gradients.shape[0], 1, self.layout.d_in, self.layout.d_out)
        return result.index_add_(2, self.indices.reshape(-1), gradients).mT

    def _sample_gradients(self, start: int, stop: int) -> Tensor:
        delta = self.output_gradients[start:stop, :, :, 0]  # (n, K, T, d)
        n, k = delta.shape[:2]
        result = delta.new_zeros(n, k, self.layout.d_in, self.layout.d_out)
        index = self.indices[start:stop, None, :, None].expand(-1, k, -1, self.layout.d_out)
        return result.scatter_add_(2, index, delta).mT.unsqueeze(2)

    def _input_second_moment(self, weights: Tensor | None, size_limit: int | None) -> Tensor:
        ones = (
            weights if weights is not None else self.output_gradients.new_ones(self.indices.shape)
        )
        counts = ones.new_zeros(self.layout.d_in)
        return counts.index_add_(0, self.indices.reshape(-1), ones.reshape(-1)).unsqueeze(0)

    def _reduced_second_moment(
        self, active: Tensor | None, size_limit: int | None
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


class DenseJacobian(LayerJacobian):
    """Rows given outright, for modules natgrad knows no factored form of.

    Args:
        layout: A layout with one group, one unit and ``d_in = P_l``.
        rows: ``(N, K, P_l)``.
    """

    def __init__(self, layout: BlockLayout, rows: Tensor) -> None:
        self.layout = layout
        self._rows = _at_least_float32(rows)
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
        return _gram_by_gradients(self, self if other is None else other, other is None)

    def matvec(self, vectors: Tensor) -> Tensor:
        """Return ``J v``."""
        return self._rows.flatten(0, 1) @ vectors

    def rmatvec(self, weights: Tensor) -> Tensor:
        """Return ``Jᵀ w``."""
        return self._rows.flatten(0, 1).T @ weights

    def per_sample_gradients(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return rows ``(n, K, 1, 1, P_l)``."""
        return self._rows[start:stop, :, None, None, :]

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


class SumJacobian(LayerJacobian):
    """Sum of several uses of one parameter that have no common factored form.

    An embedding tied to the output layer is the usual case: its weight acts once on one-hot
    inputs and once, transposed, on hidden states.

    Args:
        parts: Jacobians of the same parameter with the same ``N`` and ``K``.
    """

    def __init__(self, parts: list[LayerJacobian]) -> None:
        # The first part stored the ordinary way round gives the layout.
        self.parts = sorted(parts, key=lambda part: part.layout.transposed)
        self.layout = self.parts[0].layout
        self.samples = parts[0].samples
        self.directions = parts[0].directions

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first part."""
        return self.parts[0].dtype

    @property
    def device(self) -> torch.device:
        """The device of the first part."""
        return self.parts[0].device

    def state(self) -> dict[str, Tensor]:
        """Return every part's tensors under its number."""
        return {f"{i}.{k}": v for i, part in enumerate(self.parts) for k, v in part.state().items()}

    def gram(self, other: LayerJacobian | None = None) -> Tensor:
        """Return ``J J'ᵀ`` with the cross terms between uses."""
        return _gram_by_gradients(self, self if other is None else other, other is None)

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
        """Return the summed rows as matrices of the first part's layout."""
        total = self.parts[0].per_sample_gradients(start, stop)
        for part in self.parts[1:]:
            rows = part.layout.flat(part.per_sample_gradients(start, stop))
            total = total + self.layout.matrix(rows)
        return total

    def kronecker_factors(
        self,
        weight_sharing: WeightSharing = "expand",
        max_factor_size: int | None = None,
        continued: bool = False,
    ) -> KroneckerSums:
        """Merge the uses' Kronecker products ``B_i ⊗ A_i`` into one that keeps their trace.

        ``A = Σ tr(B_i) A_i``, ``B = Σ tr(A_i) B_i``, divided by ``Σ tr(A_i) tr(B_i)``: the
        partial traces of the sum. It is exact when all uses are proportional, and invariant to
        how each product's scale is split between its factors.
        """
        merged_a: Tensor | None = None
        merged_b: Tensor | None = None
        total = torch.zeros((), dtype=self.dtype, device=self.device)
        for part in self.parts:
            sums = part.kronecker_factors(weight_sharing, max_factor_size)
            assert sums.inputs is not None
            a = sums.inputs / sums.positions.clamp(min=1.0)
            b = sums.outputs
            if part.layout.transposed != self.layout.transposed:
                a, b = b, a
            trace_a, trace_b = _factor_trace(a), _factor_trace(b)
            merged_a = _add_factors(merged_a, a * trace_b)
            merged_b = _add_factors(merged_b, b * trace_a)
            total = total + trace_a * trace_b
        assert merged_a is not None and merged_b is not None
        scale = torch.where(total > 0, total, torch.ones_like(total))
        count = total.new_tensor(float(self.samples))
        return KroneckerSums(merged_a / scale * count, count, merged_b)


class Jacobians(Mapping[str, LayerJacobian]):
    """All blocks' Jacobian rows for one batch of pulled-back vectors, in call order.

    Args:
        layout: Order of all trainable parameters.
        blocks: Block name → layer Jacobian. Blocks the output does not depend on are absent.
        samples: ``N``.
        directions: ``K``.
    """

    def __init__(
        self,
        layout: ParameterLayout,
        blocks: dict[str, LayerJacobian],
        samples: int,
        directions: int,
    ) -> None:
        self.layout = layout
        self._blocks = blocks
        self.samples = samples
        self.directions = directions

    def __getitem__(self, name: str) -> LayerJacobian:
        """Return one block's Jacobian."""
        return self._blocks[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over block names in call order."""
        return iter(self._blocks)

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self._blocks)

    @property
    def rows(self) -> int:
        """Number of rows, ``N·K``."""
        return self.samples * self.directions

    def gram(self, other: Jacobians | None = None) -> Tensor:
        """Return ``J J'ᵀ = Σ_l J_l J'_lᵀ``, ``(N·K, N'·K')``.

        Raises:
            ValueError: If no block was reached.
        """
        total: Tensor | None = None
        for name, block in self.items():
            if other is not None and name not in other:
                continue
            part = block.gram(None if other is None else other[name])
            total = part if total is None else total.add_(part)
        if total is None:
            raise ValueError("the output depends on no captured parameter, so there is no Gram")
        return total

    def matvec(self, vector: Tensor) -> Tensor:
        """Return ``J v`` as ``(N, K)`` for a flat vector ``(P,)``."""
        total = vector.new_zeros(self.rows, 1)
        for block in self.values():
            total = total + block.matvec(self.layout.gather(block.layout, vector.unsqueeze(1)))
        return total.view(self.samples, self.directions)

    def rmatvec(self, weights: Tensor) -> Tensor:
        """Return ``Jᵀ w`` as a flat vector ``(P,)`` for ``(N, K)`` row weights."""
        flat = weights.reshape(-1, 1)
        result = flat.new_zeros(self.layout.numel, 1)
        for block in self.values():
            self.layout.scatter(block.layout, block.rmatvec(flat), result)
        return result[:, 0]

    def to_dense(self) -> Tensor:
        """Return the whole Jacobian ``(N·K, P)``, columns in parameter order."""
        first = next(iter(self.values()))
        result = torch.zeros(self.layout.numel, self.rows, dtype=first.dtype, device=first.device)
        for block in self.values():
            self.layout.scatter(block.layout, block.to_dense().T, result)
        return result.T


def _gram_by_gradients(left: LayerJacobian, right: LayerJacobian, symmetric: bool) -> Tensor:
    """Multiply per-sample gradients chunk by chunk, in each block's flat order."""
    result = torch.empty(left.rows, right.rows, dtype=left.dtype, device=left.device)
    k, k2 = left.directions, right.directions
    for start, stop in left.chunks():
        rows = left.layout.flat(left.per_sample_gradients(start, stop)).flatten(0, 1)
        for first, last in right.chunks():
            if symmetric and last <= start:
                continue
            if symmetric and first == start and last == stop:
                columns = rows
            else:
                columns = right.layout.flat(right.per_sample_gradients(first, last)).flatten(0, 1)
            block = rows @ columns.T
            result[start * k : stop * k, first * k2 : last * k2] = block
            if symmetric and first > start:
                result[first * k2 : last * k2, start * k : stop * k] = block.T
    return result


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _factor_trace(factor: Tensor) -> Tensor:
    diagonal = factor if factor.dim() == 2 else factor.diagonal(dim1=-2, dim2=-1)
    return diagonal.sum()


def _add_factors(left: Tensor | None, right: Tensor) -> Tensor:
    if left is None or left.dim() == right.dim():
        return right if left is None else left + right
    dense, diagonal = (left, right) if left.dim() == 3 else (right, left)
    return dense + torch.diag_embed(diagonal)
