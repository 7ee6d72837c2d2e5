"""Rows that stay with the processes that have made them: products with all of them, in shares."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from natgrad.distributed.replicas import Replicas
from natgrad.jacobians.packing import pack_layer, unpack_layer

if TYPE_CHECKING:
    from natgrad.jacobians.layer import LayerJacobian


@dataclass(frozen=True, eq=False)
class Shares:
    r"""Which rows of a batch are whose, each process holding its own.

    With the rows :math:`J_r` of process r the Gram matrix is made in blocks :math:`J_r J_s^\top`.
    Layer by layer the rows of others pass by, on their way round half the ring of processes, so
    that beside its own rows, and Gram matrices, a process holds two shares of one layer at most.
    All processes must ask for the same products, in the same order.

    Attributes:
        replicas: The processes.
        lengths: How many rows each has, in the order of ranks.
        names: The blocks that any of them has rows of, in one order for all.
        dtype: Type of the rows.
        device: Where they are.
    """

    replicas: Replicas
    lengths: tuple[int, ...]
    names: tuple[str, ...]
    dtype: torch.dtype
    device: torch.device
    _grams: list[tuple[Shares | None, Tensor]] = field(default_factory=list, init=False)

    def of_blocks(self, names: Collection[str]) -> Shares:
        """Return the shares of rows of some of the blocks alone."""
        return replace(self, names=tuple(name for name in self.names if name in names))

    @property
    def rows(self) -> int:
        """Number of rows of all processes."""
        return sum(self.lengths)

    def own(self, weights: Tensor) -> Tensor:
        """Return the part of ``(R, k)`` that is about this process's rows."""
        start = sum(self.lengths[: self.replicas.rank])
        return weights[start : start + self.lengths[self.replicas.rank]]

    def of_all(self, own: Tensor) -> Tensor:
        """Return ``(R, ...)`` of which every process has what is about its own rows."""
        return self.replicas.laid_end_to_end(own, self.lengths)

    def added_up(self, value: Tensor) -> Tensor:
        """Return the sum over processes of a tensor of the same shape in all."""
        return self.replicas.added_up(value)

    def all(self, flag: Tensor) -> Tensor:
        """Return whether a flag is up in all processes."""
        number = self.replicas.added_up(flag.to(torch.int32))
        return number == self.replicas.number

    def gram(
        self,
        left: Mapping[str, LayerJacobian],
        right: Mapping[str, LayerJacobian],
        others: Shares,
    ) -> Tensor:
        """Return ``J J'ᵀ``, ``(R, R')`` of all rows, from those of this process in either.

        It is made once, as processes may want it again on their own.
        """
        symmetric = left is right
        for known, gram in self._grams:
            if known is (None if symmetric else others):
                return gram
        gram = self._made(left, right, others, symmetric)
        self._grams.append((None if symmetric else others, gram))
        return gram

    def _made(
        self,
        left: Mapping[str, LayerJacobian],
        right: Mapping[str, LayerJacobian],
        others: Shares,
        symmetric: bool,
    ) -> Tensor:
        rank, world = self.replicas.rank, self.replicas.number
        steps = world // 2 if symmetric else world - 1
        blocks: dict[int, Tensor] = {}  # By the rank whose rows are on the right.

        def add(source: int, block: Tensor) -> None:
            blocks[source] = blocks[source] + block if source in blocks else block

        for name in (n for n in self.names if n in others.names):
            mine, own = left.get(name), right.get(name)
            if mine is not None and own is not None:
                add(rank, mine.gram(None if symmetric else own))
            passing = self.replicas.passed_round(
                None if own is None else pack_layer(own), self.device, steps
            )
            for step, visitor in enumerate(passing, start=1):
                source = (rank - step) % world
                twice = symmetric and 2 * step == world and rank < source
                if mine is not None and visitor is not None and not twice:
                    add(source, mine.gram(unpack_layer(visitor, self.device)))
                del visitor  # Before the next one leaves.
        return self._assembled(blocks, others, symmetric)

    def _assembled(self, own: dict[int, Tensor], others: Shares, symmetric: bool) -> Tensor:
        """Return the matrix of the blocks that every process has made."""
        sent: list[Any] = [own.get(source) for source in range(self.replicas.number)]
        result = torch.zeros(self.rows, others.rows, dtype=self.dtype, device=self.device)
        for row, blocks in zip(
            result.split(list(self.lengths)), self.replicas.gathered(sent, self.device), strict=True
        ):
            for part, block in zip(row.split(list(others.lengths), 1), blocks, strict=True):
                if block is not None:
                    part.copy_(block)
        if not symmetric:
            return result
        # Of two blocks opposite each other one was made.
        diagonal = torch.block_diag(*(torch.ones(n, n, dtype=torch.bool) for n in self.lengths))
        return torch.where(diagonal.to(self.device), result, result + result.T)
