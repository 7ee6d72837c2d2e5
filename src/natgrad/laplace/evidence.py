r"""The evidence of the data as a differentiable function of prior precisions and noise.

With temperature T, noise r times that of the losses, and prior precisions :math:`\delta_l` of
layers with :math:`P_l` parameters,

.. math:: \log p(D) \approx \frac{1}{T} \log p_r(D \mid \theta^*) + \frac12 \Big[
          \sum_l \left(P_l \log \delta_l - \delta_l \|\theta^*_l - \mu_l\|^2\right)
          - \log\det\Big(\frac{N}{T r} F + \mathrm{diag}(\delta)\Big)\Big].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from natgrad import linalg
from natgrad.laplace.observations import Observations
from natgrad.layouts import BlockLayout
from natgrad.operators import FisherMatrix

__all__ = ["Evidence"]


@dataclass(frozen=True)
class Evidence:
    """The evidence at trained parameters; what it needs of F is decomposed once.

    Attributes:
        matrix: F.
        blocks: Layer → how its parameters are laid out.
        observations: What the data say.
        deviations: ``θ* − μ``, ``(P,)``.
        temperature: T.
        noise: Variance of Gaussian noise that F is for, in units of that of the losses.
    """

    matrix: FisherMatrix
    blocks: dict[str, BlockLayout]
    observations: Observations
    deviations: Tensor
    temperature: float
    noise: float

    def value(self, precision: Any, noise: Any) -> Tensor:
        """Return the evidence, a float64 scalar on the CPU.

        Args:
            precision: δ: a number or tensor, or a mapping from layers to such.
            noise: Variance of Gaussian noise in units of that of the losses; likewise.

        Raises:
            ValueError: If the precision of the posterior is not positive definite there.
        """
        deltas = {
            name: torch.as_tensor(
                precision[name] if isinstance(precision, Mapping) else precision,
                dtype=torch.float64,
            ).cpu()
            for name in self.blocks
        }
        noise = torch.as_tensor(noise, dtype=torch.float64).cpu()
        scale = self.observations.count * self.noise / (self.temperature * noise)
        logdet = self._logdet(deltas, scale, shared=not isinstance(precision, Mapping))
        if not bool(torch.isfinite(logdet)):
            raise ValueError(
                f"the precision of the posterior with prior precision {precision} is not positive "
                "definite, as this structure of the Fisher matrix is not: take a larger one"
            )
        prior = torch.stack(
            [
                block.numel * deltas[name].log() - deltas[name] * self.distances[name]
                for name, block in self.blocks.items()
            ]
        ).sum()
        fit = self.observations.log_likelihood(noise) / self.temperature
        found: Tensor = fit + 0.5 * (prior - logdet)
        return found

    @cached_property
    def distances(self) -> dict[str, float]:
        """Layer → ``‖θ* − μ‖²``."""
        column = self.deviations.unsqueeze(1)
        gather = self.matrix.layout.gather
        return {n: float(gather(b, column).square().sum()) for n, b in self.blocks.items()}

    @cached_property
    def spectra(self) -> dict[str, Tensor]:
        """Part → eigenvalues."""
        found = {}
        for name, part in self.matrix.parts.items():
            values = part.eigenvalues()
            rounded = torch.where(values.abs() <= linalg.rounding(values), 0.0, values)
            found[name] = rounded.double().cpu()
        return found

    def _logdet(self, deltas: dict[str, Tensor], scale: Tensor, shared: bool) -> Tensor:
        """Return ``log det(scale F + diag(δ))``."""
        total = torch.zeros((), dtype=torch.float64)
        for name, layers in self.matrix.members.items():
            if shared or len(layers) == 1:
                total = total + (scale * self.spectra[name] + deltas[layers[0]]).log().sum()
            else:
                found = scale * self._dense[name] + torch.diag(self._spread(name, deltas))
                sign, logabsdet = torch.linalg.slogdet(found)
                total = total + torch.where(sign > 0, logabsdet, math.nan)
        return total

    @cached_property
    def _dense(self) -> dict[str, Tensor]:
        """Part → its matrix, for parts of several layers."""
        size = max(part.shape[0] for part in self.matrix.parts.values())
        linalg.check_memory(size, 2, torch.float64, torch.device("cpu"))
        return {
            name: part.to_dense().double().cpu()
            for name, part in self.matrix.parts.items()
            if len(self.matrix.members[name]) > 1
        }

    def _spread(self, name: str, deltas: dict[str, Tensor]) -> Tensor:
        """Return δ of every parameter of a part."""
        layout = self.matrix.parts[name].layout
        of = {n: deltas[layer] for layer, block in self.blocks.items() for n in block.names}
        pieces = zip(layout.names, layout.sizes, strict=True)
        return torch.cat([of[n].expand(size) for n, size in pieces])

    def maximize(
        self,
        precision: dict[str, float],
        noise: float,
        bounds: tuple[float, float],
        with_noise: bool,
    ) -> tuple[dict[str, float], float]:
        """Return the precisions, and the noise, of highest evidence near some first ones.

        Args:
            precision: Those to begin with: of each layer, or of all under the name ``""``.
            noise: Likewise.
            bounds: Smallest and largest precision.
            with_noise: Whether noise may change.
        """
        names, bounded = list(precision), _Bounded(math.log(bounds[0]), math.log(bounds[1]))
        start = [bounded.inverse(math.log(precision[name])) for name in names]
        variables = torch.tensor([*start, math.log(noise)], dtype=torch.float64)
        variables.requires_grad_(True)

        def evidence() -> Tensor:
            deltas = bounded(variables[:-1]).exp()
            present = variables[-1].exp() if with_noise else noise
            if names == [""]:
                return self.value(deltas[0], present)
            return self.value(dict(zip(names, deltas, strict=True)), present)

        _ascend(evidence, variables)
        found = bounded(variables.detach()[:-1]).exp().tolist()
        return dict(zip(names, found, strict=True)), float(variables.detach()[-1].exp())


@dataclass(frozen=True)
class _Bounded:
    """A smooth map of all numbers to an interval, which begins as it ends: by a sigmoid."""

    lowest: float
    highest: float

    def __call__(self, variables: Tensor) -> Tensor:
        return self.lowest + (self.highest - self.lowest) * torch.sigmoid(variables)

    def inverse(self, value: float) -> float:
        share = (value - self.lowest) / (self.highest - self.lowest)
        share = min(max(share, 1e-3), 1 - 1e-3)  # At the ends there is no slope to follow.
        return math.log(share / (1 - share))


def _ascend(function: Callable[[], Tensor], variables: Tensor) -> None:
    """Move variables to a maximum of a function of theirs."""
    search = torch.optim.LBFGS([variables], max_iter=500, line_search_fn="strong_wolfe",
                               tolerance_grad=1e-9, tolerance_change=1e-14)  # fmt: skip

    def closure() -> float:
        search.zero_grad()
        loss = -function()
        loss.backward()
        return float(loss.detach())

    search.step(closure)
