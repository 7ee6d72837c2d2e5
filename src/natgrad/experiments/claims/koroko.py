"""Koroko et al. (2022, 2023): nearest Kronecker products, and two-level K-FAC."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import natgrad
from natgrad.curvature import KroneckerProducts, TwoLevelKronecker
from natgrad.experiments.claims.claim import Figures, Setting, Source, ratios
from natgrad.experiments.claims.side_by_side import Make, Task, Tuned, at_rate
from natgrad.experiments.objectives import squared_error
from natgrad.operators.coarse_level import CoarseSpace

SOURCE = Source(
    "koroko",
    "Koroko et al., Efficient approximations of the Fisher matrix in neural networks using "
    "Kronecker product singular value decomposition (2022), and Analysis and comparison of "
    "two-level KFAC methods for training deep neural networks (2023)",
)

DRAWS = 5
#: Units of the hidden layers of the autoencoder.
HIDDEN = (16, 8, 16)
#: Images whose Fisher matrix is approximated, and steps of training before.
SAMPLES = 50
STAGES = (0, 100, 500)
STEPS = 200
BATCH_SIZE = 100
#: Measurements of the loss along the training.
MEASUREMENTS = 20
DAMPINGS = (1e-3, 1e-2, 1e-1)
#: Structures of the first paper, by title; the second product is what deflation leaves.
PRODUCTS = {"KPSVD": 1, "deflation": 2}
COARSE_SPACES: tuple[CoarseSpace, ...] = ("nicolaides", "residual", "spectral", "krylov")


def _task(setting: Setting) -> Task:
    """Return the images as inputs and targets."""
    x = setting.dataset(setting.of(None, 10000)).train_inputs.flatten(1).double()
    return Task(x, x, squared_error, BATCH_SIZE)


def block_error(model: nn.Module, x: Tensor, structure: str, **options: Any) -> float:
    """Return ‖F̂ − F_b‖/‖F_b‖ of the layers' exact Gaussian blocks F_b, in the Frobenius norm."""
    exact = natgrad.fisher_matrix(model, (x, None), "gaussian", "block_diagonal")
    found = natgrad.fisher_matrix(model, (x, None), "gaussian", structure, **options)
    squares, whole = 0.0, 0.0
    for name, block in exact.parts.items():
        dense = block.to_dense()
        squares += float((found.parts[name].to_dense() - dense).square().sum())
        whole += float(dense.square().sum())
    return math.sqrt(squares / whole)


@SOURCE.claim("block-error", "2022, abstract")
def block_errors(setting: Setting) -> Iterator[dict[str, float]]:
    """Frobenius error of all blocks of an autoencoder with 16, 8 and 16 tanh units.

    Exact Fisher matrix of 50 images, before and after 100 and 500 steps of Adam.

    Says: The nearest Kronecker product (KPSVD) approximates the blocks of the Fisher matrix better
    than K-FAC's product, and two products (deflation) better than one.
    Rule:
        error of KPSVD over that of K-FAC ≤ 1 (nearest by definition)
        error of deflation over that of KPSVD ≤ 1 (one term more)
    """
    task = _task(setting)
    for draw in setting.each(range(DRAWS)):
        model, before = task.network(setting, draw, HIDDEN), 0
        for stage in STAGES:
            if stage > before:
                adam = partial(at_rate(torch.optim.Adam), rate=3e-3)
                model = task.train(model, adam, stage - before, seed=draw + stage).model
            before = stage
            x = task.x[:SAMPLES]
            kfac = block_error(model, x, "kfac")
            nearest, two = (block_error(model, x, "kpsvd", rank=r) for r in (1, 2))
            yield {
                f"error of K-FAC, {stage} steps": kfac,
                f"error of KPSVD over that of K-FAC, {stage} steps": nearest / kfac,
                f"error of deflation over that of KPSVD, {stage} steps": two / nearest,
            }


#: Makes an optimizer of a network and a damping.
_at_damping = partial(at_rate, searched="damping")


def _compared(setting: Setting, methods: dict[str, Make]) -> dict[str, Tuned]:
    """Train by every method at the best of three dampings, found on another network."""
    task, steps = _task(setting), setting.of(STEPS, 100 * STEPS)
    hidden = setting.of(HIDDEN, (1000, 500, 250, 30, 250, 500, 1000))
    network, every = partial(task.network, setting, hidden=hidden), max(1, steps // MEASUREMENTS)
    tried = {title: (make, DAMPINGS) for title, make in methods.items()}
    return task.compare(tried, network, DRAWS, steps, every=every, progress=setting.progress)


@SOURCE.claim("training", "2022, abstract")
def training(setting: Setting) -> Figures:
    """The loss after 200 steps with batches of 100, each at the best of three dampings.

    The autoencoder of `koroko.block-error`; natgrad's defaults for all else. A loss that is not
    reached takes infinite time.

    Says: With nearest Kronecker products autoencoders train to lower losses than with K-FAC in as
    many steps, and reach K-FAC's loss in less time.
    Rule:
        training loss over K-FAC's ≤ 1 (lower)
        processor time to K-FAC's loss over K-FAC's ≤ 1 (less)
    Remark: All end within a few hundredths of K-FAC's loss, at the same damping: a nearer matrix
    makes no difference here. One draw that stops just above that loss makes the mean time ∞.
    """
    methods = {"K-FAC": _at_damping(natgrad.KFAC, "gaussian")}
    for title, rank in PRODUCTS.items():
        structure = KroneckerProducts(rank=rank)
        methods[title] = _at_damping(natgrad.KPSVD, "gaussian", structure=structure)
    found = _compared(setting, methods)
    kfac, figures = found["K-FAC"], Figures()
    for title, one in list(found.items())[1:]:
        figures[f"training loss over K-FAC's, {title}"] = ratios(one.ends, kfac.ends)
        pairs = zip(one.runs, kfac.runs, strict=True)
        figures[f"processor time to K-FAC's loss over K-FAC's, {title}"] = [
            run.reaching(other.losses[-1])[1] / other.seconds[-1] for run, other in pairs
        ]
    return figures | {f"damping, {title}": one.rate for title, one in found.items()}


@SOURCE.claim("two-level", "2023, abstract")
def two_level(setting: Setting) -> Figures:
    """The loss after 200 steps, as in `koroko.training`; K-FAC updates as often as the others.

    Two-level K-FAC updates curvature at every step and factorises every 20 steps.

    Says: Coarse corrections that couple the layers do not really improve on K-FAC, whatever the
    coarse space.
    Rule:
        training loss over K-FAC's ≥ 0.9 (an improvement by less than a tenth is none)
    Remark: Here they are behind K-FAC, each at its best damping, of which K-FAC takes the least
    that was tried.
    """
    refresh = natgrad.TwoLevelKFAC.method.refresh
    methods = {"K-FAC": _at_damping(natgrad.KFAC, "gaussian", refresh=refresh)}
    for space in COARSE_SPACES:
        structure = TwoLevelKronecker(coarse_space=space)
        methods[space] = _at_damping(natgrad.TwoLevelKFAC, "gaussian", structure=structure)
    found = _compared(setting, methods)
    kfac, figures = found["K-FAC"], Figures()
    for title, one in list(found.items())[1:]:
        figures[f"training loss over K-FAC's, {title}"] = ratios(one.ends, kfac.ends)
        times = ([run.seconds[-1] for run in tuned.runs] for tuned in (one, kfac))
        figures[f"processor time of all steps over K-FAC's, {title}"] = ratios(*times)
    return figures | {f"damping, {title}": one.rate for title, one in found.items()}
