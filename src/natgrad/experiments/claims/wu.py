"""Wu et al. (2024): the improved empirical Fisher matrix."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from natgrad.experiments.claims.claim import Figures, Setting, Source, ratios
from natgrad.experiments.claims.side_by_side import Make, Methods, Task, accuracies, at_rate
from natgrad.experiments.learning_rates import step_of
from natgrad.fisher import FisherType, ImprovedFisher

SOURCE = Source(
    "wu",
    "Wu et al., An improved empirical Fisher approximation for natural gradient descent (2024)",
)

DRAWS = 5
#: Batches over which the quality of an update is averaged.
BATCHES = 4
BATCH_SIZE = 100
#: Epochs of training before the quality is measured.
EPOCHS = (1, 5, 25)
#: Steps of the training that compares optimizers: ten epochs.
STEPS = 240
HIDDEN = (32, 32)
#: Fisher types by title. The improved one is damped where the source does, on the Gram matrix.
TYPES: dict[str, str | FisherType] = {
    "iEF": ImprovedFisher("gram"),
    "EF": "empirical",
    "sampled Fisher": "mc",
}
#: Damping in units of the mean eigenvalue of the empirical Fisher matrix on its samples.
NEAR_ZERO = 1e-6
DAMPINGS = (NEAR_ZERO, 1e-4, 1e-2, 1.0, 100.0)


@dataclass(frozen=True)
class Stage:
    """A network at a stage of its training, and batches to judge updates of it on."""

    epochs: int
    model: nn.Module
    batches: Sequence[tuple[Tensor, Tensor]]


def _stages(setting: Setting, draw: int) -> Iterator[Stage]:
    """Yield a network after some epochs of training by Adam, for each of `EPOCHS`."""
    task, seed = Task.of(setting.dataset(), 32), setting.seed_of(draw)
    model = task.network(setting, draw, HIDDEN, nn.ReLU)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(task.x), generator=generator)[: BATCHES * BATCH_SIZE]
    batches = [(task.x[part], task.y[part]) for part in chosen.split(BATCH_SIZE)]
    for before, epochs in zip((0, *EPOCHS[:-1]), EPOCHS, strict=True):
        steps = (epochs - before) * (len(task.x) // 32)
        adam = partial(at_rate(torch.optim.Adam), rate=1e-3)
        model = task.train(model, adam, steps, seed=seed + epochs).model
        yield Stage(epochs, model, batches)


def _full(fisher: str | FisherType, damping: float) -> Make:
    """Return what makes an optimizer of a network and a rate; see `at_rate`."""
    options: dict[str, Any] = {"structure": "full", "fisher": fisher, "damping": damping}
    return at_rate(natgrad.NaturalGradient, "categorical", **options)


def quality(
    model: nn.Module, x: Tensor, y: Tensor, fisher: str | FisherType, damping: float
) -> float:
    """Return γ of the update of a Fisher type over γ of the gradient (see `update_quality`).

    The damping is in units of the mean eigenvalue of the empirical Fisher matrix.
    """
    empirical = natgrad.fisher_matrix(model, (x, y), "categorical", "full", "empirical")
    absolute = damping * float(empirical.trace()) / len(x)
    make = partial(_full(fisher, absolute), rate=1.0)
    update = step_of(model, make, functional.cross_entropy, x, y)
    return natgrad.update_quality(model, (x, y), update, "categorical").relative


def _mean_quality(stage: Stage, fisher: str | FisherType, damping: float = NEAR_ZERO) -> float:
    """Return the geometric mean of the quality over the batches of a stage."""
    return statistics.geometric_mean(
        quality(stage.model, x, y, fisher, damping) for x, y in stage.batches
    )


@SOURCE.claim("quality", "abstract")
def quality_over_training(setting: Setting) -> Iterator[dict[str, float]]:
    """γ(u) = √(uᵀFu)/|uᵀ∇L| with the exact Fisher matrix F, after 1, 5 and 25 epochs of Adam.

    Updates are made of batches of 100 images and one sampled label per image, with a damping of
    10⁻⁶ of the mean eigenvalue. The network has two hidden layers of 32 ReLU units.

    Says: At every stage of training the update of the improved empirical Fisher matrix is closer to
    the exact natural gradient than the gradient, and than the updates of the empirical and the
    sampled Fisher matrices.
    Rule:
        γ of iEF over that of the gradient ≤ 1 (the smaller the better)
        γ of iEF over that of EF ≤ 1 (the smaller the better)
        γ of iEF over that of sampled Fisher ≤ 1 (the smaller the better)
    Remark: Refuted by the first epoch alone, in which the losses of all samples are much the same
    and with them the weights that tell iEF from the empirical Fisher matrix: there the two are
    within two hundredths. Later iEF is the better, by far in the end.
    """
    for draw in setting.each(range(DRAWS)):
        for stage in _stages(setting, draw):
            own, ef, sampled = (_mean_quality(stage, fisher) for fisher in TYPES.values())
            ratios = {
                "iEF over that of the gradient": own,
                "iEF over that of EF": own / ef,
                "iEF over that of sampled Fisher": own / sampled,
                "sampled Fisher over that of the gradient": sampled,
            }
            yield {f"γ of {n}, {stage.epochs} epochs": ratio for n, ratio in ratios.items()}


@SOURCE.claim("empirical", "the inversely-scaled projection")
def empirical_over_training(setting: Setting) -> Iterator[dict[str, float]]:
    """The same for the empirical Fisher matrix, after 1, 5 and 25 epochs.

    Says: The empirical Fisher matrix favours samples that are fitted already, so that its update is
    worse than the gradient itself, and gets worse as training goes on.
    Rule:
        γ of EF over that of the gradient ≥ 1 (worse than it)
        γ relative to the gradient's, last over first ≥ 1 (it grows)
    Remark: Refuted by the first epoch alone, before any sample is fitted.
    """
    for draw in setting.each(range(DRAWS)):
        found = {s.epochs: _mean_quality(s, "empirical") for s in _stages(setting, draw)}
        yield {f"γ of EF over that of the gradient, {n} epochs": found[n] for n in EPOCHS}
        growth = found[EPOCHS[-1]] / found[EPOCHS[0]]
        yield {"γ relative to the gradient's, last over first": growth}


@SOURCE.claim("damping", "abstract")
def damping(setting: Setting) -> Iterator[dict[str, float]]:
    """The worst of three stages, of dampings of 10⁻⁶, 10⁻⁴, 10⁻², 1 and 100 mean eigenvalues.

    Says: The quality of iEF does not depend on a well chosen damping: next to none is nearly as
    good as the best, which it is not for the empirical and the sampled Fisher matrices.
    Rule:
        γ at next to no damping over the least γ, iEF ≤ 1.25 (nearly)
        γ at next to no damping over the least γ, EF, over iEF ≥ 1.25 (it is not)
        γ at next to no damping over the least γ, sampled Fisher, over iEF ≥ 1.25 (it is not)
    """
    name = "γ at next to no damping over the least γ"
    for draw in setting.each(range(DRAWS)):
        excess: dict[str, list[float]] = {title: [] for title in TYPES}
        for stage in _stages(setting, draw):
            for title, fisher in TYPES.items():
                found = [_mean_quality(stage, fisher, value) for value in DAMPINGS]
                excess[title].append(found[0] / min(found))
        worst = {title: max(values) for title, values in excess.items()}
        own = worst.pop("iEF")
        yield {f"{name}, iEF": own}
        yield {f"{name}, {title}, over iEF": value / own for title, value in worst.items()}


#: Methods by title, and the learning rates searched.
METHODS: Methods = {
    "iEF": (_full(ImprovedFisher("gram"), 1e-6), (0.03, 0.1, 0.3, 1.0)),
    "EF": (_full("empirical", 1e-6), (1e-4, 1e-3, 1e-2, 1e-1)),
    "AdamW": (at_rate(torch.optim.AdamW), (1e-3, 3e-3, 1e-2, 3e-2)),
}


@SOURCE.claim("training", "abstract")
def training(setting: Setting) -> Figures:
    """Ten epochs in batches of 50, rates falling linearly.

    Each method at the best of four rates for another network. Damping is 10⁻⁶.

    Says: Used as an optimizer, exact iEF reaches a lower training loss than the empirical Fisher
    matrix and well-tuned AdamW, and no worse test performance.
    Rule:
        training loss, iEF over EF ≤ 1 (lower)
        training loss, iEF over AdamW ≤ 1 (lower)
        test accuracy, iEF − AdamW ≥ -0.005 (no worse, to half a percent)
    Remark: The source fine-tunes large pre-trained networks; this is a small one from random
    weights. Of the rates tried the largest were the best, for iEF and for AdamW.
    """
    data = setting.dataset()
    task = Task.of(data, 50, decays=True)
    network = partial(task.network, setting, hidden=HIDDEN, activation=nn.ReLU)
    steps = setting.of(STEPS, 10 * (len(task.x) // 50))
    found = task.compare(METHODS, network, DRAWS, steps, progress=setting.progress)
    own = found["iEF"].ends
    return {
        **{f"training loss, iEF over {o}": ratios(own, found[o].ends) for o in ("EF", "AdamW")},
        **accuracies(found, data, of="iEF", others=("AdamW",)),
        **{f"learning rate, {title}": tuned.rate for title, tuned in found.items()},
    }
