"""Hamiltonians by what they connect, and local energies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from natgrad.arguments import check_integer
from natgrad.wave_functions.configurations import codes, distinct

Edges = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Connected:
    """Configurations σ' that H leads to from some configurations σ, σ' ≠ σ.

    Attributes:
        sources: Which σ each belongs to, ``(M,)``.
        configurations: σ', ``(M, sites)``.
        elements: ``⟨σ|H|σ'⟩``, ``(M,)``.
    """

    sources: Tensor
    configurations: Tensor
    elements: Tensor


@dataclass(frozen=True)
class LocalValues:
    """ψ, ``Hψ`` and the same of tangents ``ψ_j``, at N configurations.

    Attributes:
        logs: ``log ψ(σ)``, ``(N,)``.
        energies: ``⟨σ|H|ψ⟩/ψ(σ)``, ``(N,)``.
        tangents: ``ψ_j(σ)/ψ(σ)``, ``(N, k)``.
        applied: ``⟨σ|H|ψ_j⟩/ψ(σ)``, ``(N, k)``.
    """

    logs: Tensor
    energies: Tensor
    tangents: Tensor
    applied: Tensor


class Hamiltonian(ABC):
    """A Hermitian matrix over configurations of spins ±1, row by row.

    Attributes:
        sites: Number of spins.
    """

    sites: int

    @abstractmethod
    def diagonal(self, samples: Tensor) -> Tensor:
        """Return ``⟨σ|H|σ⟩``, ``(N,)``, for ``(N, sites)``."""

    @abstractmethod
    def connected(self, samples: Tensor) -> Connected:
        """Return all other configurations with elements that may not vanish, for ``(N, sites)``."""

    @torch.no_grad()
    def local_energies(self, model: nn.Module, samples: Tensor, chunk_size: int = 1024) -> Tensor:
        r"""Return ``⟨σ|H|ψ⟩/⟨σ|ψ⟩``.

        .. math:: E_{loc}(\sigma) = \sum_{\sigma'} \langle\sigma|H|\sigma'\rangle
                  e^{\log\psi(\sigma') - \log\psi(\sigma)}

        Args:
            model: Returns ``log ψ``, ``(N,)``, real or complex.
            samples: Configurations σ, ``(..., sites)``.
            chunk_size: Configurations σ at a time; the model sees all they are connected with,
                each once.

        Returns:
            Local energies ``(...)``, of the model's type.

        Raises:
            ValueError: If samples have another number of sites.
        """
        if samples.shape[-1] != self.sites:
            raise ValueError(
                f"samples must have {self.sites} sites in their last dimension, got shape "
                f"{tuple(samples.shape)}"
            )

        def logs(configurations: Tensor) -> tuple[Tensor, Tensor]:
            found = model(configurations).reshape(-1)
            return found, found.new_zeros(len(found), 0)

        found = self.local_values(logs, samples.reshape(-1, self.sites), chunk_size)
        return found.energies.view(samples.shape[:-1])

    def local_values(
        self,
        logs_and_tangents: Callable[[Tensor], tuple[Tensor, Tensor]],
        samples: Tensor,
        chunk_size: int = 1024,
    ) -> LocalValues:
        """Return what ψ, its tangents ``ψ_j = t_j ψ`` and H are at configurations.

        Args:
            logs_and_tangents: Returns ``log ψ``, ``(N,)``, and t, ``(N, k)``.
            samples: Configurations σ, ``(N, sites)``.
            chunk_size: Configurations σ at a time.
        """
        check_integer("chunk_size", chunk_size)
        results = []
        for some in samples.split(chunk_size):
            found = self.connected(some)
            seen, places = distinct(torch.cat([some, found.configurations]))
            logs, tangents = logs_and_tangents(seen)
            own, others = places[: len(some)], places[len(some) :]
            terms = found.elements * torch.exp(logs[others] - logs[own][found.sources])
            diagonal = self.diagonal(some).to(terms.dtype)
            energies = diagonal.index_add(0, found.sources, terms)
            columns = (diagonal.unsqueeze(1) * tangents[own]).index_add(
                0, found.sources, terms.unsqueeze(1) * tangents[others]
            )
            results.append((logs[own], energies, tangents[own], columns))
        return LocalValues(*(torch.cat(parts) for parts in zip(*results, strict=True)))

    def matrix(self, configurations: Tensor) -> Tensor:
        """Return H over configurations ``(D, sites)``, sparse, ``(D, D)``.

        Args:
            configurations: All, or a sector that H does not lead out of.

        Raises:
            ValueError: If H leads out of them.
        """
        found = self.connected(configurations)
        known, order = codes(configurations).sort()
        wanted = codes(found.configurations)
        place = torch.searchsorted(known, wanted).clamp(max=len(known) - 1)
        if not torch.equal(known[place], wanted):
            raise ValueError(
                "the Hamiltonian leads out of the configurations given: give all of them, or a "
                "sector of a number that it conserves"
            )
        here = torch.arange(len(configurations), device=configurations.device)
        rows, columns = torch.cat([here, found.sources]), torch.cat([here, order[place]])
        values = torch.cat([self.diagonal(configurations), found.elements])
        size = (len(configurations), len(configurations))
        return torch.sparse_coo_tensor(
            torch.stack([rows, columns]), values, size, check_invariants=True
        ).coalesce()


def chain(sites: int, periodic: bool = True) -> list[tuple[int, int]]:
    """Return the edges between neighbours of a chain.

    Raises:
        ValueError: If it has fewer than 3 sites, or 2 if it is open.
    """
    check_integer("sites", sites, 3 if periodic else 2)
    return [(i, (i + 1) % sites) for i in range(sites if periodic else sites - 1)]


def checked_edges(sites: int, edges: Edges | None) -> Tensor:
    """Return edges ``(B, 2)``, pairs of different sites; those of a periodic chain for None."""
    check_integer("sites", sites)
    pairs = chain(sites) if edges is None else [tuple(edge) for edge in edges]
    for pair in pairs:
        inside = len(pair) == 2 and all(0 <= site < sites for site in pair)
        if not inside or pair[0] == pair[1]:
            raise ValueError(f"edges must be pairs of two different sites below {sites}: {pair}")
    return torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)
