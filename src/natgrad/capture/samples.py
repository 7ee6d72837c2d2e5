"""Where the samples of a batch lie in a layer's tensors, and which layers mix them.

A row belongs to its sample if a vector at that sample's output is pulled back to that sample's part
of the layer's output alone. Vectors that are zero at some samples therefore show where the samples
of a layer lie: in the first dimension or another one, one sample after the other or interleaved
(two views of a batch laid behind each other), or nowhere, where the layer or what follows it
couples them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SampleAxis:
    """Where samples lie in a tensor.

    Attributes:
        dim: The dimension, of size ``N·r``.
        outer: Whether entry i belongs to sample ``i // r``, else to sample ``i % N``.
    """

    dim: int = 0
    outer: bool = True

    def samples_first(self, tensor: Tensor, samples: int, lead: int = 0) -> Tensor:
        """Return a tensor with its N samples in order first, behind ``lead`` dimensions."""
        dim = lead + self.dim
        if not self.outer and tensor.shape[dim] != samples:
            pairs = tensor.unflatten(dim, (-1, samples)).transpose(dim, dim + 1)
            tensor = pairs.flatten(dim, dim + 1)
        return tensor if self.dim == 0 else tensor.movedim(dim, lead)


def probe_samples(samples: int, elements: int, seed: int, limit: int) -> Tensor:
    """Return sets of samples, ``(P, N)`` booleans.

    Of every two samples each is in some set without the other, if P sets times ``elements`` do not
    exceed ``limit``: no sample's sets are a part of another's, as all are in equally many. P is the
    least for which there are N such choices, ``C(P, ⌊P/2⌋) >= N`` (Sperner 1928). Otherwise two
    random halves and their complements part three pairs of four.
    """
    if samples == 1:
        return torch.ones(1, 1, dtype=torch.bool)
    count = next(p for p in itertools.count(2) if math.comb(p, p // 2) >= samples)
    if count * elements > limit:
        return random_halves(samples, 2, seed)
    choices = itertools.combinations(range(count), count // 2)
    members = torch.tensor(list(itertools.islice(choices, samples)))
    return torch.zeros(count, samples, dtype=torch.bool).scatter_(0, members.T, value=True)


def random_halves(samples: int, count: int, seed: int) -> Tensor:
    """Return random halves of some samples and their complements, ``(2 count, N)`` booleans."""
    if samples == 1:
        return torch.ones(1, 1, dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(samples, generator=generator) for _ in range(count)])
    halves = order < samples // 2
    return torch.cat([halves, ~halves])


def probe_vector(output: Tensor, seed: int) -> Tensor:
    """Return a random output vector, ``(1, *output.shape)``."""
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if output.dtype == torch.float64 else torch.float32
    return torch.randn((1, *output.shape), generator=generator, dtype=dtype).to(output)


def at_samples(vectors: Tensor, chosen: Tensor) -> Tensor:
    """Return output vectors ``(K, N, ...)`` with zeros but at chosen samples, ``(N,)``."""
    mask = chosen.to(vectors.device).reshape(-1, *[1] * (vectors.dim() - 2))
    return torch.where(mask, vectors, torch.zeros_like(vectors))


def find_axis(
    reached: Tensor, chosen: Tensor, dims: Iterable[int], known: SampleAxis | None = None
) -> SampleAxis | None:
    """Return where samples lie in a layer's output, or None where they are coupled.

    Vectors that are zero but at chosen samples, ``(P, N)``, have reached ``(P, *output.shape)``.
    The likeliest is where they were before, then the dimensions in their order.
    """
    samples = chosen.shape[1]
    first = known or SampleAxis()
    for dim in sorted(dims, key=lambda dim: known is not None and dim != known.dim):
        size = reached.shape[1 + dim]
        if size == 0 or size % samples:
            continue
        rest = [d for d in range(1, reached.dim()) if d != 1 + dim]
        touched = reached.any(dim=rest) if rest else reached
        index = torch.arange(size, device=reached.device)
        for outer in (first.outer, not first.outer) if size > samples else (first.outer,):
            sample = index // (size // samples) if outer else index % samples
            if not bool((touched & ~chosen.to(touched.device)[:, sample]).any()):
                return SampleAxis(dim, outer)
    return None


def is_ragged(reached: Tensor, chosen: Tensor, limit: int) -> bool:
    """Return whether every position belongs to one sample, though samples are not equally large.

    So do tokens that are routed to an expert, and the nodes of unlike graphs. Vectors that are zero
    but at chosen samples, ``(P, N)``, have reached ``(P, T, d)``; ``limit`` pairs of a position and
    a sample are looked at at a time.
    """
    touched = reached.any(2).float().T
    without = (~chosen).unique(dim=1).to(touched)
    for some in touched.split(max(1, limit // without.shape[1])):
        others = some @ without  # By how many vectors without a sample a position is reached.
        if not bool((others == 0).any(1).all()):
            return False
    return True
