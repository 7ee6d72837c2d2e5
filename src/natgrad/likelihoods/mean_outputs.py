"""Likelihoods whose outputs are the means of their targets: probabilities and rates."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from natgrad.likelihoods.base import FOREIGN, Likelihood, full_precision
from natgrad.likelihoods.elementwise import Elementwise, plausible_scale


class MeanOutputs(Elementwise):
    """A likelihood of every output by itself, which is the mean of its target."""

    #: What outputs are, as decisions say it, and what is said of others.
    outputs: ClassVar[str]
    fault: ClassVar[str]

    @abstractmethod
    def _is_mean(self, output: Tensor) -> Tensor:
        """Return which outputs can be means."""

    @abstractmethod
    def _sure_scale(self, output: Tensor, cotangent: Tensor) -> float | None:
        """Return the scale that a gradient surely has; None if it shows none."""

    @property
    def decision(self) -> Any:
        """What outputs are, and what the losses of a sample's are reduced to."""
        return self.outputs, self.reduce_outputs

    def decided(self, decision: Any) -> Likelihood:
        """Return the likelihood with a :attr:`decision` that was made before."""
        return super().decided(decision[1]) if isinstance(decision, (tuple, list)) else self

    @full_precision
    def seen_with(
        self, output: Tensor, cotangent: Tensor, target: Any = None
    ) -> tuple[Likelihood, list[str]]:
        """Decide on the reduction, and say so if outputs are no such means; see the base class."""
        if not bool(self._is_mean(output).all()):
            return self, [FOREIGN.format(fault=self.fault, name=self)]
        return super().seen_with(output, cotangent, target)

    def _tells_average(self, output: Tensor, cotangent: Tensor, target: Any) -> bool | None:
        if target is not None:
            return super()._tells_average(output, cotangent, target)
        scale = self._sure_scale(output, cotangent)
        if scale is None:
            return None
        averaged, summed = scale * output.numel(), scale * len(output)
        return plausible_scale(averaged, len(output)) < plausible_scale(summed, len(output))
