"""From the batch's Fisher matrix to the curvature of the loss: by which factor they differ."""

from __future__ import annotations

import torch
from torch import Tensor

from natgrad.distributed.shards import whole
from natgrad.jacobians import LinearJacobian
from natgrad.likelihoods import Categorical
from natgrad.optim.gradient_rows import gradient_along_probe, rows_along_probe
from natgrad.optim.observer import Observer

__all__ = ["batch_scale"]

#: What stands for no bound.
UNBOUNDED = 1e300


def batch_scale(observer: Observer, gradients: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the factor c from the batch's Fisher matrix F to the curvature of the loss.

    With it comes a bound of ``⟨Δ, ∇L⟩²/ΔᵀFΔ`` over all Δ, by the inequality of Cauchy and
    Schwarz the squared gradient at the output in the metric of its Hessian; without rows of
    the batch both are 0.

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
        shown = isinstance(observer.likelihood, Categorical)
        scale = torch.where(usual, float(len(each)) if shown else 1.0, scale)
    largest = _largest_decrement(observer, factor.device) * factor.square()
    measures = {"scale": scale, "largest": torch.where(explained, largest, UNBOUNDED)}
    observer.replicas.average(measures)
    return measures["scale"], measures["largest"]


def _largest_decrement(observer: Observer, device: torch.device) -> Tensor:
    """Return ``N Σ_n u_nᵀΛ⁻¹u_n`` with the gradients u at the output, of a mean's size."""
    squares, counts = [], []
    for one in observer.seen:
        output, cotangent = one.recorded.output, one.recorded.cotangent
        foreign = observer.fisher.from_user_gradients  # Of another Fisher matrix.
        if foreign or one.is_empty or output is None or cotangent is None:
            continue
        likelihood = observer.likelihood.of_shapes(one.recorded.heads)
        found = likelihood.root_inverse_apply(output.detach(), cotangent)
        squares.append(found.double().square().sum())
        counts.append(one.count.double())
    zero = torch.zeros((), dtype=torch.float64, device=device)
    own = {"square": torch.stack([zero, *squares]).sum()}
    own["count"] = torch.stack([zero, *counts]).sum()
    observer.replicas.average(own)
    total = (own["square"] * own["count"]).nan_to_num(nan=UNBOUNDED, posinf=UNBOUNDED)
    return torch.where(total > 0, total, UNBOUNDED).clamp(max=UNBOUNDED)


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
    if all(n in gradients for n in block.names):
        found = gradient_along_probe(block, {n: whole(gradients[n]) for n in block.names})
        for one in observer.seen:
            rows = None
            if not one.is_empty:
                rows = observer.capture.user_jacobians(one.recorded, separate=False).get(name)
            if isinstance(rows, LinearJacobian):
                expected, some = expected + rows_along_probe(rows), True
    observer.replicas.average({"expected": expected})  # As .grad is.
    if found is None or not some:
        return unknown, unknown > 0
    factor = (found * expected).sum().double() / expected.square().sum()
    known = factor.isfinite() & (factor > 0)
    explained = (found - factor * expected).norm() <= 0.1 * found.norm()
    return torch.where(known, factor, 1.0), known & explained
