"""The numbers a step depends on: measured on the device, brought to the host at once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from natgrad.curvature import Curvature
from natgrad.distributed.shards import own_shard, shard_count, whole
from natgrad.layouts import inner_product
from natgrad.linalg import constant
from natgrad.optim.step.plan import PreconditionedGroups, rate_of
from natgrad.optim.step.quadratic_model import (
    BatchFisher,
    QuadraticModel,
    fisher_gram,
    group_grams,
    quadratic_form,
    slopes,
)
from natgrad.statistics.rows import RowStatistics

if TYPE_CHECKING:
    from natgrad.optim.preconditioner import Preconditioner

#: How far two weights may move, in their norms, where no length is measured.
LARGEST_MOVE = 1.0

#: Values measured on the device for one step, by name.
Measures = dict[str, Any]


def measure(
    preconditioner: Preconditioner,
    grouped: PreconditionedGroups,
    directions: Sequence[dict[str, Tensor]],
    gradients: dict[str, Tensor],
    source: dict[str, Tensor],
    scale: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return what the size of a step depends on, on the device.

    Args:
        preconditioner: Where the natural gradient comes from.
        grouped: The parameters the step moves.
        directions: Δ and further directions.
        gradients: Parameter name → gradient of the loss.
        source: What Δ is the preconditioned form of.
        scale: What :func:`~natgrad.optim.gradient_rows.batch_scale` returned, where a length is
            measured.
    """
    natural = directions[0]
    if not natural:
        return {}
    batch, rule = preconditioner.observer.batch_fisher, grouped.rule
    inner = preconditioner.inner_product(natural, source)
    measures: dict[str, Tensor] = {"inner": inner}
    if rule.uses_model and preconditioner.observer.keeps_batch_fisher:
        measures["slopes"] = slopes(directions, gradients)
        measures["fisher"] = fisher_gram(batch, directions, grouped.replicas)
    elif rule.measured is not None and len(directions) > 1:
        measures["along"] = preconditioner.inner_product(directions[1], source)
    if scale is not None:
        measures.update(scale)
        measures["square"] = squared_gradient(preconditioner, gradients)
        gram = fisher_gram(batch, directions, grouped.replicas)
        measures["fisher"] = measures["scale"] * gram[0, 0]
        if len(directions) > 1:
            measures["across"] = measures["scale"] * gram[1, 1]
    if not rule.uses_model:
        directions = directions[:1]
    if not rule.uses_model and any(group["kl_clip"] is not None for group in grouped.groups):
        curvature = preconditioner.curvature
        if rule.graft is None and not _is_summed(curvature):
            measures["quadratic"] = curvature.quadratic(natural, inner)
        else:
            column = curvature.layout.to_column({n: whole(value) for n, value in natural.items()})
            measures["quadratic"] = (column * curvature.matrix().multiply(column)).sum()
    bounded = rule.measured is not None or _bounds_changes(grouped)
    # Every group's weights: biases and the like are vectors.
    weights = [
        [n for n in names if n in natural and natural[n].dim() > 1]
        for names in (grouped.group_names if bounded else ())
    ]
    if any(weights):
        held: dict[str, Tensor] = {name: grouped.parameters[name] for name in natural}
        if grouped.replicas.are_alone:  # In tensor parallelism nobody averages shards.
            held = {name: whole(parameter) for name, parameter in held.items()}
        measures["weights"] = _squares(held, weights)
        measures["steps"] = _squares(natural, weights)
    if "fisher" in measures or rule.norm_clip is not None:
        measures["grams"] = group_grams(directions, grouped.group_names)
    grouped.replicas.average(measures)
    if any(weights):
        squares = measures.pop("steps"), measures.pop("weights")
        measures["changes"] = _largest_changes(natural, weights, *squares)
    return measures


