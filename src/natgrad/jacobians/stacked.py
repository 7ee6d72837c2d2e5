"""Rows of a stack of matrices, each with inputs of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from natgrad.jacobians.layer import WeightSharing
from natgrad.jacobians.linear import LinearJacobian, deviations_of
from natgrad.layouts import BlockLayout


class StackedJacobian(LinearJacobian):
    """Rows of linear maps of which each sees a number of positions of its own, as experts do.

    Positions are padded with zeros to the largest number.

    Args:
        layout: The block's layout, one group per map.
        inputs: ``(N, T, G, d_in)``, zero where a map has no position.
        output_gradients: ``δ``, ``(N, K, T, G, d_out)``, likewise.
        filled: Which positions a map has, ``(N, T, G)`` of 0 and 1.
        partial: As for :class:`LinearJacobian`.
    """

    def __init__(
        self,
        layout: BlockLayout,
        inputs: Tensor,
        output_gradients: Tensor,
        filled: Tensor,
        *,
        partial: Tensor | None = None,
    ) -> None:
        super().__init__(layout, inputs, output_gradients, partial=partial)
        self.filled = filled

    @classmethod
    def of_matrices(
        cls,
        layout: BlockLayout,
        pieces: Mapping[int, Sequence[tuple[Tensor, Tensor]]],
        *,
        partial: Tensor | None = None,
    ) -> StackedJacobian:
        """Lay the positions of every map, one group each, side by side.

        Groups come with inputs ``(N, t, d_in)`` and output gradients ``(N, K, t, d_out)``.
        """
        lengths = {group: sum(a.shape[1] for a, _ in of) for group, of in pieces.items()}
        a, d = next(iter(pieces.values()))[0]
        samples, directions, positions = len(a), d.shape[1], max(lengths.values())
        inputs = a.new_zeros(samples, positions, layout.groups, layout.d_in)
        gradients = d.new_zeros(samples, directions, positions, layout.groups, layout.d_out)
        filled = d.new_zeros(samples, positions, layout.groups)
        for group, of in pieces.items():
            inputs[:, : lengths[group], group] = torch.cat([a for a, _ in of], 1)
            gradients[:, :, : lengths[group], group] = torch.cat([d for _, d in of], 2)
            filled[:, : lengths[group], group] = 1
        return cls(layout, inputs, gradients, filled, partial=partial)

    def over_samples(self) -> None:
        """Return None: which positions a map has is for each process to know."""
        return None

    def state(self) -> dict[str, Tensor]:
        """Return ``a``, ``δ`` and which positions a map has."""
        return {**super().state(), "filled": self.filled}

    def _share_inputs(self, samples: int) -> None:
        super()._share_inputs(samples)
        self.filled = self.filled.expand(samples, *self.filled.shape[1:])

    def _take_inputs(self, positions: Tensor, drawn: object) -> None:
        super()._take_inputs(positions, drawn)
        self.filled = self.filled[:, positions]

    def _take_samples(self, samples: Tensor) -> None:
        super()._take_samples(samples)
        self.filled = self.filled[samples]

    def input_factor(
        self, weight_sharing: WeightSharing = "expand", max_factor_size: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return ``Σ a aᵀ`` per map, or its diagonal, and how many terms it sums, ``(G,)``."""
        counted = self._counted()
        inputs = self.inputs * counted.unsqueeze(-1)
        if weight_sharing == "reduce" and self.positions > 1:
            inputs, numbers = self._map_means(counted)
            counted = (numbers > 0).to(self.dtype)
        a = inputs.permute(2, 0, 1, 3).flatten(1, 2)  # (G, N·T, d_in)
        diagonal = self.layout.large_factors(max_factor_size)[0]
        return a.square().sum(1) if diagonal else a.mT @ a, counted.sum((0, 1))

    def _counted(self) -> Tensor:
        """Return which positions of every map count, ``(N, T, G)`` of 0 and 1."""
        counted = self.filled.to(self.dtype)
        if self.partial is not None:
            silent = (self.output_gradients == 0).all(-1).all(1)
            counted = counted * ~(silent & self.partial[:, None, None])
        return counted

    def _map_means(self, counted: Tensor) -> tuple[Tensor, Tensor]:
        """Return every map's mean input ``(N, 1, G, d_in)``, and of how many, ``(N, 1, G)``."""
        numbers = counted.sum(1, keepdim=True)
        total = (self.inputs * counted.unsqueeze(-1)).sum(1, keepdim=True)
        return total / numbers.clamp(min=1.0).unsqueeze(-1), numbers

    def split(
        self, positions: Tensor | None = None, drawn: object = None
    ) -> tuple[LinearJacobian, LinearJacobian]:
        """Return the rows as those of every map's means and of deviations."""
        counted, total = self._counted(), self.output_gradients.sum(2, keepdim=True)
        mean, numbers = self._map_means(counted)
        rest = self if positions is None else self.subsampled(positions, drawn)
        scale = (self.positions / rest.positions) ** 0.5
        gradients = deviations_of(
            rest.output_gradients, total * scale, numbers[:, None, :, :, None]
        )
        few = (counted if positions is None else counted[:, positions]).unsqueeze(-1)
        inputs, gradients = (rest.inputs - mean) * few, gradients * few.unsqueeze(1)
        means = StackedJacobian(self.layout, mean, total, (numbers > 0).to(self.dtype))
        return means, StackedJacobian(self.layout, inputs, gradients, few[..., 0])
