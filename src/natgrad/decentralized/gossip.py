r"""Averages over neighbours, that become averages over all.

.. math:: x_i \leftarrow \sum_j W_{ij} x_j

with a doubly stochastic matrix W, whose entry is zero where two agents do not talk. The mean over
agents stays, the distance to it shrinks by ``|λ₂(W)|`` each time, with λ₂ the second largest
eigenvalue in size (Boyd et al., Fastest linear iterations for distributed averaging, 2004).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

Graph = Literal["ring", "grid", "complete"]


def mixing_matrix(graph: Graph | Tensor, number: int) -> Tensor:
    """Return W for some agents, ``(N, N)`` in float64.

    Args:
        graph: ``"ring"``; ``"grid"``, as square as N allows, without wrapping round; ``"complete"``
            with ``W = 1/N``; or a matrix of one's own. Ring and grid have the weights of Metropolis
            and Hastings, ``1/(1 + max(d_i, d_j))`` for neighbours with d_i and d_j neighbours.
        number: N.

    Raises:
        ValueError: If the graph is unknown, or a matrix is not doubly stochastic.
    """
    if isinstance(graph, Tensor):
        matrix = graph.double()
        sums = torch.ones(number, dtype=torch.float64)
        fits = matrix.shape == (number, number) and bool((matrix >= 0).all())
        if not (fits and all(torch.allclose(matrix.sum(dim), sums) for dim in (0, 1))):
            raise ValueError(
                f"a mixing matrix of {number} agents must be {number} × {number}, with entries of "
                f"at least 0 and rows and columns that sum to 1, got {tuple(graph.shape)} with row "
                f"sums {matrix.sum(-1).tolist()}"
            )
        return matrix
    if graph == "complete":
        return torch.full((number, number), 1.0 / number, dtype=torch.float64)
    if graph not in ("ring", "grid"):
        raise ValueError(f"graph must be 'ring', 'grid', 'complete' or a matrix, got {graph!r}")
    width = number if graph == "ring" else _width(number)
    edges = torch.zeros(number, number, dtype=torch.bool)
    for i in range(number):
        if graph == "ring":
            others = [(i + 1) % number]
        else:
            others = [i + 1] * ((i + 1) % width > 0) + [i + width] * (i + width < number)
        for j in others:
            edges[i, j] = edges[j, i] = i != j
    degrees = edges.sum(1).double()
    weights = 1.0 / (1.0 + torch.maximum(degrees.unsqueeze(0), degrees.unsqueeze(1)))
    matrix = torch.where(edges, weights, 0.0)
    return matrix + torch.diag(1.0 - matrix.sum(1))


def _width(number: int) -> int:
    """Return the largest divisor up to the square root."""
    return max(d for d in range(1, int(number**0.5) + 1) if number % d == 0)


class Gossip:
    """Mixes the tensors of an agent with those of its neighbours.

    Args:
        graph: Who talks to whom; see :func:`mixing_matrix`.
        group: The agents, a process group; None for all processes.

    Attributes:
        matrix: W, ``(N, N)``.
    """

    def __init__(self, graph: Graph | Tensor, group: Any = None) -> None:
        self.group = group
        running = torch.distributed.is_available() and torch.distributed.is_initialized()
        number = torch.distributed.get_world_size(group) if running else 1
        self.rank: int = torch.distributed.get_rank(group) if running else 0
        self.matrix: Tensor = mixing_matrix(graph, number)

    @property
    def spectral_gap(self) -> float:
        """``1 − |λ₂(W)|``: by which share the distance to consensus shrinks each time."""
        sizes = torch.linalg.eigvals(self.matrix).abs().sort(descending=True).values
        return float(1.0 - sizes[1]) if len(sizes) > 1 else 1.0

    def mixed(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return ``Σ_j W_ij x_j`` of tensors that have the same shapes with all neighbours."""
        result: list[Tensor] = [tensor.clone() for tensor in tensors]
        for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
            numbers = [i for i, tensor in enumerate(tensors) if tensor.dtype == dtype]
            flat = torch.cat([tensors[i].reshape(-1) for i in numbers])
            pieces = self._mixed(flat).split([tensors[i].numel() for i in numbers])
            for i, piece in zip(numbers, pieces, strict=True):
                result[i] = piece.reshape(tensors[i].shape)
        return result

    def _mixed(self, flat: Tensor) -> Tensor:
        own = self.matrix[self.rank]
        senders = [j for j in own.nonzero()[:, 0].tolist() if j != self.rank]
        takers = [j for j in self.matrix[:, self.rank].nonzero()[:, 0].tolist() if j != self.rank]
        received = {j: torch.empty_like(flat) for j in senders}
        transport = torch.distributed
        sends = [
            transport.P2POp(transport.isend, flat, self._global(j), self.group) for j in takers
        ]
        takes = [
            transport.P2POp(transport.irecv, received[j], self._global(j), self.group)
            for j in senders
        ]
        for work in transport.batch_isend_irecv(sends + takes) if sends + takes else ():
            work.wait()
        total = flat * float(own[self.rank])
        for j in senders:
            total = total.add_(received[j], alpha=float(own[j]))
        return total

    def _global(self, rank: int) -> int:
        if self.group is None:
            return rank
        return torch.distributed.get_global_rank(self.group, rank)
