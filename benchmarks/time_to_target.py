"""Steps and seconds until the training loss reaches a target, natural gradients beside others.

Three tasks: a multilayer perceptron and a small convolutional network on 10,000 images of
Fashion-MNIST, and a character transformer on tiny Shakespeare. All methods train the same network
from the same start on the same batches, at a constant learning rate and without weight decay.

Methods with a search try the same number of rates, a factor √10 apart around the usual one. The
rates of one method race each other: they take turns of a few steps, the first to reach the target
is chosen and ends the race. Then every method trains afresh with other seeds, and of these
runs the table shows the median. ``kfac``, ``ekfac``, ``tkfac`` and ``tekfac`` run with the
defaults of natgrad and no search; ``kfac-tuned`` and so on search ``lr`` like the others.

The loss is measured every few steps on a fixed sample of the training set, outside the clock; the
target is reached when the mean of the last three measurements is below it. The clock runs during
training steps only: forward, backward, optimizer. Runs of one stage take turns in one process, so
that the machine's drift hits all of them alike.

    export NATGRAD_DATA=DIR                  # holds fashion_mnist/ and tinyshakespeare/input.txt
    python benchmarks/time_to_target.py
    python benchmarks/time_to_target.py --tasks mlp --methods adamw,soap,kfac --seeds 1
    python benchmarks/time_to_target.py --json target.json --plot target.png

SOAP is that of pytorch_optimizer (``pip install pytorch-optimizer``), left out where it is missing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from networks import Transformer, mlp
from rivals import USUAL_RATES, Optimizer, make_rival, missing, rate_grid
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from natgrad.experiments.data import load_dataset

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """A network, its data and the loss to reach."""

    title: str
    target: float
    make_model: Callable[[], nn.Module]
    load: Callable[[Path], Source]
    interval: int = 5  # Steps between measurements of the loss.
    steps: int = 1500  # Limit of a run.


class Source:
    """Training batches, and a fixed sample of the training set to measure the loss on."""

    sample: list[Batch]

    def batches(self, seed: int) -> Iterator[Batch]:
        """Return endless batches."""
        raise NotImplementedError


class Images(Source):
    """Fashion-MNIST, 10,000 training images, in epochs of random order."""

    def __init__(self, folder: Path, batch: int = 256, measured: int = 2000) -> None:
        data = load_dataset("fashion_mnist", folder, train_samples=10_000, test_samples=10)
        self.inputs, self.labels = data.train_inputs, data.train_labels
        self.batch = batch
        parts = zip(
            self.inputs[:measured].split(500), self.labels[:measured].split(500), strict=True
        )
        self.sample = list(parts)

    def batches(self, seed: int) -> Iterator[Batch]:
        """Return batches of whole epochs, the incomplete last one left out."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.labels), generator=generator)
            for chosen in order.split(self.batch):
                if len(chosen) == self.batch:
                    yield self.inputs[chosen], self.labels[chosen]


