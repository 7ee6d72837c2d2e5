"""What every layer Jacobian can do, and what follows from per-sample gradients alone."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from natgrad import linalg
from natgrad.layouts import BlockLayout

if TYPE_CHECKING:
    from natgrad.jacobians.positions import Draw

WeightSharing = Literal["expand", "reduce", "split"]

# Largest temporary, in elements, that a chunked product may allocate (2^25 float32 = 128 MiB).
CHUNK_ELEMENTS = 2**25


@dataclass
class KroneckerSums:
    """Un-normalised second moments of one layer, right in their lower triangles.

    Attributes:
        inputs: ``Σ a aᵀ``, ``(G, d_in + bias, d_in + bias)``, or its diagonal ``(G, d_in + bias)``;
            None where an earlier chunk of the same samples has brought it already.
        positions: What the mean of ``inputs`` divides by, mostly how many terms it sums; a scalar
            or one number per group.
        outputs: ``Σ δ δᵀ``, ``(G, d_out, d_out)``, or its diagonal ``(G, d_out)``.
        further: Those of another product, which is to be added: of uses of the parameter the other
            way round, as of an embedding tied to the output layer, with inputs and outputs
            exchanged, or of what positions add to the means over them; None without any.
        input_sum: ``Σ a``, ``(G, d_in + bias)``, of a linear layer of whose ``inputs`` this is the
            diagonal; else None.
    """

    inputs: Tensor | None
    positions: Tensor
    outputs: Tensor | None
    further: KroneckerSums | None = None
    input_sum: Tensor | None = None

    def followed_by(self, more: KroneckerSums | None) -> KroneckerSums:
        """Return the same products with further ones."""
        further = more if self.further is None else self.further.followed_by(more)
        return replace(self, further=further)


def added(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    """Return the sum of two factors, ``(G, d, d)`` or diagonals ``(G, d)``, if there are any."""
    if left is None or right is None:
        return right if left is None else left
    if left.dim() == right.dim():
        return left + right
    dense, diagonal = (left, right) if left.dim() == 3 else (right, left)
    return dense + torch.diag_embed(diagonal)


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
    #: Whether a row is the sum of those of all samples, for vectors that are independent with mean
    #: zero: sums of squares are then right on average only.
    summed: bool = False
    #: Whether the positions of a row are those of all samples, each of one.
    ragged: bool = False

    def of_ragged(self) -> Self:
        """Return the same rows, marked as having the positions of all samples, each of one.

        In Kronecker factors every position then counts as a sample of its own.
        """
        result = copy.copy(self)
        result.ragged = True
        return result

    def summed_up(self) -> Self:
        """Return the same rows, marked as sums over all samples."""
        result = copy.copy(self)
        result.summed = True
        return result

    def over_samples(self) -> tuple[Tensor, Tensor | None] | None:
        """Return what processes add up of rows that are sums over samples, and what it belongs to.

        The latter are inputs that must be the same in all of them, or None for none. None if rows
        of different processes are others altogether.
        """
        return None

    def with_sums(self, sums: Tensor) -> Self:
        """Return the same rows with other sums over samples; see :meth:`over_samples`."""
        raise NotImplementedError

    def in_type(self, dtype: torch.dtype) -> Self:
        """Return the same rows in a floating-point type."""
        result = copy.copy(self)
        for key, value in vars(self).items():
            if isinstance(value, Tensor) and value.is_floating_point():
                setattr(result, key, value.to(dtype))
        return result

    def product_rows(
        self, weight_sharing: WeightSharing, rows_per_unit: float | None, draw: Draw
    ) -> tuple[LayerJacobian, ...]:
        """Return the rows of every Kronecker product of a setting for shared weights.

        Those of means over positions, and those of deviations from them, with ``"split"`` (of units
        without company, as in normalisation and depthwise convolutions, whose block is small, the
        exact ones); else one for all. Where positions are not summed first and there are more than
        enough, they are those of a random subset.

        Args:
            weight_sharing: The setting.
            rows_per_unit: Rows that suffice, per unit of the larger factor; None for all.
            draw: Which subset.
        """
        return (self,)

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

    @property
    def gram_takes_gradients(self) -> bool:
        """Whether ``J Jᵀ`` is had from per-sample gradients, which layers can share."""
        return False

    @abstractmethod
    def matvec(self, vectors: Tensor) -> Tensor:
        """Return ``J v`` of shape ``(N·K, c)`` for flat block vectors ``(P_l, c)``."""

    @abstractmethod
    def rmatvec(self, weights: Tensor) -> Tensor:
        """Return ``Jᵀ w`` of shape ``(P_l, c)`` for row weights ``(N·K, c)``."""

    @abstractmethod
    def per_sample_gradients(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return rows of samples ``start:stop`` as matrices ``(n, K, G, d_out, d_in + bias)``."""

    def by_units(self, width: int) -> Iterator[LayerJacobian]:
        """Yield rows of some units each, of at most ``width`` numbers or one unit.

        Here of all units at once; layers whose units share their inputs form some alone.
        """
        yield self

    @abstractmethod
    def combined(self, weights: Tensor) -> LayerJacobian:
        """Return rows ``Σ_k w_nkj M_nk`` for ``w`` of shape ``(N, K, J)``, J per sample.

        Rows pulled back from unit vectors become those of any other output vectors so, without
        another backward pass.
        """

    @abstractmethod
    def parted(self, samples: int) -> LayerJacobian:
        """Return rows ``(1, N·K)``, the vectors of one sample after the other, as ``(N, K)``."""

    @abstractmethod
    def kronecker_factors(
        self,
        weight_sharing: WeightSharing = "expand",
        max_factor_size: int | None = None,
        continued: bool = False,
    ) -> KroneckerSums:
        """Return the un-normalised Kronecker factors.

        Args:
            weight_sharing: ``"expand"`` treats every position as a sample of its own, and so does
                ``"split"``, of rows that are split already (:meth:`product_rows`);
                ``"reduce"`` averages inputs and sums output gradients over positions first
                (Eschenhagen et al. 2023).
            max_factor_size: Which factors are kept as their diagonal, see
                :meth:`BlockLayout.large_factors`.
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

    def unit_grams(self, other: LayerJacobian | None = None) -> Tensor:
        """Return every unit's share of :meth:`gram`, ``(G·d_out, N·K, N'·K')``.

        Raises:
            ValueError: If they do not fit memory.
        """
        right = self if other is None else other
        units = self.layout.groups * self.layout.d_out
        side = int((float(self.rows) * right.rows) ** 0.5) + 1
        linalg.check_memory(side, units, self.dtype, self.device)
        left = _unit_rows(self)
        return left @ (left if other is None else _unit_rows(right)).mT

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
            rows = _unit_rows(self, start, stop)
            total.baddbmm_(rows.mT, rows)
        return total

    def to_dense(self) -> Tensor:
        """Return all rows, ``(N·K, P_l)``."""
        return self.layout.flat(self.per_sample_gradients()).reshape(self.rows, -1)


def _unit_rows(jacobian: LayerJacobian, start: int = 0, stop: int | None = None) -> Tensor:
    """Return rows of samples ``start:stop`` cut into units, ``(G·d_out, n·K, d_in + bias)``."""
    rows = jacobian.per_sample_gradients(start, stop)
    n, k, groups, d_out, d_in = rows.shape
    return rows.permute(2, 3, 0, 1, 4).reshape(groups * d_out, n * k, d_in)


def gram_by_gradients(left: LayerJacobian, right: LayerJacobian, symmetric: bool) -> Tensor:
    """Multiply per-sample gradients chunk by chunk, in each block's flat order."""
    if symmetric:
        return joint_gram([left])
    result = torch.empty(left.rows, right.rows, dtype=left.dtype, device=left.device)
    k, k2 = left.directions, right.directions
    for start, stop in left.chunks():
        rows = left.layout.flat(left.per_sample_gradients(start, stop)).flatten(0, 1)
        for first, last in right.chunks():
            columns = right.layout.flat(right.per_sample_gradients(first, last)).flatten(0, 1)
            result[start * k : stop * k, first * k2 : last * k2] = rows @ columns.T
    return result


