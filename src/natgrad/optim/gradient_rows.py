"""The rows whose sum is the present gradient, for layers where they are cheaper than it."""

from __future__ import annotations

import functools
from collections.abc import Collection

import torch
from torch import Tensor, nn

from natgrad.jacobians import LayerJacobian, LinearJacobian
from natgrad.jacobians.layer import at_least_float32
from natgrad.layouts import BlockLayout
from natgrad.optim.observer import Observer

__all__ = ["GradientRows", "gradient_along_probe", "rows_along_probe"]

#: Largest relative difference between ``.grad`` and ``δᵀa`` that counts as rounding.
ROW_TOLERANCE = 2e-5

#: Steps without an attempt at the rows of the gradient, after it turned out not to be their sum.
ROW_REST = 50


class GradientRows:
    """Finds the rows of the present gradient where preconditioning these costs less.

    Args:
        observer: Sees the passes of the step.

    Attributes:
        layers: Layers whose rows may be cheaper than their gradient, by block name.
    """

    def __init__(self, observer: Observer) -> None:
        self.observer = observer
        self.layers: dict[str, nn.Module] = {}
        self._rest = 0

    def find_layers(self) -> None:
        """Take the layers of the model as it is now."""
        takes_rows, capture = self.observer.curvature.structure.takes_rows, self.observer.capture
        self.layers = {
            name: block.uses[0].module
            for name, block in capture.blocks.items()
            if len(block.uses) == 1
            and capture.sources.are_of_layers(name)
            and takes_rows(block.layout, 8)
        }

    def watch(self, others: Collection[str]) -> None:
        """Have the gradients of the layers recorded at every step, and those of a probe.

        Args:
            others: Blocks whose ``.grad`` is something else than the sum of their rows.
        """
        observer, capture = self.observer, self.observer.capture
        observer.row_modules = frozenset(self.layers.values())
        sizes = {
            name: block.layout.numel
            for name, block in capture.blocks.items()
            if len(block.uses) == 1
            and block.layout.d_in > 0
            and type(block.uses[0].module) is nn.Linear
            and capture.sources.are_of_layers(name)
            and name not in others
        }
        observer.probe_layer = min(sizes, key=lambda name: sizes[name]) if sizes else None

    def rest(self) -> None:
        """Try no rows for some steps: they did not sum to the gradient."""
        if self.layers:
            self._rest = ROW_REST

    def of_step(
        self, gradients: dict[str, Tensor]
    ) -> tuple[dict[str, LayerJacobian] | None, list[Tensor]]:
        """Return rows of the present gradient where they are cheaper, and whether they are wrong.

        Whether ``.grad`` is (a multiple of) ``δᵀa`` is checked with a random vector, so penalties
        in the loss, gradient hooks, accumulation over batches or averaging over replicas are never
        lost: they are flagged, and :meth:`rest` leaves rows alone for a while.
        """
        observer = self.observer
        self._rest = max(0, self._rest - 1)
        one_pass = len(observer.seen) == 1 and observer.replicas.are_alone
        if not self.layers or self._rest or not one_pass:
            return None, []
        jacobians = observer.capture.user_jacobians(observer.seen[0].recorded, separate=False)
        kept: dict[str, LayerJacobian] = {}
        mismatches: list[Tensor] = []
        for name in list(self.layers):
            rows = jacobians.get(name)
            if not isinstance(rows, LinearJacobian):
                continue
            count = rows.samples * rows.positions
            if not observer.curvature.structure.takes_rows(rows.layout, count):
                del self.layers[name]  # Batches are larger than the layer.
                observer.row_modules = frozenset(self.layers.values())
                continue
            share, mismatch = _compare(rows, gradients)
            rows.output_gradients = rows.output_gradients * share
            kept[rows.layout.names[0]] = rows
            mismatches.append(mismatch)
        return kept, mismatches


@functools.lru_cache(maxsize=64)
def _probe(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a fixed random vector."""
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, generator=generator, dtype=dtype).to(device)


def rows_along_probe(rows: LinearJacobian) -> Tensor:
    """Return the product of ``δᵀa``, bias included, with a fixed random vector, ``(d_out,)``."""
    inputs = rows.inputs.flatten(0, 2)
    delta = rows.output_gradients.flatten(0, 3)
    expected = delta.T @ (inputs @ _probe(rows.layout.d_in, inputs.dtype, inputs.device))
    return expected + rows.bias_value * delta.sum(0) if rows.layout.has_bias else expected


def gradient_along_probe(layout: BlockLayout, gradients: dict[str, Tensor]) -> Tensor:
    """Return the product of ``.grad``, bias included, with the same vector."""
    weight = at_least_float32(gradients[layout.names[0]]).reshape(layout.d_out, layout.d_in)
    found = weight @ _probe(layout.d_in, weight.dtype, weight.device)
    return found + gradients[layout.names[1]] if layout.has_bias else found


def _compare(rows: LinearJacobian, gradients: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the scalar c with ``.grad ≈ c·δᵀa``, and whether more than rounding is left."""
    expected, found = rows_along_probe(rows), gradient_along_probe(rows.layout, gradients)
    share = (found * expected).sum() / expected.square().sum()
    error = (found - share * expected).norm() / found.norm()
    share = torch.where((share - 1.0).abs() > ROW_TOLERANCE, share, torch.ones_like(share))
    return share, ~(error <= ROW_TOLERANCE)