def squared_gradient(preconditioner: Preconditioner, gradients: dict[str, Tensor]) -> Tensor:
    """Return ``‖∇L‖²``; 0 where ``.grad`` holds something else. Its mean is over processes."""
    if preconditioner.own_backward or not gradients:
        return torch.zeros((), dtype=torch.float64, device=preconditioner.device)
    return inner_product(gradients, gradients)


def _is_summed(curvature: Curvature) -> bool:
    """Return whether the rows of the whole model came as their sum, being many.

    Their quadratic form is then exact as well, and a step's bound the same for any number of rows.
    """
    if len(curvature.parts) > 1 or (curvature.shared is not None and curvature.shared.is_spread):
        return False
    averages = [present.average for present in curvature.estimates.values()]
    return any(isinstance(a, RowStatistics) and a.moment is not None for a in averages)


def _bounds_changes(grouped: PreconditionedGroups) -> bool:
    """Return whether weights bound a step at a learning rate, where curvature is to do so.

    Where outputs saturate it vanishes, and with it that bound: ``Δ`` is then ``∇L/λ``.
    """
    rule = grouped.rule
    plain = not rule.keeps_steps and rule.graft is None
    return plain and any(group["kl_clip"] is not None for group in grouped.groups)


def second_largest_change(measures: Measures, rates: Sequence[float]) -> float:
    """Return the second largest ``η‖Δ_W‖/‖W‖`` of all weights W, 0 where none was measured.

    Args:
        measures: What was measured of the directions.
        rates: η of every group.
    """
    pairs = zip(rates, measures.get("changes", ()), strict=False)
    changes = sorted(rate * change for rate, pair in pairs for change in pair)
    return changes[-2] if changes else 0.0


def _squares(parameters: Mapping[str, Tensor], weights: list[list[str]]) -> Tensor:
    """Return ``‖W‖²`` of all weights; see :func:`inner_product`."""
    chosen = [parameters[name] for names in weights for name in names]
    norms = torch.stack(torch._foreach_norm([own_shard(w) for w in chosen])).double()
    return norms.square() * constant([shard_count(w) for w in chosen], norms)


def _largest_changes(
    natural: dict[str, Tensor], weights: list[list[str]], steps: Tensor, squares: Tensor
) -> Tensor:
    """Return every group's two largest ``‖Δ_W‖/‖W‖``, ``(G, 2)``, of their squares.

    A weight counts as no smaller than layers of torch begin with, whose entries have the variance
    1/(3·inputs): those that begin at zero, as of LoRA, have to leave it.
    """
    chosen = [natural[name] for names in weights for name in names]
    least = constant([max(1, step.shape[0]) / 3 for step in chosen], squares)
    ratios = (steps / torch.maximum(squares, least)).sqrt().split([len(names) for names in weights])
    return torch.stack([torch.cat([one, one.new_zeros(2)]).topk(2).values for one in ratios])


def on_host(values: dict[str, Tensor]) -> Measures:
    """Return measures as floats and nested lists; the one place where a step waits for the device.

    Raises:
        ValueError: If there are none.
    """
    device = next((v.device for v in values.values() if v.device.type != "cpu"), None)
    flat = [
        value.detach().to(device, torch.float64, non_blocking=value.device.type == "cpu")
        for value in values.values()
    ]
    numbers: list[float] = torch.cat([value.reshape(-1) for value in flat]).tolist()
    result: Measures = {}
    for name, value in values.items():
        piece, numbers = numbers[: value.numel()], numbers[value.numel() :]
        result[name] = _nested(piece, value.shape) if value.dim() else piece[0]
    return result


def _nested(numbers: list[float], shape: Sequence[int]) -> Any:
    if len(shape) == 1:
        return numbers
    step = len(numbers) // max(1, shape[0])
    return [_nested(numbers[i * step : (i + 1) * step], shape[1:]) for i in range(shape[0])]


