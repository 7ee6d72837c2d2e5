"""All configurations of spins, and how likely a wave function finds them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

#: More spins than this are not enumerated (2^24 configurations).
MOST_SITES = 24


def all_configurations(
    sites: int, magnetization: int | None = None, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Return all configurations of ±1, ``(D, sites)``, in the order of binary numbers.

    Args:
        sites: Number of spins, 24 at most.
        magnetization: Keep those with this sum of spins only; all by default.
        dtype: Type of the entries.

    Raises:
        ValueError: If there are too many or no sites, or no configuration has the sum.
    """
    if not 1 <= sites <= MOST_SITES:
        raise ValueError(
            f"sites must be in 1 ... {MOST_SITES} for all configurations to be listed, got {sites}:"
            " use natgrad.wave_functions.Metropolis"
        )
    numbers = torch.arange(2**sites).unsqueeze(1)
    places = torch.arange(sites - 1, -1, -1)
    spins = ((numbers >> places) & 1).mul_(2).sub_(1)
    if magnetization is not None:
        spins = spins[spins.sum(1) == magnetization]
        if not len(spins):
            raise ValueError(f"no configuration of {sites} spins has the sum {magnetization}")
    return spins.to(dtype)


def codes(configurations: Tensor) -> Tensor:
    """Return the binary number of each configuration ``(..., sites)``, up spins being ones."""
    sites = configurations.shape[-1]
    places = torch.arange(sites - 1, -1, -1, device=configurations.device)
    return ((configurations > 0).long() << places).sum(-1)


def distinct(configurations: Tensor) -> tuple[Tensor, Tensor]:
    """Return configurations ``(U, sites)`` without repetition, and where each was, ``(N,)``.

    Those of more than 62 spins, whose numbers do not fit and which hardly repeat, are kept.
    """
    count, sites = configurations.shape
    if sites > 62:
        return configurations, torch.arange(count, device=configurations.device)
    _, places = codes(configurations).unique(return_inverse=True)
    first = places.new_empty(int(places.max()) + 1 if count else 0)
    first[places] = torch.arange(count, device=configurations.device)
    return configurations[first], places


@torch.no_grad()
def probabilities(model: nn.Module, configurations: Tensor) -> Tensor:
    """Return ``|ψ|²`` of configurations ``(D, sites)``, ``(D,)``, with sum 1.

    Args:
        model: Returns ``log ψ``, ``(D,)``.
        configurations: All there are, or one sector of a conserved number.
    """
    found: Tensor = (2 * model(configurations).reshape(-1).real).softmax(0)
    return found
