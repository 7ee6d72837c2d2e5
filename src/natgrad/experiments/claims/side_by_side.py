"""Small fully connected networks, trained by one optimizer after the other on the same batches."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LinearLR

from natgrad.curvature import KroneckerFactors
from natgrad.experiments.claims.claim import Setting, differences
from natgrad.experiments.data import Dataset
from natgrad.experiments.models import fully_connected
from natgrad.experiments.random_state import reproducible
from natgrad.optim import NaturalGradient

Make = Callable[..., torch.optim.Optimizer]
"""Makes an optimizer of a network, or of a network and a learning rate."""

Methods = Mapping[str, tuple[Make, Sequence[float]]]
"""What makes an optimizer, and the rates to choose from, by title."""


EXPANDED = KroneckerFactors(weight_sharing="expand")
"""K-FAC as the sources know it, where positions share a weight."""


def at_rate(
    optimizer: Callable[..., torch.optim.Optimizer],
    *given: Any,
    searched: str = "lr",
    **options: Any,
) -> Make:
    """Return what makes an optimizer of a network and a learning rate, a number or a trial with it.

    natgrad's take the network, and behind it what is `given`, the likelihood; others its
    parameters. `searched` is the name of the option that the learning rate stands for.
    """
    natural = isinstance(optimizer, type) and issubclass(optimizer, NaturalGradient)

    def make(model: nn.Module, rate: float | tuple[float, ...], *_: Any) -> torch.optim.Optimizer:
        number = rate[0] if isinstance(rate, tuple) else rate
        found = {searched: number, **options}
        return optimizer(model if natural else model.parameters(), *given, **found)

    return make


def mlp(
    sizes: Sequence[int],
    seed: int,
    activation: type[nn.Module] = nn.Tanh,
    dtype: torch.dtype | None = None,
) -> nn.Sequential:
    """Return a fully connected network at PyTorch's random weights, numbered by a seed.

    `sizes` are inputs, units of every hidden layer, and outputs.
    """
    with reproducible(seed):
        return fully_connected(sizes, activation=activation).to(dtype=dtype)


@dataclass(frozen=True)
class Run:
    """One run of training: losses of all training data, the first before any step.

    One is measured every so many steps; from where one is not finite on they are infinite. The
    seconds are processor time of the steps until then, without that of measuring.
    """

    losses: list[float]
    seconds: list[float]
    every: int
    model: nn.Module

    def reaching(self, loss: float) -> tuple[float, float]:
        """Return steps and seconds until a loss was first measured; infinite if it never was."""
        index = next((i for i, value in enumerate(self.losses) if value <= loss), None)
        return (math.inf, math.inf) if index is None else (index * self.every, self.seconds[index])


@dataclass(frozen=True)
class Tuned:
    """Runs of one method at the learning rate that was chosen, one a network."""

    rate: float
    runs: list[Run]

    @property
    def ends(self) -> list[float]:
        """The last losses."""
        return [run.losses[-1] for run in self.runs]


@torch.no_grad()
def accuracies(
    found: Mapping[str, Tuned], data: Dataset, *, of: str, others: Sequence[str]
) -> dict[str, list[float]]:
    """Return shares of test images whose largest output is that of the label, run by run.

    The differences of one method's from others' come first, then the shares of all.
    """

    def share(model: nn.Module) -> float:
        first = next(model.parameters())  # A matrix where images are seen as vectors.
        x = data.test_inputs.flatten(1) if first.dim() == 2 else data.test_inputs
        return float((model(x.to(first.dtype)).argmax(1) == data.test_labels).double().mean())

    right = {title: [share(run.model) for run in tuned.runs] for title, tuned in found.items()}
    return {
        **{f"test accuracy, {of} − {o}": differences(right[of], right[o]) for o in others},
        **{f"test accuracy, {title}": shares for title, shares in right.items()},
    }


@dataclass(frozen=True)
class Task:
    """What networks are trained for: inputs ``(N, …)``, targets ``(N, …)``, and their mean loss.

    A batch is all samples by default; `decays` lets rates fall linearly to a hundredth at the end.
    """

    x: Tensor
    y: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]
    batch_size: int | None = None
    decays: bool = False

    @classmethod
    def of(
        cls, data: Dataset, batch_size: int, dtype: torch.dtype = torch.float64, **options: bool
    ) -> Task:
        """Return the task of telling the classes of flattened training images, by cross-entropy."""
        x = data.train_inputs.flatten(1).to(dtype)
        return cls(x, data.train_labels, functional.cross_entropy, batch_size, **options)

    def network(
        self,
        setting: Setting,
        draw: int,
        hidden: Sequence[int],
        activation: type[nn.Module] = nn.Tanh,
    ) -> nn.Module:
        """Return a fully connected network for the task at random weights, numbered by a draw."""
        outputs = self.y.shape[1] if self.y.is_floating_point() else int(self.y.max()) + 1
        sizes = (self.x.shape[1], *hidden, outputs)
        return mlp(sizes, setting.seed_of(draw), activation, self.x.dtype)

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches without end, every epoch in an order of its own."""
        generator = torch.Generator().manual_seed(seed)
        size = min(self.batch_size or len(self.x), len(self.x))
        while True:
            order = torch.arange(len(self.x))
            if size < len(self.x):
                order = torch.randperm(len(self.x), generator=generator)
            for start in range(0, len(self.x) - size + 1, size):
                chosen = order[start : start + size]
                yield self.x[chosen], self.y[chosen]

    def value(self, model: nn.Module) -> float:
        """Return the loss of all training data."""
        with torch.no_grad():
            return float(self.loss(model(self.x), self.y))

    def train(
        self, model: nn.Module, make: Make, steps: int, *, every: int = 0, seed: int = 0
    ) -> Run:
        """Train a copy of a network; a run whose loss is not finite ends early.

        The loss is measured every so many steps; for 0 before the first and at the end. The seed is
        that of the order of samples.
        """
        model, every = copy.deepcopy(model), every or steps
        optimizer, batches = make(model), self.batches(seed)
        schedule = LinearLR(optimizer, 1.0, 0.01, steps) if self.decays else None
        losses, seconds, spent = [self.value(model)], [0.0], 0.0
        for step in range(1, steps + 1):
            x, y = next(batches)
            began = time.process_time()

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                loss = self.loss(model(x), y)
                loss.backward()
                return loss

            optimizer.step(closure)  # type: ignore[arg-type]
            if schedule is not None:
                schedule.step()
            spent += time.process_time() - began
            if step % every == 0:
                losses.append(self.value(model))
                seconds.append(spent)
                if not math.isfinite(losses[-1]):
                    break
        missing = steps // every + 1 - len(losses)
        losses = [value if math.isfinite(value) else math.inf for value in losses]
        return Run(losses + [math.inf] * missing, seconds + [math.inf] * missing, every, model)

    def compare(
        self,
        methods: Methods,
        network: Callable[[int], nn.Module],
        draws: int,
        steps: int,
        *,
        every: int = 0,
        progress: Callable[[float], None] = lambda share: None,
    ) -> dict[str, Tuned]:
        """Train networks 0 to `draws` by every method, each at the best of its learning rates.

        That is chosen on network number `draws`, which is not among them; see :meth:`train` for
        `every`.
        """

        def run(make: Make, rate: float, draw: int, every: int) -> Run:
            model = network(draw)
            return self.train(model, lambda m: make(m, rate), steps, every=every, seed=draw)

        found = {}
        for title, (make, rates) in methods.items():
            best = min(rates, key=lambda rate: run(make, rate, draws, 0).losses[-1])  # noqa: B023
            found[title] = Tuned(best, [run(make, best, draw, every) for draw in range(draws)])
            progress(len(found) / len(methods))
        return found