def joint_gram(blocks: Sequence[LayerJacobian]) -> Tensor:
    """Return ``Σ_l J_l J_lᵀ``, ``(N·K, N·K)``, of some layers from their per-sample gradients.

    Gradients of all layers lie side by side, as many units at a time as the chunk budget holds for
    all samples, so that each is formed once and the lower triangle alone is multiplied.
    """
    size = blocks[0].rows
    lower = torch.zeros(size, size, dtype=blocks[0].dtype, device=blocks[0].device)
    width, together = CHUNK_ELEMENTS // max(1, size), list[LayerJacobian]()
    for piece in (piece for block in blocks for piece in block.by_units(width)):
        if together and sum(map(_width, together)) + _width(piece) > width:
            _add_lower_gram(together, lower)
            together = []
        together.append(piece)
    _add_lower_gram(together, lower)
    return linalg.symmetric(lower)


def _add_lower_gram(blocks: Sequence[LayerJacobian], lower: Tensor) -> None:
    """Add the lower triangle of ``Σ_l J_l J_lᵀ``, chunk by chunk of samples."""
    samples, k = blocks[0].samples, blocks[0].directions
    step = max(1, CHUNK_ELEMENTS // max(1, k * sum(map(_width, blocks))))

    def rows(start: int) -> Tensor:
        stop = min(start + step, samples)
        parts = [block.per_sample_gradients(start, stop).flatten(2) for block in blocks]
        return torch.cat(parts, 2).flatten(0, 1)

    for start in range(0, samples, step):
        columns = rows(start)
        own = slice(start * k, start * k + len(columns))
        linalg.lower_gram(columns.T, out=lower[own, own])
        for later in range(start + step, samples, step):
            others = rows(later)
            lower[later * k : later * k + len(others), own].addmm_(others, columns.T)


def _width(block: LayerJacobian) -> int:
    return block.layout.groups * block.layout.d_out * block.layout.d_augmented


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return half-precision tensors as float32, others as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
