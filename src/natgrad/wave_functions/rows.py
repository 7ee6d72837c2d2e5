r"""The rows of stochastic reconfiguration: centred, weighted, and differentiated chunk by chunk.

.. math:: X_n = \sqrt{p_n} (O_n - \bar O), \qquad O_n = \partial_\theta \log\psi(\sigma_n), \qquad
          \bar O = \sum_n p_n O_n, \qquad S = \mathrm{Re}\, X^\dagger X

Complex rows are held as two real ones each, so that ``S = XᵀX``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from natgrad.jacobians import CHUNK_ELEMENTS, DenseJacobian, KroneckerSums, LayerJacobian
from natgrad.jacobians.layer import WeightSharing, gram_by_gradients
from natgrad.layouts import BlockLayout
from natgrad.wave_functions.amplitude import LogAmplitude

#: How many times more entries than its rows a chunk takes while it is differentiated.
OVERHEAD = 8


class AmplitudeJacobian(LayerJacobian):
    """``X``, of all parameters as one block.

    Configurations that fit one chunk are differentiated once and their rows kept. Otherwise every
    product differentiates them anew, and never are there rows of more than two chunks at a time:
    vectors are pushed and pulled through the model, and a Gram matrix of m chunks takes
    ``m(m + 1)/2`` differentiations.

    Args:
        amplitude: The model.
        samples: Configurations, ``(N, sites)``.
        shares: p, ``(N,)``, with sum 1.
        chunk_size: Configurations in a chunk; by default as many as keep temporary tensors small.
    """

    def __init__(
        self, amplitude: LogAmplitude, samples: Tensor, shares: Tensor, chunk_size: int | None
    ) -> None:
        self.amplitude: LogAmplitude = amplitude
        self.configurations: Tensor = samples
        self.layout: BlockLayout = amplitude.block
        self.samples: int = len(samples)
        self.shares: Tensor = shares.view(-1, 1)
        self.roots: Tensor = shares.sqrt().view(-1, 1)
        size = chunk_size or max(1, CHUNK_ELEMENTS // (OVERHEAD * self.layout.numel))
        starts = range(0, len(samples), size)
        self.slices: list[slice] = [slice(s, min(s + size, len(samples))) for s in starts]
        self.directions: int = amplitude(samples[:1]).shape[1]
        self._kept: Tensor | None = None
        if len(self.slices) == 1:
            rows = amplitude.rows(samples)
            mean = torch.tensordot(shares, rows, 1)
            self._kept = rows.sub_(mean).mul_(self.roots.unsqueeze(2))
        else:
            ones = torch.eye(self.directions, dtype=shares.dtype, device=shares.device)
            self.mean: Tensor = torch.stack([self._pulled(self.shares * one) for one in ones])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the rows."""
        return self.amplitude.layout.dtype

    @property
    def device(self) -> torch.device:
        """The device of the rows."""
        return self.amplitude.layout.device

    def state(self) -> dict[str, Tensor]:
        """Return what the rows are made from."""
        return {"configurations": self.configurations, "shares": self.shares}

    def gram(self, other: LayerJacobian | None = None) -> Tensor:
        """Return ``X X'ᵀ``."""
        if other is not None and other is not self:
            return gram_by_gradients(self, other, False)
        k = self.directions
        result = torch.empty(self.rows, self.rows, dtype=self.dtype, device=self.device)
        for index, chosen in enumerate(self.slices):
            left = self._chunk(chosen)
            own = slice(k * chosen.start, k * chosen.stop)
            result[own, own] = left @ left.T
            for before in self.slices[:index]:
                product = left @ self._chunk(before).T
                result[own, k * before.start : k * before.stop] = product
                result[k * before.start : k * before.stop, own] = product.T
        return result

    def moment(self) -> Tensor:
        """Return ``S = XᵀX``, ``(P, P)``."""
        size = self.layout.numel
        result = torch.zeros(size, size, dtype=self.dtype, device=self.device)
        for chosen in self.slices:
            rows = self._chunk(chosen)
            result.addmm_(rows.T, rows)
        return result

    def trace(self) -> Tensor:
        """Return the trace of S."""
        parts = [self._chunk(chosen).square().sum() for chosen in self.slices]
        return torch.stack(parts).sum()

    def matvec(self, vectors: Tensor) -> Tensor:
        """Return ``X V``."""
        if self._kept is not None:
            return self._kept.flatten(0, 1) @ vectors
        columns = []
        for vector in vectors.unbind(1):
            parts = [self.amplitude.pushed(self.configurations[c], vector) for c in self.slices]
            values = torch.cat(parts)
            centred = values - (self.shares * values).sum(0)
            columns.append((self.roots * centred).reshape(-1))
        return torch.stack(columns, 1)

    def rmatvec(self, weights: Tensor) -> Tensor:
        """Return ``Xᵀ W``."""
        if self._kept is not None:
            return self._kept.flatten(0, 1).T @ weights
        columns = []
        for vector in weights.unbind(1):
            scaled = self.roots * vector.view(self.samples, self.directions)
            # The mean row is taken off by weights, so that nothing large cancels.
            columns.append(self._pulled(scaled - self.shares * scaled.sum(0)))
        return torch.stack(columns, 1)

    def per_sample_gradients(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return rows as matrices ``(n, K, 1, 1, P)``."""
        chosen = slice(start, self.samples if stop is None else stop)
        return self.layout.matrix(self._chunk(chosen).unflatten(0, (-1, self.directions)))

    def combined(self, weights: Tensor) -> LayerJacobian:
        """Combine rows of the same sample, all of them formed."""
        return self._formed().combined(weights)

    def parted(self, samples: int) -> LayerJacobian:
        """Return the rows of one sample as those of several."""
        return self._formed().parted(samples)

    def kronecker_factors(
        self,
        weight_sharing: WeightSharing = "expand",
        max_factor_size: int | None = None,
        continued: bool = False,
    ) -> KroneckerSums:
        """Return the factors of the rows, all of them formed."""
        return self._formed().kronecker_factors(weight_sharing, max_factor_size, continued)

    def _formed(self) -> DenseJacobian:
        return DenseJacobian(self.layout, self.to_dense().unflatten(0, (-1, self.directions)))

    def _chunk(self, chosen: slice) -> Tensor:
        """Return the rows of some configurations, ``(n·K, P)``."""
        if self._kept is not None:
            return self._kept[chosen].flatten(0, 1)
        rows = self.amplitude.rows(self.configurations[chosen])
        return rows.sub_(self.mean).mul_(self.roots[chosen].unsqueeze(2)).flatten(0, 1)

    def _pulled(self, weights: Tensor) -> Tensor:
        total = self.amplitude.layout.zeros(self.layout.numel)
        for chosen in self.slices:
            total += self.amplitude.pulled(self.configurations[chosen], weights[chosen])
        return total
