"""The Heisenberg model."""

from __future__ import annotations

import torch
from torch import Tensor

from natgrad.wave_functions.hamiltonian import Connected, Edges, Hamiltonian, checked_edges


class Heisenberg(Hamiltonian):
    r"""Spins ½ with isotropic exchange.

    .. math:: H = J \sum_{(i,j)} \vec S_i \cdot \vec S_j

    It conserves the sum of spins. Turning one sublattice by π about z ("Marshall's sign rule")
    makes every exchange negative and, for ``J > 0``, the ground state positive, so that a real
    ``log ψ`` is enough; energies stay what they are.

    Args:
        sites: Number of spins.
        coupling: J, positive for an antiferromagnet.
        edges: Pairs of sites; a periodic chain by default.
        marshall: Turn one sublattice. The edges must lead from one sublattice to the other.

    Raises:
        ValueError: If an edge is no pair of two different sites, or there are no two sublattices.

    Source: Marshall, Antiferromagnetism (1955).
    """

    def __init__(
        self,
        sites: int,
        coupling: float = 1.0,
        edges: Edges | None = None,
        marshall: bool = False,
    ) -> None:
        self.sites: int = sites
        self.coupling: float = coupling
        self.marshall: bool = marshall
        self.edges: Tensor = checked_edges(sites, edges)
        if marshall and not _is_bipartite(sites, self.edges.tolist()):
            raise ValueError(
                "Marshall's sign rule needs two sublattices with edges between them only, as in a "
                "chain of even length: use marshall=False and a complex log amplitude"
            )

    def diagonal(self, samples: Tensor) -> Tensor:
        """Return ``J/4 Σ σ_i σ_j``."""
        first, second = self.edges.to(samples.device).unbind(1)
        return 0.25 * self.coupling * (samples[:, first] * samples[:, second]).sum(1)

    def connected(self, samples: Tensor) -> Connected:
        """Return every exchange of opposite neighbours, with element J/2, or −J/2 by the rule."""
        edges = self.edges.to(samples.device)
        first, second = edges.unbind(1)
        sources, bonds = torch.nonzero(samples[:, first] != samples[:, second], as_tuple=True)
        configurations = samples[sources]
        configurations.scatter_(1, edges[bonds], -configurations.gather(1, edges[bonds]))
        element = (-0.5 if self.marshall else 0.5) * self.coupling
        return Connected(sources, configurations, samples.new_full((len(sources),), element))


def _is_bipartite(sites: int, edges: list[list[int]]) -> bool:
    """Return whether two colours suffice for neighbours to differ."""
    # One node a site and colour: edges join those that go together.
    above = list(range(2 * sites))

    def root(node: int) -> int:
        while above[node] != node:
            node = above[node]
        return node

    for first, second in edges:
        for node, other in ((first, second + sites), (first + sites, second)):
            above[root(node)] = root(other)
    return all(root(site) != root(site + sites) for site in range(sites))
