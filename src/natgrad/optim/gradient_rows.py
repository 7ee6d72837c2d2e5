"""The present gradient held against rows: whether it is their sum, and by which factor."""

from __future__ import annotations

import functools
from collections.abc import Collection

import torch
from torch import Tensor, nn

from natgrad.distributed.shards import whole
from natgrad.jacobians import LayerJacobian, LinearJacobian
from natgrad.jacobians.layer import at_least_float32
from natgrad.layouts import BlockLayout
from natgrad.optim.observer import Observer

#: Largest relative difference between ``.grad`` and ``δᵀa`` that counts as rounding, and what terms
#: that cancel add to it, as a multiple of their sizes and of their type's ε.
ROW_TOLERANCE, CANCELLED = 2e-5, 4.0

#: Steps without an attempt at the rows of the gradient, after it turned out not to be their sum.
ROW_REST = 50

#: What stands for no bound.
UNBOUNDED = 1e300


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

        Those of others are something else than the sum of their rows.
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
        if self._rest or not one_pass or observer.seen[0].is_empty:
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


def _rows_along_probe(rows: LinearJacobian) -> Tensor:
    """Return the product of ``δᵀa``, bias included, with a fixed random vector, ``(d_out,)``."""
    inputs = rows.inputs.flatten(0, 2)
    delta = rows.output_gradients.flatten(0, 3)
    expected = delta.T @ (inputs @ _probe(rows.layout.d_in, inputs.dtype, inputs.device))
    return expected + rows.bias_value * delta.sum(0) if rows.layout.has_bias else expected


def _sizes_along_probe(rows: LinearJacobian) -> Tensor:
    """Return how large the terms of that product are, ``(d_out,)``."""
    sizes: Tensor = rows.inputs.flatten(0, 2).norm(dim=1)
    if rows.layout.has_bias:
        sizes = sizes + abs(rows.bias_value)
    return rows.output_gradients.flatten(0, 3).abs().T @ sizes


def _gradient_along_probe(layout: BlockLayout, gradients: dict[str, Tensor]) -> Tensor:
    """Return the product of ``.grad``, bias included, with the same vector."""
    weight = at_least_float32(gradients[layout.names[0]]).reshape(layout.d_out, layout.d_in)
    found = weight @ _probe(layout.d_in, weight.dtype, weight.device)
    return found + gradients[layout.names[1]] if layout.has_bias else found


def _compare(rows: LinearJacobian, gradients: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the scalar c with ``.grad ≈ c·δᵀa``, and whether more than rounding is left."""
    expected, found = _rows_along_probe(rows), _gradient_along_probe(rows.layout, gradients)
    share = (found * expected).sum() / expected.square().sum()
    # Rows that sum to zero, as behind a weight that starts at zero, have no multiple to tell.
    differs = (expected != 0).any() & ~((share - 1.0).abs() <= ROW_TOLERANCE)
    share = torch.where(differs, share, torch.ones_like(share))
    cancelled = CANCELLED * torch.finfo(expected.dtype).eps * share.abs()
    rounding = ROW_TOLERANCE * found.norm() + cancelled * _sizes_along_probe(rows).norm()
    return share, ~((found - share * expected).norm() <= rounding)


def batch_scale(observer: Observer, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the factor c from the batch's Fisher matrix F to the curvature of the loss, "scale".

    With it comes a bound of ``⟨Δ, ∇L⟩²/ΔᵀFΔ`` over all Δ, "largest", by the gradients at the output
    (:meth:`natgrad.likelihoods.Likelihood.largest_decrement`), and how many events count, "count";
    without rows of the batch all are 0.

    It is the scale of the user's loss, summed over passes that accumulate, times what the
    gradients were multiplied by since: the inverse of a loss scaler, or what clipping left.
    Where no pass shows another scale than that of a mean it is 1, as a squared error, say,
    shows none; the gradient of a cross-entropy does, so that means were added there.

    Args:
        observer: Has seen the passes of the step.
        gradients: Parameter name → gradient.
    """
    factor, explained = _factor_since(observer, gradients)
    scales = [one.scale * one.count for one in observer.seen if not one.is_empty]
    scale = torch.zeros_like(factor)
    if observer.batch_fisher is not None and scales:
        each = torch.stack([one.double() for one in scales])
        usual = (each - 1.0).abs().max() < 1e-4
        scale = each.sum() * factor
        scale = torch.where((scale - 1.0).abs() < 1e-4, 1.0, scale)  # But for rounding it is 1.
        total = float(len(each)) if observer.likelihood.shows_scale else 1.0
        scale = torch.where(usual, total, scale)
    largest, count = _largest_decrement(observer, factor.device)
    largest = torch.where(explained, largest * factor.square(), UNBOUNDED)
    measures = {"scale": scale, "largest": largest}
    observer.replicas.average(measures)
    return {**measures, "count": count}


def _largest_decrement(observer: Observer, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the bound of all passes, with gradients at the output of a mean's size, and N."""
    squares, counts = [], []
    for one in observer.seen:
        output, cotangent = one.recorded.output, one.recorded.cotangent
        foreign = observer.fisher.from_user_gradients  # Of another Fisher matrix.
        if foreign or one.is_empty or output is None or cotangent is None:
            continue
        likelihood = observer.likelihood.of_shapes(one.recorded.heads)
        seen = output.detach(), cotangent, one.weights, one.scale
        squares.append(likelihood.largest_decrement(*seen))
        counts.append(one.count.double())
    zero = torch.zeros((), dtype=torch.float64, device=device)
    own = {"square": torch.stack([zero, *squares]).sum()}
    own["count"] = torch.stack([zero, *counts]).sum()
    observer.replicas.average(own)
    total = (own["square"] * own["count"]).nan_to_num(nan=UNBOUNDED, posinf=UNBOUNDED)
    largest = torch.where(total > 0, total, UNBOUNDED).clamp(max=UNBOUNDED)
    return largest, own["count"] * observer.replicas.number


def _factor_since(observer: Observer, gradients: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return what gradients were multiplied by since the backward passes; 1 if unknown.

    With it comes whether that is all they are, and no other term of the loss adds to them.
    """
    name, layout = observer.probe_layer, observer.curvature.layout
    unknown = torch.ones((), dtype=torch.float64, device=layout.device)
    if name is None:
        return unknown, unknown > 0
    block = observer.capture.blocks[name].layout
    expected, found = torch.zeros(block.d_out, dtype=layout.dtype, device=layout.device), None
    some = not observer.replicas.are_alone
    if gradients.keys() >= set(block.names):
        found = _gradient_along_probe(block, {n: whole(gradients[n]) for n in block.names})
        for one in observer.seen:
            rows = None
            if not one.is_empty:
                rows = observer.capture.user_jacobians(one.recorded, separate=False).get(name)
            if isinstance(rows, LinearJacobian):
                expected, some = expected + _rows_along_probe(rows), True
    observer.replicas.average({"expected": expected})  # As .grad is.
    if found is None or not some:
        return unknown, unknown > 0
    factor = (found * expected).sum().double() / expected.square().sum()
    known = factor.isfinite() & (factor > 0)
    explained = (found - factor * expected).norm() <= 0.1 * found.norm()
    # Behind a weight that starts at zero both are zero, and nothing else adds to them either.
    nothing = ~(found.any() | expected.any())
    return torch.where(known, factor, 1.0), known & explained | nothing
