"""The rows of all layers for one batch."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from natgrad.jacobians.layer import LayerJacobian, joint_gram
from natgrad.jacobians.linear import LinearJacobian
from natgrad.layouts import ParameterLayout

if TYPE_CHECKING:
    from natgrad.jacobians.shares import Shares


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
        #: What layers that read the same tensor share while curvature is updated.
        self.moments: dict[Any, tuple[Tensor, Tensor]] = {}
        linear = [block for block in blocks.values() if isinstance(block, LinearJacobian)]
        inputs = [block.shared_inputs for block in linear]
        readers = Counter(inputs)
        for block, own in zip(linear, inputs, strict=True):
            block.moments = self.moments if own is not None and readers[own] > 1 else None
        self.samples = samples
        self.directions = directions
        #: Which rows are whose, where other processes keep some; blocks and samples are one's own.
        self.shares: Shares | None = None

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
        """Number of rows, ``N·K``, those of other processes included."""
        return self.samples * self.directions if self.shares is None else self.shares.rows

    def of_blocks(self, names: Iterable[str], layout: ParameterLayout) -> Jacobians:
        """Return the rows of some of the blocks alone.

        Args:
            names: The blocks; those that are absent here stay so.
            layout: Order of their parameters.
        """
        result = copy.copy(self)
        wanted = set(names)
        result._blocks = {name: block for name, block in self._blocks.items() if name in wanted}
        result.layout = layout
        if self.shares is not None:
            result.shares = self.shares.of_blocks(wanted)
        return result

    def gram(self, other: Jacobians | None = None) -> Tensor:
        """Return ``J J'ᵀ = Σ_l J_l J'_lᵀ``, ``(N·K, N'·K')``.

        Raises:
            ValueError: If no block was reached.
        """
        right = self if other is None else other
        if self.shares is not None and right.shares is not None:
            return self.shares.gram(self, right, right.shares)
        parts: Iterator[Tensor]
        if other is None:
            together = [block for block in self.values() if block.gram_takes_gradients]
            apart = [block for block in self.values() if not block.gram_takes_gradients]
            joint = [joint_gram(together)] if together else []
            parts = chain(joint, (block.gram() for block in apart))
        else:
            parts = (block.gram(other[name]) for name, block in self.items() if name in other)
        total = next(parts, None)
        if total is None:
            raise ValueError("the output depends on no captured parameter, so there is no Gram")
        for part in parts:
            total.add_(part)
        return total

    def combined(self, weights: Tensor) -> Jacobians:
        """Return rows ``Σ_k w_nkj J_nk`` for ``w`` of shape ``(N, K, J)``."""
        blocks = {name: block.combined(weights.to(block.dtype)) for name, block in self.items()}
        return Jacobians(self.layout, blocks, self.samples, weights.shape[2])

    def times(self, columns: Tensor) -> Tensor:
        """Return ``J V``, ``(N·K, k)``, for columns ``(P, k)``."""
        total = columns.new_zeros(self.samples * self.directions, columns.shape[1])
        for block in self.values():
            own = self.layout.gather(block.layout, columns)
            total += block.matvec(own.to(block.dtype))
        return total if self.shares is None else self.shares.of_all(total)

    def transposed_times(self, weights: Tensor) -> Tensor:
        """Return ``Jᵀ W``, ``(P, k)``, for row weights ``(N·K, k)``."""
        own = weights if self.shares is None else self.shares.own(weights)
        result = weights.new_zeros(self.layout.numel, weights.shape[1])
        for block in self.values():
            self.layout.add(block.layout, block.rmatvec(own.to(block.dtype)), result)
        return result if self.shares is None else self.shares.added_up(result)

    def diagonal(self) -> Tensor:
        """Return the diagonal of ``JᵀJ``, ``(P,)``."""
        dtype = self.layout.dtype if self.shares is None else self.shares.dtype
        for block in self.values():
            dtype = block.dtype
        result = torch.zeros(self.layout.numel, dtype=dtype, device=self.layout.device)
        for block in self.values():
            self.layout.add(block.layout, block.diagonal(), result)
        return result if self.shares is None else self.shares.added_up(result)

    def matvec(self, vector: Tensor) -> Tensor:
        """Return ``J v`` as ``(N, K)`` for a flat vector ``(P,)``."""
        return self.times(vector.unsqueeze(1)).view(self.samples, self.directions)

    def rmatvec(self, weights: Tensor) -> Tensor:
        """Return ``Jᵀ w`` as a flat vector ``(P,)`` for ``(N, K)`` row weights."""
        return self.transposed_times(weights.reshape(-1, 1))[:, 0]

    def to_dense(self) -> Tensor:
        """Return the whole Jacobian ``(N·K, P)``, columns in parameter order."""
        first = next(iter(self.values()), self.shares)
        assert first is not None
        rows = self.samples * self.directions
        result = torch.zeros(self.layout.numel, rows, dtype=first.dtype, device=first.device)
        for block in self.values():
            self.layout.scatter(block.layout, block.to_dense().T, result)
        return result.T if self.shares is None else self.shares.of_all(result.T)


def in_type(rows: Jacobians, dtype: torch.dtype) -> Jacobians:
    """Return rows in a floating-point type, as where layers of several types make one matrix."""
    if all(block.dtype == dtype for block in rows.values()):
        return rows
    result = copy.copy(rows)
    result._blocks = {name: block.in_type(dtype) for name, block in rows.items()}
    return result


class ScaledRows(Jacobians):
    r"""Rows that are damped in other units than their own.

    With ``T = diag(scales)`` and the gradient ``∇L = Jᵀu`` they are preconditioned by

    .. math:: J^\top (JJ^\top/count + \lambda T^{-2})^{-1} u
              = J^\top T (T JJ^\top T/count + \lambda I)^{-1} T u,

    the right side of which has a limit where a scale is 0. What a gradient holds beside ``Jᵀu``
    (penalties in the loss) is multiplied by the mean of the squared scales and solved for with
    ``JᵀT²J/count + λI``, which is the same where all scales are equal.

    Args:
        rows: The rows J, of the same blocks, samples and directions.
        scales: t ≥ 0, ``(N·K,)``.
        coordinates: u up to a common factor, ``(N·K,)``.
    """

    def __init__(self, rows: Jacobians, scales: Tensor, coordinates: Tensor) -> None:
        super().__init__(rows.layout, dict(rows), rows.samples, rows.directions)
        self.shares: Shares | None = rows.shares
        self.scales: Tensor = scales
        self.coordinates: Tensor = coordinates