def all_finite(measures: Any) -> bool:
    """Return whether a number, or every one of nested lists and dicts of them, is finite."""
    if isinstance(measures, dict):
        measures = list(measures.values())
    return all(map(all_finite, measures)) if isinstance(measures, list) else math.isfinite(measures)


def scalar_checks(
    tensors: Iterable[Tensor], loss: float | Tensor | None = None
) -> dict[str, Tensor]:
    """Return scalars that are finite if some tensors, and the loss, are."""
    result: dict[str, Tensor] = {}
    # A sum is finite only if every entry is, but for overflow, and costs one pass.
    sums = [own_shard(tensor).sum(dtype=torch.float32) for tensor in tensors]
    if sums:
        result["rest"] = torch.stack([one.to(sums[0].device) for one in sums]).sum()
    if loss is not None:
        result["loss"] = torch.as_tensor(loss).detach().reshape(-1)[:1].sum()
    return result


def damped_model(measures: Measures, dampings: Sequence[float]) -> QuadraticModel:
    """Return the quadratic model, with the damping of every group."""
    size = len(measures["slopes"])
    damping = [
        [
            sum(d * gram[i][j] for d, gram in zip(dampings, measures["grams"], strict=True))
            for j in range(size)
        ]
        for i in range(size)
    ]
    return QuadraticModel(measures["fisher"], damping, measures["slopes"])


def clip_scales(
    measures: Measures, coefficients: Sequence[float], grouped: PreconditionedGroups
) -> list[float]:
    """Return the factor, at most 1, by which the clips shorten every group's step.

    ``kl_clip`` bounds ``η²δᵀFδ`` and, at a learning rate, ηδ for all weights but one by their
    norms; then ``norm_clip`` the norm of all groups' ηδ together.

    Args:
        measures: What was measured of the directions.
        coefficients: Those of the step along them.
        grouped: The parameters the step moves.
    """
    if grouped.rule.uses_model:
        quadratic = quadratic_form(coefficients, measures["fisher"])
    else:
        quadratic = abs(measures.get("quadratic", 0.0)) * coefficients[0] ** 2
    rates = [rate_of(group) for group in grouped.groups]
    scales = [1.0] * len(rates)
    for index, (group, lr) in enumerate(zip(grouped.groups, rates, strict=True)):
        if group["kl_clip"] is not None and quadratic > 0 and lr:
            scales[index] = min(1.0, (group["kl_clip"] / (quadratic * lr**2)) ** 0.5)
    if _bounds_changes(grouped):
        moves = [lr * scale for lr, scale in zip(rates, scales, strict=True)]
        change = second_largest_change(measures, moves)
        if change > LARGEST_MOVE:
            scales = [scale * LARGEST_MOVE / change for scale in scales]
    norm_clip = grouped.rule.norm_clip
    if norm_clip is not None and "grams" in measures:
        squares = [quadratic_form(coefficients, gram) for gram in measures["grams"]]
        terms = zip(rates, scales, squares, strict=True)
        total = sum((lr * scale) ** 2 * square for lr, scale, square in terms)
        if total > norm_clip**2:
            scales = [scale * norm_clip / total**0.5 for scale in scales]
    return scales


def predicted_change(
    batch: BatchFisher | None,
    grouped: PreconditionedGroups,
    step: dict[str, Tensor],
    gradients: dict[str, Tensor],
) -> float:
    """Return what the quadratic model predicts for a step, ``M(δ) − M(0)``.

    Args:
        batch: The Fisher matrix of the batch, the share of this process.
        grouped: The parameters the step moves.
        step: Parameter name → δ.
        gradients: Parameter name → gradient of the loss.
    """
    gram = fisher_gram(batch, [step], grouped.replicas)
    measures = {"slopes": slopes([step], gradients)}
    measures["grams"] = group_grams([step], grouped.group_names)
    grouped.replicas.average(measures)
    measures["fisher"] = gram
    return damped_model(on_host(measures), grouped.dampings).value([1.0])
