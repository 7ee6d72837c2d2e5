"""Rows of linear maps with shared positions and groups."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor
from typing_extensions import Self

from natgrad import linalg
from natgrad.jacobians import layer
from natgrad.jacobians.dense import DenseJacobian
from natgrad.jacobians.layer import (
    KroneckerSums,
    LayerJacobian,
    WeightSharing,
    at_least_float32,
    gram_by_gradients,
)
from natgrad.jacobians.positions import Draw, enough_rows, random_subset
from natgrad.layouts import BlockLayout

#: Of fewer operations a symmetric Gram matrix is multiplied as a whole: calls take longer.
SPLIT_OPERATIONS = 2**25

#: Entries that are squared at a time, in a processor's cache.
CACHED_ELEMENTS = 2**18


class LinearJacobian(LayerJacobian):
    """Rows ``M_nk = Σ_t δ_nkt a_ntᵀ`` of linear maps with shared positions and groups.

    Args:
        layout: The block's layout.
        inputs: Layer inputs, ``(N, T, G, d_in)``, or a function that makes them when first needed,
            of all samples and positions (for None) or some (convolutions build their patches only
            then). It may have methods ``products``, of all inputs with matrices
            ``(c, G, d_out, d_in)``, as ``(c, G, N, T, d_out)``, ``sample_gradients``, with ``δ`` of
            some samples, and ``mean``, over positions, as ``(N, 1, G, d_in)``.
        output_gradients: ``δ``, ``(N, K, T, G, d_out)``.
        bias_value: The input a bias sees: 1 for ordinary layers.
        partial: Samples of which some event does not count, ``(N,)``: positions of theirs whose
            ``δ`` is exactly zero (ignored or padded tokens) are left out of the input factor and
            its count. None for none.
    """

    def __init__(
        self,
        layout: BlockLayout,
        inputs: Tensor | Callable[[Tensor | None, Tensor | None], Tensor],
        output_gradients: Tensor,
        *,
        bias_value: float = 1.0,
        partial: Tensor | None = None,
    ) -> None:
        self.layout = layout
        self._inputs = inputs if callable(inputs) else at_least_float32(inputs)
        self.output_gradients: Tensor = at_least_float32(output_gradients)
        self.samples: int
        self.directions: int
        self.positions: int
        self.samples, self.directions, self.positions = self.output_gradients.shape[:3]
        self.bias_value = bias_value
        self.partial = None if partial is None else partial.to(output_gradients.device)
        self._active: Tensor | None = None
        #: What was computed from inputs, beside them, where other layers read the same tensor.
        self.moments: dict[Any, tuple[Tensor, Tensor]] | None = None

    @property
    def active_positions(self) -> Tensor | None:
        """Which positions ``(N, T)`` count in the input factor, as 0 or 1; None for all.

        It may be set, where these rows are one chunk of several over ``K``.
        """
        if self._active is None and self.partial is not None:
            silent = (self.output_gradients == 0).all(-1).all(3).all(1)
            self._active = (~(silent & self.partial.unsqueeze(1))).to(self.dtype)
        return self._active

    @active_positions.setter
    def active_positions(self, active: Tensor | None) -> None:
        self._active = active

    @property
    def inputs(self) -> Tensor:
        """Layer inputs ``a``, ``(N, T, G, d_in)``, without the bias coordinate."""
        if callable(self._inputs):
            self._inputs = at_least_float32(self._inputs(None, None))
        return self._inputs

    @property
    def shared_inputs(self) -> tuple[Any, ...] | None:
        """What tells the tensor that the layer reads from others; None if inputs are made of it."""
        return None if callable(self._inputs) else tensor_identity(self._inputs)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of ``δ``."""
        return self.output_gradients.dtype

    @property
    def device(self) -> torch.device:
        """The device of ``δ``."""
        return self.output_gradients.device

    def over_samples(self) -> tuple[Tensor, Tensor | None] | None:
        """Return ``δ``, and ``a``, as of a layer that is called once for all samples."""
        return self.output_gradients, self.inputs

    def with_sums(self, sums: Tensor) -> Self:
        """Return rows of the same inputs with another ``δ``."""
        result = copy.copy(self)
        result.output_gradients, result._active, result.moments = sums, None, None
        return result

    def state(self) -> dict[str, Tensor]:
        """Return ``a`` and ``δ``."""
        return {"inputs": self.inputs, "output_gradients": self.output_gradients}

    def in_type(self, dtype: torch.dtype) -> Self:
        """Return the same rows in a floating-point type."""
        result, make = super().in_type(dtype), self._inputs
        if callable(make):
            result._inputs = lambda *some: make(*some).to(dtype)
        result.moments = None
        return result

    def augmented_inputs(self) -> Tensor:
        """Return inputs with the bias coordinate appended, ``(N, T, G, d_in + bias)``."""
        a = self.inputs
        if not self.layout.has_bias:
            return a
        return torch.cat([a, a.new_full((*a.shape[:-1], 1), self.bias_value)], dim=-1)

    def augmented(self) -> LinearJacobian:
        """Return the same rows with the bias coordinate as one more input of a plain weight."""
        layout = replace(
            self.layout,
            d_in=self.layout.d_augmented,
            has_weight=True,
            has_bias=False,
            transposed=False,
        )
        return LinearJacobian(layout, self.augmented_inputs(), self.output_gradients)

    def replaced(self, inputs: Tensor, output_gradients: Tensor) -> LinearJacobian:
        """Return rows of the same layout from other inputs and output gradients."""
        return LinearJacobian(self.layout, inputs, output_gradients, bias_value=self.bias_value)

    def combined(self, weights: Tensor) -> LinearJacobian:
        """Return rows ``Σ_k w_nkj M_nk``; see :meth:`LayerJacobian.combined`."""
        delta = torch.einsum("nkj,nktgo->njtgo", weights, self.output_gradients)
        result = copy.copy(self)
        result.output_gradients, result.directions = delta, weights.shape[2]
        return result

    def parted(self, samples: int) -> LinearJacobian:
        """Return rows of all positions of the batch as every sample's own."""
        result = copy.copy(self)
        result._share_inputs(samples)
        result.output_gradients = self.output_gradients[0].unflatten(0, (samples, -1))
        result.samples, result.directions = result.output_gradients.shape[:2]
        result._active = None
        return result

    def by_units(self, width: int) -> Iterator[LinearJacobian]:
        """Yield rows of some units each; see :meth:`LayerJacobian.by_units`."""
        units = max(1, width // (self.layout.groups * self.layout.d_augmented))
        for delta in self.output_gradients.split(units, -1):
            piece = copy.copy(self)
            piece.layout = replace(self.layout, d_out=delta.shape[-1])
            piece.output_gradients, piece._active = delta, None
            yield piece

    def _share_inputs(self, samples: int) -> None:
        self._inputs = self.inputs.expand(samples, *self.inputs.shape[1:])

    def subsampled(self, positions: Tensor, drawn: object = None) -> LinearJacobian:
        """Return rows at some of the positions, for unbiased second moments.

        ``δ`` is scaled such that sums of ``δ δᵀ`` over uniformly drawn positions have the
        expectation of those over all. The rows themselves lose what the other positions add.

        Args:
            positions: Which of the ``T`` positions, ``(T',)``.
            drawn: What tells them from others without a look at them; None if nothing does.
        """
        result = copy.copy(self)
        result._take_inputs(positions, drawn)
        scale = (self.positions / len(positions)) ** 0.5
        result.output_gradients = self.output_gradients[:, :, positions] * scale
        result.positions = len(positions)
        result._active = None if self._active is None else self._active[:, positions]
        return result

    def product_rows(
        self, weight_sharing: WeightSharing, rows_per_unit: float | None, draw: Draw
    ) -> tuple[LayerJacobian, ...]:
        """Return the rows of every Kronecker product of a setting for shared weights."""
        if self.positions <= 1 or weight_sharing == "reduce":
            return (self,)
        if weight_sharing == "split" and self.layout.d_out == 1:
            return (DenseJacobian(self.layout, self.layout.flat(self.per_sample_gradients())),)
        if self.ragged:
            weight_sharing = "expand"
        chosen, drawn, limit = None, None, enough_rows(self.layout, rows_per_unit)
        if limit is not None:
            each = draw.place.of_all(1 if self.ragged else self.samples)
            kept = max(1, -(-limit // each))
            if kept < self.positions:
                drawn = (self.positions, kept, draw.number)
                chosen = random_subset(*drawn, self.device)
        if weight_sharing == "split":
            return self.split(chosen, drawn)
        return (self if chosen is None else self.subsampled(chosen, drawn),)

    def split(
        self, positions: Tensor | None = None, drawn: object = None
    ) -> tuple[LinearJacobian, LinearJacobian]:
        """Return rows of means over the T positions that count, and rows of deviations from them.

        ``Σ_t δ_t a_tᵀ = (Σ_t δ_t) āᵀ + Σ_t (δ_t − δ̄)(a_t − ā)ᵀ``; the deviations of δ are
        multiplied by ``√(T/(T − 1))``, as they have a degree of freedom less than there are terms.

        Args:
            positions: At which positions deviations are taken; None for all.
            drawn: As in :meth:`subsampled`.
        """
        active, total = self.active_positions, self.output_gradients.sum(2, keepdim=True)
        mean, kept = self._mean_inputs(active)
        means = self.replaced(mean, total)
        rest = self if positions is None else self.subsampled(positions, drawn)
        number = total.new_full((1,), self.positions) if active is None else active.sum(1)
        scale = (self.positions / rest.positions) ** 0.5
        gradients = deviations_of(rest.output_gradients, total * scale, number.view(-1, 1, 1, 1, 1))
        if active is None:
            inputs = self._once("deviations", rest._inputs, lambda: rest.inputs - mean)
        else:
            few = active if positions is None else active[:, positions]
            inputs = (rest.inputs - mean) * few[:, :, None, None]
            gradients = gradients * few[:, None, :, None, None]
            means._active, rest._active = kept, few
        deviations = LinearJacobian(self.layout, inputs, gradients, bias_value=0.0)
        deviations._active = rest._active
        means.moments = deviations.moments = self.moments
        return means, deviations

    def _once(self, what: str, inputs: Any, make: Callable[[], Tensor]) -> Tensor:
        """Return what is made of inputs, made once for all layers that read the same tensor."""
        if self.moments is None or callable(inputs):
            return make()
        key = (what, *tensor_identity(inputs))
        if key not in self.moments:
            self.moments[key] = inputs, make()
        return self.moments[key][1]

    def _mean_inputs(self, active: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return every sample's mean input, and which samples have any."""
        if active is not None:
            return mean_inputs(self.inputs, active)
        whole: Any = self._inputs
        if callable(whole) and hasattr(whole, "mean"):
            return at_least_float32(whole.mean()), None
        return self._once("mean", self._inputs, lambda: mean_inputs(self.inputs, None)[0]), None

    def _take_inputs(self, positions: Tensor, drawn: object) -> None:
        whole = self._inputs
        if callable(whole):
            self._inputs = at_least_float32(whole(None, positions))
            return
        if drawn is None:
            self._inputs = whole[:, positions]
            return
        self._inputs = self._once(f"at {drawn}", whole, lambda: whole[:, positions])

    def of_samples(self, samples: Tensor) -> LinearJacobian:
        """Return the rows of some samples, ``(N',)``."""
        result = copy.copy(self)
        result._take_samples(samples)
        result.output_gradients = self.output_gradients[samples]
        result.samples = len(samples)
        result._active = None if self._active is None else self._active[samples]
        result.partial = None if self.partial is None else self.partial[samples]
        return result

    def _take_samples(self, samples: Tensor) -> None:
        whole = self._inputs
        taken = whole(samples, None) if callable(whole) else whole[samples]
        self._inputs = at_least_float32(taken)

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
        """Return ``V a`` of shape ``(c, G, N, T, d_out)`` for matrices ``(c, G, d_out, d_in+)``."""
        d_in = self.layout.d_in
        result: Tensor
        if self.layout.has_weight and hasattr(self._inputs, "products"):
            result = self._inputs.products(matrices[..., :d_in])
        else:
            result = self.inputs.permute(2, 0, 1, 3).flatten(1, 2) @ matrices[..., :d_in].mT
            result = result.unflatten(2, (self.samples, self.positions))
        if self.layout.has_bias:
            result = result + self.bias_value * matrices[..., None, None, :, d_in]
        return result

    def _contract(self, gradients: Tensor) -> Tensor:
        """Return ``Σ_nt g_nt a_ntᵀ`` as ``(c, G, d_out, d_in+)`` for ``g`` (c, G, N·T, d_out)."""
        if self._needs_no_patches:
            delta = gradients.unflatten(2, (self.samples, -1)).permute(2, 0, 3, 1, 4)
            return self._gradients_of(delta, 0).sum(0)
        a = self.inputs.permute(2, 0, 1, 3).flatten(1, 2)
        weight = gradients.mT @ a
        if not self.layout.has_bias:
            return weight
        return torch.cat([weight, self.bias_value * gradients.sum(-2).unsqueeze(-1)], dim=-1)

    def _sample_gradients(self, start: int, stop: int) -> Tensor:
        """Return ``M_nk`` for n in start:stop as ``(n, K, G, d_out, d_in+)``."""
        return self._gradients_of(self.output_gradients[start:stop], start)

    def _gradients_of(self, delta: Tensor, start: int) -> Tensor:
        """Return ``M_nk`` of other ``δ`` as of the samples from a first on."""
        columns, inputs = delta.permute(0, 1, 3, 4, 2), cast(Any, self._inputs)
        weight: Tensor
        if self._needs_no_patches:
            weight = inputs.sample_gradients(delta, start)
        else:
            few = self.inputs[start : start + len(delta)]
            weight = columns @ few.permute(0, 2, 1, 3).unsqueeze(1)
        if not self.layout.has_bias:
            return weight
        return torch.cat([weight, self.bias_value * columns.sum(-1, keepdim=True)], dim=-1)

    @property
    def _needs_no_patches(self) -> bool:
        """Whether inputs are read by so few outputs that gradients are best made without copies.

        In double precision they would be loops over channels whose rounding differs from run to
        run.
        """
        plain = self.layout.has_weight and self.layout.d_out == 1 and self.dtype != torch.float64
        return plain and hasattr(self._inputs, "sample_gradients")

    def _input_second_moment(self, weights: Tensor | None, diagonal: bool) -> Tensor:
        """Return ``Σ w a aᵀ`` per group, with ``w`` of shape ``(N, T)`` or all ones."""
        if weights is not None:
            return self._second_moment_of(self.inputs, weights, diagonal)
        # Layers that read the same tensor, such as query, key and value, share its moment.
        bias = self.bias_value if self.layout.has_bias else None
        what = f"moment, bias {bias}, diagonal {diagonal}"
        return self._once(
            what, self.inputs, lambda: self._second_moment_of(self.inputs, None, diagonal)
        )

    def _second_moment_of(self, inputs: Tensor, weights: Tensor | None, diagonal: bool) -> Tensor:
        layout = self.layout
        a = inputs.permute(2, 0, 1, 3).flatten(1, 2)  # (G, N·T, d_in)
        scaled = a if weights is None else a * weights.reshape(1, -1, 1)
        count = a.new_full((), a.shape[1]) if weights is None else weights.sum().to(a.dtype)
        if diagonal:
            moment = (scaled * a).sum(1)
            if not layout.has_bias:
                return moment
            corner = (count * self.bias_value**2).expand(layout.groups, 1)
            return torch.cat([moment, corner], dim=1)
        # [aᵀa, aᵀ1; 1ᵀa, n] without copying the activations beside a column of ones.
        d, size = layout.d_in, layout.d_augmented
        full = a.new_zeros(layout.groups, size, size)
        if layout.groups == 1 and weights is None:
            linalg.lower_gram(a[0], full[0, :d, :d])
        else:
            torch.bmm(scaled.mT, a, out=full[:, :d, :d])
        if layout.has_bias:
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
            return gram_by_gradients(self, right, symmetric)
        if self._gradients_are_cheaper(right):
            return gram_by_gradients(self, right, symmetric)
        return self._gram_by_positions(right, symmetric)

    @property
    def gram_takes_gradients(self) -> bool:
        """Whether ``J Jᵀ`` takes fewer operations from per-sample gradients."""
        return self._gradients_are_cheaper(self)

    def _gradients_are_cheaper(self, other: LinearJacobian) -> bool:
        by_positions = self._gram_operations(other, "positions")
        return self._gram_operations(other, "gradients") < by_positions

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
        step = max(1, layer.CHUNK_ELEMENTS // max(1, k * t * m * k2 * t2))
        if symmetric and self._gram_operations(other, "positions") > SPLIT_OPERATIONS:
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
                part = part.sum((2, 5)) if t * t2 != 1 else part[:, :, 0, :, :, 0]
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
        if self._needs_no_patches:
            return self.layout.flat(self.per_sample_gradients()).flatten(0, 1) @ vectors
        applied = self._apply(self.layout.matrix(vectors.T))  # (c, G, N, T, d_out)
        if self.directions > 1:
            return torch.einsum("nktgo,cgnto->nkc", self.output_gradients, applied).flatten(0, 1)
        # A batch of products of a row with a few columns would have these rearranged first.
        weighted = applied.permute(0, 2, 3, 1, 4) * self.output_gradients[:, 0]
        return weighted.sum((2, 3, 4)).T

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
        large_outputs = self.layout.large_factors(max_factor_size)[1]
        moment: Tensor | None = None
        input_sum: Tensor | None = None
        positions = delta.new_zeros(())
        if not continued:
            moment, positions = self.input_factor(weight_sharing, max_factor_size)
            input_sum = self._input_sum(weight_sharing) if moment.dim() == 2 else None
        if weight_sharing == "reduce" and (continued or self.positions > 1):
            delta = delta.sum(2, keepdim=True)
        if large_outputs:
            outputs = delta.new_zeros(delta.shape[3:])
            for some in delta.split(max(1, CACHED_ELEMENTS // max(1, delta[:1].numel()))):
                outputs += some.square().sum((0, 1, 2))
            return KroneckerSums(moment, positions, outputs, input_sum=input_sum)
        flat = delta.permute(3, 0, 1, 2, 4).flatten(1, 3)  # (G, N·K·T, d_out)
        if self.layout.groups == 1:
            outputs = linalg.lower_gram(flat[0]).unsqueeze(0)
        else:
            outputs = flat.mT @ flat
        return KroneckerSums(moment, positions, outputs, input_sum=input_sum)

    def input_factor(
        self, weight_sharing: WeightSharing = "expand", max_factor_size: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return ``Σ a aᵀ``, or its diagonal, and how many terms it sums.

        The arguments are those of :meth:`kronecker_factors`.
        """
        active = self.active_positions
        diagonal = self.layout.large_factors(max_factor_size)[0]
        if weight_sharing == "reduce" and self.positions > 1:
            _, moment, positions = self._reduced_second_moment(active, diagonal)
            return moment, positions
        moment = self._input_second_moment(active, diagonal)
        if active is not None:
            return moment, active.sum()
        return moment, self.output_gradients.new_full((), self.samples * self.positions)

    def _input_sum(self, weight_sharing: WeightSharing) -> Tensor | None:
        """Return ``Σ a`` with the bias coordinate, ``(G, d_in + bias)``."""
        if self.layout.one_hot or not self.layout.has_weight:
            return None
        inputs, weights = self.inputs, self.active_positions
        if weight_sharing == "reduce" and self.positions > 1:
            inputs, weights = self._mean_inputs(weights)
        a = inputs if weights is None else inputs * weights[:, :, None, None]
        total = a.sum((0, 1))
        if not self.layout.has_bias:
            return total
        number = inputs.shape[0] * inputs.shape[1]
        count = total.new_full((), number) if weights is None else weights.sum().to(total.dtype)
        corner = (count * self.bias_value).expand(self.layout.groups, 1)
        return torch.cat([total, corner], dim=1)

    def _reduced_second_moment(
        self, active: Tensor | None, diagonal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, weights = self._mean_inputs(active)
        positions = mean.new_full((), self.samples) if weights is None else weights.sum()
        return mean, self._second_moment_of(mean, weights, diagonal), positions


def mean_inputs(inputs: Tensor, active: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return every sample's mean input ``(N, 1, G, d)``, and which samples have any, ``(N, 1)``.

    Only active positions count, ``(N, T)`` of 0 and 1; all for None.
    """
    if active is None:
        return inputs.mean(1, keepdim=True), None
    counts = active.sum(1)
    mean = (inputs * active[:, :, None, None]).sum(1, keepdim=True)
    mean = mean / counts.clamp(min=1.0)[:, None, None, None]
    return mean, (counts > 0).to(inputs.dtype).unsqueeze(1)


def deviations_of(delta: Tensor, total: Tensor, number: Tensor) -> Tensor:
    """Return ``√(T/(T − 1)) (δ_t − Σδ/T)`` for T = number, 0 if it is 1."""
    return (delta - total / number.clamp(min=1.0)) * (number / (number - 1.0).clamp(min=1.0)).sqrt()


def tensor_identity(tensor: Tensor) -> tuple[Any, ...]:
    """Return what tells apart two tensors that are both alive."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
