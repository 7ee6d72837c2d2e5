"""What samples of local energies say, and how sure it is."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

#: Errors are estimated from at least so many blocks, where there are as many samples.
LEAST_BLOCKS = 64


@dataclass(frozen=True)
class EnergyStatistics:
    """Mean and errors of local energies of several chains.

    Attributes:
        mean: Mean of the real parts.
        error: Standard error of the mean, correlations along a chain included.
        variance: Mean of ``|E_loc − E|²``; 0 in an eigenstate.
        correlation_time: τ, as of ``error² = variance/N · (1 + 2τ)``, in samples of a chain.
        r_hat: Gelman and Rubin's R̂ of the chains; near 1 where they agree, NaN for one chain or
            sample.
    """

    mean: float
    error: float
    variance: float
    correlation_time: float
    r_hat: float

    def v_score(self, sites: int, reference: float = 0.0) -> float:
        """Return ``sites · variance/(E − E∞)²``, by which different models compare.

        Args:
            sites: Number of degrees of freedom.
            reference: E∞, the mean of all eigenvalues; 0 for sums of products of spin operators.

        Source: Wu et al., Variational benchmarks for quantum many-body problems (2024).
        """
        return sites * self.variance / (self.mean - reference) ** 2


def energy_statistics(local_energies: Tensor) -> EnergyStatistics:
    """Return mean, error and variance of local energies.

    Every chain is cut into blocks as long as possible with 64 of them in all; with 64 chains or
    more a chain is a block. The error is that of the mean of the blocks' means.

    Args:
        local_energies: Of successive samples along the last dimension, ``(chains, n)``, or ``(n,)``
            for one chain; real or complex.

    Raises:
        ValueError: If there are fewer than two samples.
    """
    if local_energies.dim() not in (1, 2) or local_energies.numel() < 2:
        raise ValueError(
            "local_energies must have shape (chains, n) or (n,) with two entries at least, got "
            f"{tuple(local_energies.shape)}"
        )
    values = local_energies.detach().reshape(-1, local_energies.shape[-1])
    chains, length = values.shape
    variance = float((values - values.mean()).abs().square().mean())
    energies = values.real.double()
    mean, number = float(energies.mean()), energies.numel()
    blocks = min(length, -(-LEAST_BLOCKS // chains))
    size = length // blocks
    means = energies[:, : blocks * size].reshape(-1, size).mean(1)
    error = float(means.std()) / math.sqrt(len(means))
    spread = float(energies.var())
    time = max(0.0, 0.5 * (error**2 * number / spread - 1)) if spread > 0 else 0.0
    return EnergyStatistics(mean, error, variance, time, _r_hat(energies))


def _r_hat(energies: Tensor) -> float:
    """Return the root of the ratio of the variance of all to that within chains."""
    chains, length = energies.shape
    if chains < 2 or length < 2:
        return math.nan
    within, between = float(energies.var(1).mean()), float(energies.mean(1).var())
    if within == 0:
        return 1.0 if between == 0 else math.inf
    return math.sqrt((length - 1) / length + between / within)
