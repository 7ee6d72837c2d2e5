"""How close the update of every approximation is to the exact natural gradient."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from natgrad import fisher_matrix, update_quality
from natgrad.experiments.objectives import Objective
from natgrad.experiments.results import QualityPoint
from natgrad.fisher import FISHER_TYPES, as_fisher_type
from natgrad.likelihoods import as_likelihood

__all__ = ["QUALITY_SAMPLES", "STRUCTURES", "measure_quality"]

STRUCTURES = ("full", "block_diagonal", "kfac", "unit_wise", "diagonal")
"""The structures compared; the block tri-diagonal one is indefinite."""

QUALITY_SAMPLES = 100
"""Samples the quality is measured on."""

#: Damping in units of the mean eigenvalue of each matrix on the directions of its rows.
RELATIVE_DAMPING = 1e-3


def measure_quality(
    model: nn.Module,
    snapshots: Mapping[int, Mapping[str, Tensor]],
    objective: Objective,
    inputs: Tensor,
    targets: Tensor,
    seed: int = 0,
) -> list[QualityPoint]:
    """Measure the update of every structure and Fisher type along a training run.

    Args:
        model: The network.
        snapshots: Steps taken → state of the network then.
        objective: The loss.
        inputs: (N, ...) samples.
        targets: Their targets, encoded for the objective.
        seed: Seed of sampled labels.

    Returns:
        One entry per point, structure and Fisher type.
    """
    model = copy.deepcopy(model)
    likelihood = as_likelihood(objective.likelihood)
    points = []
    for step, state in snapshots.items():
        model.load_state_dict(dict(state))
        outputs = model(inputs)
        loss = likelihood.loss(outputs, targets)
        names = [name for name, _ in model.named_parameters()]
        gradient = dict(
            zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True)
        )
        reference: float | None = None
        for structure in STRUCTURES:
            for fisher in FISHER_TYPES:
                decrease = _best_decrease(
                    model, (inputs, targets), gradient, objective.likelihood, structure, fisher,
                    outputs.shape[1], seed,
                )  # fmt: skip
                if structure == "full" and fisher == "exact":
                    reference = decrease
                share = None if not reference or decrease is None else decrease / reference
                points.append(QualityPoint(step, structure, fisher, share))
    return points


def _best_decrease(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    gradient: dict[str, Tensor],
    likelihood: str,
    structure: str,
    fisher: str,
    outputs: int,
    seed: int,
) -> float | None:
    try:
        matrix = fisher_matrix(model, data, likelihood, structure, fisher, seed=seed)
        rows = len(data[0]) * as_fisher_type(fisher).directions(outputs)
        damping = RELATIVE_DAMPING * float(matrix.trace()) / min(rows, matrix.shape[0])
        update = matrix.solve(gradient, damping)
        return update_quality(model, data, update, likelihood).best_decrease
    except (RuntimeError, ValueError):
        return None
