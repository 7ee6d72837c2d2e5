"""The Ising model in a transverse field."""

from __future__ import annotations

import torch
from torch import Tensor

from natgrad.wave_functions.hamiltonian import Connected, Edges, Hamiltonian, checked_edges


class TransverseFieldIsing(Hamiltonian):
    r"""Spins along z in a field along x.

    .. math:: H = -J \sum_{(i,j)} \sigma^z_i \sigma^z_j - h \sum_i \sigma^x_i

    Its ground state is positive for ``h > 0``, whatever J: a real ``log ψ`` is enough. A periodic
    chain is critical at ``|J| = h``.

    Args:
        sites: Number of spins.
        coupling: J.
        field: h.
        edges: Pairs of sites; a periodic chain by default.

    Raises:
        ValueError: If an edge is no pair of two different sites.
    """

    def __init__(
        self, sites: int, coupling: float = 1.0, field: float = 1.0, edges: Edges | None = None
    ) -> None:
        self.sites: int = sites
        self.coupling: float = coupling
        self.field: float = field
        self.edges: Tensor = checked_edges(sites, edges)

    def diagonal(self, samples: Tensor) -> Tensor:
        """Return ``−J Σ σ_i σ_j``."""
        first, second = self.edges.to(samples.device).unbind(1)
        return -self.coupling * (samples[:, first] * samples[:, second]).sum(1)

    def connected(self, samples: Tensor) -> Connected:
        """Return every single flip, with element −h."""
        count, sites = samples.shape
        flips = 1 - 2 * torch.eye(sites, dtype=samples.dtype, device=samples.device)
        flipped = (samples.unsqueeze(1) * flips).reshape(-1, sites)
        sources = torch.arange(count, device=samples.device).repeat_interleave(sites)
        return Connected(sources, flipped, samples.new_full((len(flipped),), -self.field))
