"""How close the update of every approximation is to the exact natural gradient."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from natgrad import fisher_matrix, update_quality
from natgrad.experiments.objectives import Objective
from natgrad.experiments.results import QualityPoint
from natgrad.fisher import FISHER_TYPES, as_fisher_type
from natgrad.likelihoods import as_likelihood

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

    Snapshots are the network's states by steps taken; the seed is that of sampled labels.
    """
    model = copy.deepcopy(model)
    likelihood = as_likelihood(objective.likelihood)
    data = inputs, targets
    points = []

    def best_decrease(gradient: dict[str, Tensor], structure: str, fisher: str) -> float | None:
        rows = len(inputs) * as_fisher_type(fisher).directions(outputs_per_sample)
        try:
            matrix = fisher_matrix(model, data, likelihood, structure, fisher, seed=seed)
            damping = RELATIVE_DAMPING * float(matrix.trace()) / min(rows, matrix.shape[0])
            update = matrix.solve(gradient, damping)
            return update_quality(model, data, update, likelihood).best_decrease
        except (RuntimeError, ValueError):
            return None

    for step, state in snapshots.items():
        model.load_state_dict(dict(state))
        outputs = model(inputs)
        outputs_per_sample = outputs.shape[1]
        names, parameters = zip(*model.named_parameters(), strict=True)
        gradients = torch.autograd.grad(likelihood.loss(outputs, targets), parameters)
        gradient = dict(zip(names, gradients, strict=True))
        reference = best_decrease(gradient, "full", "exact")
        for structure, fisher in itertools.product(STRUCTURES, FISHER_TYPES):
            decrease = best_decrease(gradient, structure, fisher)
            share = None if not reference or decrease is None else decrease / reference
            points.append(QualityPoint(step, structure, fisher, share))
    return points
