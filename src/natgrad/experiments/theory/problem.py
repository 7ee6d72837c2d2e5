"""The problem that all sections look at: the data, the networks, and training them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from natgrad import ntk
from natgrad.experiments.data import DATASETS, load_dataset
from natgrad.experiments.formats import DataError
from natgrad.experiments.random_state import reproducible
from natgrad.experiments.theory.config import TheoryConfig
from natgrad.experiments.theory.methods import METHODS, build_optimizer, damping_of
from natgrad.likelihoods import as_likelihood

#: A loss so many times the first counts as divergence, and ends the run.
DIVERGED = 1e4


@dataclass
class Trajectory:
    """Losses before each step and after the last, and the trained model."""

    train_loss: list[float]
    test_loss: list[float]
    model: nn.Module

    @property
    def left(self) -> list[float]:
        """The training losses, relative to the first."""
        return [loss / self.train_loss[0] for loss in self.train_loss]


@dataclass(frozen=True)
class Problem:
    """The data of a run and the networks on it, all in float64.

    Inputs ``(N, M_0)`` have norm 1, targets are ``(N, C)``; `labels` are those of cross-entropy: 0
    and 1, ``(N, 1)``, for two classes, else class numbers, ``(N,)``. `notes` say what had to be
    done to the data.
    """

    config: TheoryConfig
    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    labels: Tensor
    notes: tuple[str, ...] = ()

    @classmethod
    def load(cls, config: TheoryConfig) -> Problem:
        """Read and prepare the data."""
        data = load_dataset(
            config.data,
            config.data_dir,
            train_samples=config.samples,
            classes=config.classes,
            seed=config.seed,
        ).to(config.torch_device(), torch.float64)
        inputs = data.train_inputs.flatten(1), data.test_inputs.flatten(1)
        x, x_test = map(nn.functional.normalize, inputs)
        x_test, test_labels = x_test[: config.test_samples], data.test_labels[: config.test_samples]
        _refuse_duplicates(x)
        notes: list[str] = []
        rank = int(torch.linalg.matrix_rank(x, rtol=1e-6))
        if rank < len(x):
            x, x_test, *notes = _spread_evenly(x, x_test, rank)
        y, y_test = (_targets(one, config.outputs) for one in (data.train_labels, test_labels))
        labels = y + 0.5 if config.outputs == 1 else data.train_labels
        return cls(config, x, y, x_test, y_test, labels, tuple(notes))

    @property
    def samples(self) -> int:
        """N."""
        return len(self.x)

    @property
    def outputs(self) -> int:
        """C."""
        return self.y.shape[1]

    def first_output(self) -> Problem:
        """Return the same problem with the first output alone."""
        return replace(self, y=self.y[:, :1], y_test=self.y_test[:, :1])

    @property
    def widths(self) -> list[int]:
        """Three to five widths that double up to the one asked for, from 64 on if possible."""
        largest = self.config.width
        least = max(1, min(64, largest // 4))
        return [largest // 2**power for power in range(4, -1, -1) if largest // 2**power >= least]

    def each_width(self, progress: Callable[[float], None], factor: int = 1) -> Iterator[int]:
        """Yield so many times the widths, and tell the share that is done after each."""
        for done, width in enumerate(self.widths, start=1):
            yield factor * width
            progress(done / len(self.widths))

    @property
    def structures(self) -> list[str]:
        """The structures whose theory gives a learning rate at this depth."""
        singular = {"block_tridiagonal"} if self.config.depth % 3 == 2 else set()
        return [name for name in METHODS if name not in {"gd", "diagonal", *singular}]

    def network(self, width: int | None = None, draw: int = 0) -> ntk.MLP:
        """Return a fully connected network in NTK parameterisation, σ_w² = 2, without biases.

        Its width is that of the options by default; `draw` numbers draws of the random weights.
        """
        hidden = [self.config.width if width is None else width] * (self.config.depth - 1)
        with reproducible(1000 * self.config.seed + draw):
            model = ntk.MLP([self.x.shape[1], *hidden, self.outputs], self.config.activation)
        return model.double().to(self.x.device)

    def alpha(self, structure: str, width: int | None = None) -> float:
        """Return α of a structure on networks of a width, by theory."""
        config = self.config
        return ntk.isotropic_constant(
            structure,
            config.depth,
            self.samples,
            outputs=self.outputs,
            input_dim=self.x.shape[1],
            width=config.width if width is None else width,
            active_fraction=ntk.ACTIVATIONS[config.activation].active_fraction,
        )

    def full_rate(
        self, infinite: ntk.InfiniteNetwork, name: str, width: int | None = None
    ) -> float:
        """Return 1/α, for gradient descent 1/λ_max of the limit."""
        if name == "gd":
            return 1.0 / float(torch.linalg.eigvalsh(infinite.maps("gd")[0])[-1])
        return 1.0 / self.alpha(name, width)

    @property
    def cross_entropy(self) -> str:
        """The likelihood behind cross-entropy."""
        return "bernoulli" if self.outputs == 1 else "categorical"

    def isotropy(self, model: nn.Module, structure: str) -> ntk.Isotropy:
        """Return the isotropy of a structure on a network, with the damping it is used with."""
        return ntk.isotropy(model, self.x, structure, damping_of(structure, model, self.x))

    def train_at(self, factor: float, model: nn.Module, method: str, steps: int) -> Trajectory:
        """Train a copy of a network at so many times 1/α."""
        return self.train(model, method, factor / self.alpha(method), steps)

    def train(
        self,
        model: nn.Module,
        method: str,
        lr: float,
        steps: int,
        *,
        damping: float | None = None,
        likelihood: str = "gaussian",
    ) -> Trajectory:
        """Train a copy of a network with full batches and a method's own optimizer.

        The damping is by default that of `damping_of`. A run that diverges ends early. Of a
        likelihood other than "gaussian", which is ½‖f − y‖², the test loss is not taken.
        """
        model = copy.deepcopy(model)
        if damping is None:
            damping = damping_of(method, model, self.x)
        optimizer = build_optimizer(method, model, lr, damping, likelihood)
        squared, loss = likelihood == "gaussian", as_likelihood(likelihood).loss
        targets = self.y if squared else self.labels
        train_loss: list[float] = []
        test_loss: list[float] = []
        for step in range(steps + 1):
            value = loss(model(self.x), targets)
            train_loss.append(float(value.detach()))
            if squared:
                with torch.no_grad():
                    test_loss.append(float(loss(model(self.x_test), self.y_test)))
            if step == steps or not train_loss[-1] <= DIVERGED * train_loss[0]:
                break
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        missing = [math.nan] * (steps + 1 - len(train_loss))
        return Trajectory(train_loss + missing, test_loss + missing, model)

    def describe(self) -> dict[str, object]:
        """Return the data in JSON values."""
        return {
            "name": self.config.data,
            "title": DATASETS[self.config.data].title,
            "train_samples": self.samples,
            "test_samples": len(self.x_test),
            "input_dim": self.x.shape[1],
            "outputs": self.outputs,
            "classes": list(self.config.classes),
            "notes": list(self.notes),
        }


def _targets(labels: Tensor, outputs: int) -> Tensor:
    """Return ±½ for one output, else one-hot targets."""
    if outputs == 1:
        return labels.double().unsqueeze(1) - 0.5
    return nn.functional.one_hot(labels, outputs).double()


def _refuse_duplicates(x: Tensor) -> None:
    _, index, counts = torch.unique(x, dim=0, return_inverse=True, return_counts=True)
    twice = (counts > 1).nonzero()
    if len(twice):
        same = (index == twice[0]).nonzero()[:2, 0].tolist()
        raise DataError(
            f"The training samples {same[0]} and {same[1]} are the same image, so no network can "
            "tell them apart and the kernels are singular: choose other samples with --seed, or "
            "remove one."
        )


def _spread_evenly(x: Tensor, x_test: Tensor, rank: int) -> tuple[Tensor, Tensor, str]:
    """Project more samples than dimensions on their leading components and spread them evenly."""
    samples = len(x)
    _, values, basis = torch.linalg.svd(x, full_matrices=False)
    dim = rank
    while dim > 1:
        kept = basis[:dim].T
        projected = nn.functional.normalize(x @ kept)
        try:
            spread, spread_test = ntk.forster_transform(projected, x_test @ kept)
        except ValueError:
            dim = dim * 3 // 4
            continue
        assert spread_test is not None
        share = float(values[:dim].square().sum() / values.square().sum())
        note = (
            f"The {samples} inputs span {rank} dimensions only, so they were projected on {dim} "
            f"principal components ({100 * share:.1f} % of their energy) and spread evenly by the "
            "Forster transform, without which K-FAC's first layer is not isotropic."
        )
        return spread, spread_test, note
    raise DataError(
        f"The {samples} training inputs span {rank} dimensions only, and cannot be spread evenly "
        "over fewer: take fewer samples with --train-samples."
    )
