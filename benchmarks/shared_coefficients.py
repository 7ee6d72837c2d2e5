"""What the options of FNGD are worth: training loss and test accuracy after some epochs.

FNGD computes the coefficients of its weighted sums of gradients in the first epoch and shares them
with all later ones. How they are shared, damped and scaled is a choice; here the choices train the
same network on the same batches, each at the best of the same number of learning rates (a factor
√10 apart, searched with the first seed). Beside them stand SGD with momentum, its ablation with a
fixed learning rate for every layer (``mean``), and K-FAC.

    export NATGRAD_DATA=DIR                  # holds fashion_mnist/
    python benchmarks/shared_coefficients.py --model cnn --epochs 10 --seeds 3
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from time_to_target import make_cnn, make_mlp
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from natgrad.experiments.data import Dataset, load_dataset


def make_normalised_cnn() -> nn.Module:
    """Return three convolutions with batch normalisation."""
    layers: list[nn.Module] = []
    for d_in, d_out in ((1, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(d_in, d_out, 3, padding=1, bias=False), nn.BatchNorm2d(d_out)]
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 9, 10))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": make_mlp,
    "cnn": make_cnn,
    "normalised": make_normalised_cnn,
}


@dataclass(frozen=True)
class Variant:
    """One way to train.

    Attributes:
        title: What the table calls it.
        options: Options of FNGD; None for SGD with momentum 0.9.
        shuffled: Whether batches change from epoch to epoch.
        rate: The learning rate the search begins at.
        refresh: Epochs between computations of coefficients.
    """

    title: str
    options: dict[str, Any] | None = field(default_factory=dict)
    shuffled: bool = True
    rate: float = 0.1
    refresh: int | None = None


VARIANTS = {
    "sgd": Variant("SGD, momentum 0.9", None, rate=0.05),
    "kfac": Variant("K-FAC, defaults", None),
    "position": Variant("position (default)"),
    "mean": Variant("mean: SGD with a rate per layer", {"share": "mean"}),
    "sample": Variant("sample", {"share": "sample"}),
    "sgd-ordered": Variant("SGD, no shuffling", None, shuffled=False, rate=0.05),
    "iteration": Variant("iteration, no shuffling", {"share": "iteration"}, shuffled=False),
    "damping-0.1": Variant("position, damping 0.1", {"damping": 0.1}),
    "damping-0.01": Variant("position, damping 0.01", {"damping": 0.01}),
    "relative": Variant("position, relative damping 1", {"damping_scale": "relative"}),
    "relative-0.1": Variant(
        "position, relative damping 0.1", {"damping_scale": "relative", "damping": 0.1}
    ),
    "per-layer": Variant("position, normalised per layer", {"normalization": "layer"}),
    "none": Variant("position, not normalised", {"normalization": "none"}),
    "improved": Variant("sample, improved Fisher", {"share": "sample", "fisher": "improved"}),
    "refreshed": Variant("position, refreshed every 3rd epoch", refresh=3),
    "sample-refreshed": Variant(
        "sample, refreshed every 3rd epoch", {"share": "sample"}, refresh=3
    ),
}


def batches(count: int, size: int, seed: int, shuffled: bool) -> Iterator[Tensor]:
    """Return the sample indices of endless batches, the incomplete ones left out."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator)
    while True:
        if shuffled:
            order = torch.randperm(count, generator=generator)
        for chosen in order.split(size):
            if len(chosen) == size:
                yield chosen


def make_optimizer(
    name: str, model: nn.Module, rate: float | None, steps: int
) -> torch.optim.Optimizer:
    variant = VARIANTS[name]
    if name == "kfac":
        return natgrad.KFAC(model)
    assert rate is not None
    if variant.options is None:
        return torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    refresh = None if variant.refresh is None else variant.refresh * steps
    return natgrad.FNGD(
        model, lr=rate, coefficient_steps=steps, refresh_interval=refresh, **variant.options
    )


def train(
    name: str, rate: float | None, seed: int, data: Dataset, arguments: argparse.Namespace
) -> tuple[float, float]:
    """Return the mean training loss over the last epoch and the test accuracy in per cent."""
    torch.manual_seed(seed)
    model = MODELS[arguments.model]()
    count = len(data.train_labels)
    steps = count // arguments.batch_size
    optimizer = make_optimizer(name, model, rate, steps)
    losses: list[float] = []
    stream = batches(count, arguments.batch_size, seed, VARIANTS[name].shuffled)
    for _, chosen in zip(range(arguments.epochs * steps), stream, strict=False):
        if isinstance(optimizer, natgrad.FNGD):
            optimizer.set_indices(chosen)
        optimizer.zero_grad()
        output = model(data.train_inputs[chosen])
        loss = functional.cross_entropy(output, data.train_labels[chosen])
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    model.eval()
    with torch.no_grad():
        parts = [model(part).argmax(1) for part in data.test_inputs.split(500)]
    accuracy = float((torch.cat(parts) == data.test_labels).float().mean())
    final = statistics.mean(losses[-steps:])
    return (final if math.isfinite(final) else math.inf), 100 * accuracy


def search(name: str, data: Dataset, arguments: argparse.Namespace) -> float | None:
    """Return the best of the rates tried around the usual one."""
    if name == "kfac":
        return None
    first = VARIANTS[name].rate
    rates = [first * 10 ** (k / 2) for k in range(-2, arguments.rates - 2)]
    found = {rate: train(name, rate, 0, data, arguments)[0] for rate in rates}
    return min(found, key=found.__getitem__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=tuple(MODELS), default="cnn")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--train-samples", type=int, default=10_000)
    parser.add_argument("--rates", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    folder = Path(os.environ.get("NATGRAD_DATA", "."))
    data = load_dataset(
        "fashion_mnist", folder, train_samples=arguments.train_samples, test_samples=2000
    )
    console = Console()
    table = Table("", "rate", "training loss", "test accuracy, %")
    rows = []
    for name in arguments.variants.split(","):
        rate = search(name, data, arguments)
        runs = [train(name, rate, seed, data, arguments) for seed in range(1, arguments.seeds + 1)]
        loss, accuracy = (statistics.median(column) for column in zip(*runs, strict=True))
        shown = "–" if rate is None else f"{rate:.2g}"
        table.add_row(VARIANTS[name].title, shown, f"{loss:.4f}", f"{accuracy:.1f}")
        rows.append({"variant": name, "rate": rate, "runs": runs})
        console.print(f"# {name}: rate {shown}, loss {loss:.4f}, accuracy {accuracy:.1f}")
    console.print(
        f"Fashion-MNIST, {arguments.train_samples} images, {arguments.model}, batch "
        f"{arguments.batch_size}, {arguments.epochs} epochs, median of {arguments.seeds} seeds"
    )
    console.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
