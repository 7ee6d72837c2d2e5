"""The rows of all layers for one batch."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from natgrad.jacobians.layer import LayerJacobian, joint_gram
from natgrad.jacobians.linear import LinearJacobian
from natgrad.layouts import ParameterLayout

__all__ = ["Jacobians"]


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
        for block in blocks.values():
            if isinstance(block, LinearJacobian):
                block.moments = self.moments
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

    def of_blocks(self, names: Iterable[str], layout: ParameterLayout) -> Jacobians:
        """Return the rows of some of the blocks alone.

        Args:
            names: The blocks; those that are absent here stay so.
            layout: Order of their parameters.
        """
        result = copy.copy(self)
        wanted = set(names)
        result._blocks = {name: block for name, block in self.items() if name in wanted}
        result.layout = layout
        return result

    def gram(self, other: Jacobians | None = None) -> Tensor:
        """Return ``J J'ᵀ = Σ_l J_l J'_lᵀ``, ``(N·K, N'·K')``.

        Raises:
            ValueError: If no block was reached.
        """
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
        blocks = {name: block.combined(weights) for name, block in self.items()}
        return Jacobians(self.layout, blocks, self.samples, weights.shape[2])

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
