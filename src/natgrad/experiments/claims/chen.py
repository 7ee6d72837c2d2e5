"""Chen et al. (2018): partially adaptive momentum."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

import natgrad
from natgrad.experiments.claims.claim import Figures, Setting, Source, ratios
from natgrad.experiments.claims.image_training import images
from natgrad.experiments.claims.side_by_side import Methods, Task, accuracies, at_rate
from natgrad.experiments.models import build_model

SOURCE = Source(
    "chen",
    "Chen et al., Closing the generalization gap of adaptive gradient methods in training deep "
    "neural networks (2018)",
)

DRAWS = 5
IMAGES = 1000
WIDTH = 16
STEPS = 200
BATCH_SIZE = 50
_DECAY: dict[str, Any] = {"weight_decay": 5e-4}


#: Methods by title, and the learning rates searched.
METHODS: Methods = {
    "AMSGrad": (at_rate(torch.optim.AdamW, amsgrad=True, **_DECAY), (1e-3, 3e-3, 1e-2, 3e-2)),
    "SGD": (at_rate(torch.optim.SGD, momentum=0.9, **_DECAY), (0.01, 0.03, 0.1, 0.3)),
    "Padam": (at_rate(natgrad.Padam, **_DECAY), (0.03, 0.1, 0.3, 1.0)),
}


@SOURCE.claim("generalisation", "abstract", data="fashion_mnist", published_data="cifar10")
def generalisation(setting: Setting) -> Figures:
    """A small convolutional network on 1000 images of ten classes, shrunk to 14×14.

    200 steps with batches of 50, rates falling linearly, each the best of four for another network
    by the training loss; decoupled weight decay of 5e-4 (for SGD the same in the gradient).

    Says: Padam (p = 1/8) trains as fast as the adaptive methods and generalises as well as SGD with
    momentum, which generalises better than they do.
    Rule:
        loss halfway, Padam over SGD ≤ 1 (faster than SGD)
        test accuracy, Padam − AMSGrad ≥ 0 (better than Adam's)
        test accuracy, Padam − SGD ≥ -0.01 (as well, to a hundredth)
    """
    data, steps = images(setting, IMAGES, 10), setting.of(STEPS, 100 * STEPS)
    pairs, loss = (data.train_inputs, data.train_labels), functional.cross_entropy
    task, every = Task(*pairs, loss, BATCH_SIZE, decays=True), max(1, steps // 2)

    def network(draw: int) -> nn.Module:
        seed = setting.seed_of(draw)
        return build_model("cnn", data.input_shape, data.classes, width=WIDTH, depth=4, seed=seed)

    progress = setting.progress
    found = task.compare(METHODS, network, DRAWS, steps, every=every, progress=progress)
    halfway = {title: [run.losses[1] for run in tuned.runs] for title, tuned in found.items()}
    return {
        "loss halfway, Padam over SGD": ratios(halfway["Padam"], halfway["SGD"]),
        "loss halfway, Padam over AMSGrad": ratios(halfway["Padam"], halfway["AMSGrad"]),
        **accuracies(found, data, of="Padam", others=("AMSGrad", "SGD")),
        **{f"training loss, {title}": tuned.ends for title, tuned in found.items()},
        **{f"learning rate, {title}": tuned.rate for title, tuned in found.items()},
    }