class Text(Source):
    """Windows of tiny Shakespeare, each predicting the next character everywhere."""

    length = 64

    def __init__(self, folder: Path, batch: int = 32, measured: int = 128) -> None:
        for path in (folder / "tinyshakespeare" / "input.txt", folder / "input.txt"):
            if path.exists():
                break
        else:
            raise SystemExit(f"no tinyshakespeare/input.txt in {folder}")
        text = path.read_text(encoding="utf-8")
        number = {c: i for i, c in enumerate(sorted(set(text)))}
        codes = torch.tensor([number[c] for c in text])
        self.codes = codes[: int(0.9 * len(codes))]
        self.batch = batch
        generator = torch.Generator().manual_seed(1234)
        self.sample = [self._draw(generator, 32) for _ in range(measured // 32)]

    def _draw(self, generator: torch.Generator, count: int) -> Batch:
        starts = torch.randint(len(self.codes) - self.length, (count, 1), generator=generator)
        windows = self.codes[starts + torch.arange(self.length + 1)]
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def batches(self, seed: int) -> Iterator[Batch]:
        """Return batches of random windows."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield self._draw(generator, self.batch)


def make_mlp() -> nn.Module:
    return mlp((784, 512, 512, 512, 10), nn.ReLU)


def make_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 49, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


TASKS = {
    "mlp": Task("MLP 784-512-512-512-10, Fashion-MNIST, batch 256", 0.1, make_mlp, Images),
    "cnn": Task(
        "CNN (three convolutions, 32 channels), Fashion-MNIST, batch 256", 0.1, make_cnn, Images
    ),
    "transformer": Task(
        "transformer (2 layers, width 128), Shakespeare, 32 windows of 64 characters",
        1.7,
        Transformer,
        Text,
        interval=20,
        steps=1000,
    ),
}


# Methods.


@dataclass(frozen=True)
class Method:
    """How to make an optimizer, and the rates to search; None takes its own defaults.

    Attributes:
        make: Takes the model and a rate.
        usual: The rate in the middle of the search; None for no search.
    """

    make: Callable[[nn.Module, float | None], Optimizer]
    usual: float | None = None

    def rates(self, count: int) -> list[float | None]:
        """Return rates around the usual one, a factor √10 apart, rounded."""
        if self.usual is None:
            return [None]
        return [*rate_grid(self.usual, count)]

    def describe(self, rate: float | None) -> str:
        """Return what a table says of a rate."""
        return "default" if rate is None else f"{rate:g}"


def natural_gradient_methods() -> dict[str, Method]:
    """Return each with its defaults, and with a search around them."""
    kinds = {
        "kfac": natgrad.KFAC,
        "ekfac": natgrad.EKFAC,
        "tkfac": natgrad.TKFAC,
        "tekfac": natgrad.TEKFAC,
    }
    methods = {}
    for name, kind in kinds.items():

        def make(model: nn.Module, rate: float | None, kind: Any = kind) -> Optimizer:
            return kind(model, **({} if rate is None else {"lr": rate}))

        methods[name] = Method(make)
        methods[f"{name}-tuned"] = Method(make, 1.5)
    return methods


def first_order(name: str) -> Method:
    """Return a rival, which searches its rate."""
    return Method(lambda model, lr: make_rival(name, model, lr or 0.0), USUAL_RATES[name])


METHODS: dict[str, Method] = {
    **{name: first_order(name) for name in ("sgd", "adamw", "muon", "soap")},
    **natural_gradient_methods(),
}


def available(names: list[str]) -> list[str]:
    """Return the methods that can run here."""
    kept = []
    for name in names:
        if name not in METHODS:
            raise SystemExit(f"unknown method {name!r}: choose of {', '.join(METHODS)}")
        if reason := missing(name):
            print(f"# {reason}, {name} left out", file=sys.stderr)
        else:
            kept.append(name)
    return kept


# Runs.


@dataclass
class Run:
    """One training run, advanced in turns."""

    task: Task
    source: Source
    make: Callable[[nn.Module], Optimizer]
    seed: int
    label: dict[str, Any] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0
    state: str = "running"  # Then "reached", "diverged", "limit" or "stopped".
    curve: list[tuple[int, float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        self.model = self.task.make_model()
        self.optimizer = self.make(self.model)
        self.batches = self.source.batches(self.seed)
        self.measure()

    def advance(self, limit: float = math.inf) -> None:
        """Train up to the next measurement of the loss."""
        for _ in range(self.task.interval):
            inputs, targets = next(self.batches)
            start = time.perf_counter()
            self.optimizer.zero_grad()
            loss = self.loss(inputs, targets)
            loss.backward()
            self.optimizer.step()
            self.seconds += time.perf_counter() - start
            self.steps += 1
        self.measure()
        last = [loss for _, _, loss in self.curve[-3:]]
        if not math.isfinite(last[-1]) or last[-1] > 10 * self.curve[0][2]:
            self.finish("diverged")
        elif len(self.curve) > 3 and sum(last) / 3 <= self.task.target:
            self.finish("reached")
        elif self.steps >= self.task.steps or self.seconds >= limit:
            self.finish("limit")

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy over samples and positions."""
        return functional.cross_entropy(self.model(inputs).flatten(0, -2), targets.flatten())

    @torch.no_grad()
    def measure(self) -> None:
        """Append the loss over the fixed sample to the curve."""
        self.model.eval()
        losses = [float(self.loss(*batch)) for batch in self.source.sample]
        self.model.train()
        self.curve.append((self.steps, self.seconds, sum(losses) / len(losses)))

    def finish(self, state: str) -> None:
        """End the run and free its network."""
        self.state = state
        del self.model, self.optimizer, self.batches

    def record(self) -> dict[str, Any]:
        """Return the run as JSON values."""
        return {
            **self.label,
            "seed": self.seed,
            "state": self.state,
            "steps": self.steps,
            "seconds": self.seconds,
            "curve": self.curve,
        }


def take_turns(runs: list[Run], limit: float) -> None:
    """Advance all runs in turn until each has ended."""
    while True:
        running = [run for run in runs if run.state == "running"]
        if not running:
            return
        for run in running:
            run.advance(limit)


def race(runs: list[Run], limit: float) -> Run | None:
    """Advance runs in turn until one reaches the target; return it."""
    while True:
        running = [run for run in runs if run.state == "running"]
        if not running:
            return None
        for run in running:
            run.advance(limit)
        reached = [run for run in running if run.state == "reached"]
        if reached:
            for run in running:
                if run.state == "running":
                    run.finish("stopped")
            return min(reached, key=lambda run: run.curve[-1][2])


def start(task: Task, source: Source, name: str, rate: float | None, seed: int) -> Run:
    """Return a new run of a method."""
    method = METHODS[name]
    label = {"method": name, "rate": rate}
    return Run(task, source, lambda model: method.make(model, rate), seed, label)


def compare(
    task: Task, source: Source, names: list[str], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Search rates, train with every seed, print the table, and return all runs."""
    records: list[dict[str, Any]] = []
    chosen: dict[str, float | None] = {}
    search_seconds: dict[str, float] = {}
    for name in names:
        rates = METHODS[name].rates(arguments.rates)
        chosen[name], search_seconds[name] = rates[0], 0.0
        if len(rates) == 1:
            continue
        runs = [start(task, source, name, rate, seed=0) for rate in rates]
        winner = race(runs, arguments.limit)
        best = winner or min(runs, key=_last_loss)
        chosen[name] = best.label["rate"]
        search_seconds[name] = sum(run.seconds for run in runs)
        records += [{**run.record(), "stage": "search"} for run in runs]
    finals = [
        start(task, source, name, chosen[name], seed)
        for seed in range(1, 1 + arguments.seeds)
        for name in names
    ]
    take_turns(finals, arguments.limit)
    records += [{**run.record(), "stage": "final"} for run in finals]
    print(f"\n{task.title}; target {task.target:g}")
    print(
        f"{'method':<12} {'rate':>14} {'steps':>6} {'min – max':>13} "
        f"{'seconds':>8} {'min – max':>13} {'search s':>9}"
    )
    for name in names:
        runs = [run for run in finals if run.label["method"] == name]
        rate = METHODS[name].describe(chosen[name])
        steps = _spread(runs, lambda run: run.steps, "d")
        seconds = _spread(runs, lambda run: run.seconds, ".1f")
        print(
            f"{name:<12} {rate:>14} "
            f"{steps[0]:>6} {steps[1]:>13} {seconds[0]:>8} {seconds[1]:>13} "
            f"{search_seconds[name]:9.1f}"
        )
    sys.stdout.flush()
    return records


def _last_loss(run: Run) -> float:
    return run.curve[-1][2] if math.isfinite(run.curve[-1][2]) else math.inf


def _spread(runs: list[Run], value: Callable[[Run], float], form: str) -> tuple[str, str]:
    """Return median and range; a run that missed the target counts as infinitely long."""
    values = [value(run) if run.state == "reached" else math.inf for run in runs]

    def text(number: float) -> str:
        return "–" if math.isinf(number) else format(number, form)

    middle = statistics.median_low(values)
    return text(middle), f"{text(min(values))} – {text(max(values))}"


def draw(file: Path, found: dict[str, list[dict[str, Any]]]) -> None:
    """Draw loss against steps and seconds, one row per task, the first seed of every method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(found), 2, figsize=(10, 3.4 * len(found)), squeeze=False)
    for row, (name, records) in zip(axes, found.items(), strict=True):
        target = TASKS[name].target
        finals = [r for r in records if r["stage"] == "final" and r["seed"] == 1]
        for record in finals:
            steps, seconds, losses = zip(*record["curve"], strict=True)
            label = f"{record['method']} {METHODS[record['method']].describe(record['rate'])}"
            style = {"label": label, "color": f"C{list(METHODS).index(record['method'])}"}
            row[0].plot(steps, losses, **style)
            row[1].plot(seconds, losses, **style)
        for axis, unit in zip(row, ("steps", "seconds"), strict=True):
            axis.axhline(target, color="0.5", linewidth=0.8, linestyle="--")
            axis.set(xlabel=unit, ylabel="training loss", yscale="log", ylim=(0.8 * target, None))
        row[0].set_title(TASKS[name].title, fontsize="small", loc="left")
        row[1].legend(fontsize="x-small")
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def machine() -> dict[str, Any]:
    """Return versions and machine."""
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "natgrad": natgrad.__version__,
    }
    try:
        found["pytorch_optimizer"] = version("pytorch_optimizer")
    except PackageNotFoundError:
        pass
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("NATGRAD_DATA"))
    parser.add_argument("--tasks", default="mlp,cnn,transformer")
    parser.add_argument("--methods", default="sgd,adamw,muon,soap,kfac,ekfac")
    parser.add_argument("--seeds", type=int, default=3, help="runs of every method at its rate")
    parser.add_argument("--rates", type=int, default=5, help="rates a search tries")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds of a run at most")
    parser.add_argument("--threads", type=int, help="threads of PyTorch")
    parser.add_argument("--json", type=Path, help="file for all curves")
    parser.add_argument("--plot", type=Path, help="file for the figure")
    arguments = parser.parse_args()
    if arguments.seeds < 1 or arguments.rates < 1:
        parser.error("--seeds and --rates must be at least 1")
    if arguments.data is None:
        parser.error("give --data or set NATGRAD_DATA: the folder that holds fashion_mnist/ ...")
    tasks = arguments.tasks.split(",")
    for name in tasks:
        if name not in TASKS:
            parser.error(f"unknown task {name!r}: choose of {', '.join(TASKS)}")
    names = available(arguments.methods.split(","))
    warnings.simplefilter("ignore")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    described = machine()
    print(
        f"# torch {described['torch']}, {described['threads']} threads, "
        f"Python {described['python']}, {described['machine']}, natgrad {described['natgrad']}, "
        f"pytorch_optimizer {described.get('pytorch_optimizer', 'missing')}; "
        f"{arguments.rates} rates, {arguments.seeds} seeds"
    )
    found = {}
    for name in tasks:
        task = TASKS[name]
        source = task.load(Path(arguments.data))
        found[name] = compare(task, source, names, arguments)
        if arguments.json:
            content = {"machine": described, "tasks": found}
            arguments.json.write_text(json.dumps(content), encoding="utf-8")
    if arguments.plot:
        draw(arguments.plot, found)


if __name__ == "__main__":
    main()
