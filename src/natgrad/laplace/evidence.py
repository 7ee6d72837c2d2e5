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
from natgrad.capture.evaluation import refuse_inference_mode
from natgrad.laplace.observations import Observations
from natgrad.operators import Operator


@dataclass(frozen=True)
class Evidence:
    """The evidence at trained parameters; what it needs of F is decomposed once.

    Attributes:
        layers: Names of the layers.
        parts: Part → its uncertain entries of F.
        owners: Part → number of the layer that every uncertain entry belongs to.
        deviations: Part → ``θ* − μ`` of these entries.
        observations: What the data say.
        temperature: T.
        noise: Variance of Gaussian noise that F is for, in units of that of the losses.
    """

    layers: tuple[str, ...]
    parts: dict[str, Operator]
    owners: dict[str, Tensor]
    deviations: dict[str, Tensor]
    observations: Observations
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
        each = [precision[n] if isinstance(precision, Mapping) else precision for n in self.layers]
        deltas = torch.stack([torch.as_tensor(one, dtype=torch.float64).cpu() for one in each])
        noise = torch.as_tensor(noise, dtype=torch.float64).cpu()
        scale = self.observations.count * self.noise / (self.temperature * noise)
        logdet = self._logdet(deltas, scale, shared=not isinstance(precision, Mapping))
        if not bool(torch.isfinite(logdet)):
            raise ValueError(
                f"the precision of the posterior with prior precision {precision} is not positive "
                "definite, as this structure of the Fisher matrix is not: take a larger one"
            )
        prior = (self._sizes * deltas.log() - self._distances * deltas).sum()
        fit = self.observations.log_likelihood(noise) / self.temperature
        found: Tensor = fit + 0.5 * (prior - logdet)
        return found

    @cached_property
    def _sizes(self) -> Tensor:
        """Numbers of uncertain entries of the layers."""
        return self._summed({name: torch.ones_like(d) for name, d in self.deviations.items()})

    @cached_property
    def _distances(self) -> Tensor:
        """``‖θ* − μ‖²`` of the layers."""
        return self._summed({name: d.square() for name, d in self.deviations.items()})

    def _summed(self, values: dict[str, Tensor]) -> Tensor:
        """Return the sums over the entries of each layer, float64."""
        total = torch.zeros(len(self.layers), dtype=torch.float64)
        for name, one in values.items():
            total.index_add_(0, self.owners[name].cpu(), one.double().cpu())
        return total

    @cached_property
    def _spectra(self) -> dict[str, Tensor]:
        """Part → eigenvalues."""
        found = {}
        for name, part in self.parts.items():
            values = part.eigenvalues()
            rounded = torch.where(values.abs() <= linalg.rounding(values), 0.0, values)
            found[name] = rounded.double().cpu()
        return found

    def _logdet(self, deltas: Tensor, scale: Tensor, shared: bool) -> Tensor:
        """Return ``log det(scale F + diag(δ))``."""
        total = torch.zeros((), dtype=torch.float64)
        for name, owners in self.owners.items():
            if shared or name not in self._dense:
                total = total + (scale * self._spectra[name] + deltas[owners[0]]).log().sum()
            else:
                found = scale * self._dense[name] + torch.diag(deltas[owners.cpu()])
                sign, logabsdet = torch.linalg.slogdet(found)
                total = total + torch.where(sign > 0, logabsdet, math.nan)
        return total

    @cached_property
    def _dense(self) -> dict[str, Tensor]:
        """Part → its matrix, for parts of several layers."""
        joint = [name for name, owners in self.owners.items() if len(owners.unique()) > 1]
        for name in joint:
            linalg.check_memory(len(self.owners[name]), 2, torch.float64, torch.device("cpu"))
        return {name: self.parts[name].to_dense().double().cpu() for name in joint}

    def maximize(
        self,
        precision: dict[str, float],
        noise: float,
        bounds: tuple[float, float],
        with_noise: bool,
    ) -> tuple[dict[str, float], float]:
        """Return the precisions, and the noise, of highest evidence near some first ones.

        The first precisions are those of each layer, or of all under the name ``""``; all stay
        within the bounds. The noise changes only ``with_noise``.
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

        ascend(evidence, variables)
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


def ascend(function: Callable[[], Tensor], variables: Tensor) -> None:
    """Move variables to a maximum of a function of theirs; an error in inference mode."""
    refuse_inference_mode()
    search = torch.optim.LBFGS([variables], max_iter=500, line_search_fn="strong_wolfe",
                               tolerance_grad=1e-9, tolerance_change=1e-14)  # fmt: skip

    @torch.enable_grad()
    def closure() -> float:
        search.zero_grad()
        loss = -function()
        loss.backward()
        return float(loss.detach())

    search.step(closure)
