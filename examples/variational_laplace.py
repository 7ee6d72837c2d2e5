"""Error bars for a trained network: VariationalLaplace beside other Laplace approximations.

    python examples/variational_laplace.py --task gap                  # regression with a gap
    python examples/variational_laplace.py --task images --data DIR    # Fashion-MNIST
    python examples/variational_laplace.py --task images --data DIR --fast

*gap*: a network fits points on two intervals; between them it cannot know. The full linearised
Laplace posterior, exact Gaussian process regression here, is compared with VariationalLaplace from
few inducing points, chosen greedily or by k-means, and with the covariance fitted to the predictive
density. The figure shows mean and two standard deviations, without noise.

*images*: a small convolutional network is trained by Adam on all weights (MAP); then each posterior
is made around it, its prior precision by the evidence, or its bound, of the training data alone.
Measured on the test set: accuracy, negative log-likelihood (NLL), expected calibration error (ECE,
15 bins), and how well the entropy of a prediction tells MNIST's digits from test images (area under
the ROC curve, AUC). DIR (or the environment variable NATGRAD_DATA) holds both data sets in
sub-folders; each is standardised by its own mean and variance.

Both write a JSON file of their figures to the output folder, *gap* a picture beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from natgrad.experiments.data import DataError, Dataset, load_dataset

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

Row = dict[str, Any]


def show(rows: list[Row]) -> None:
    """Print figures as a table."""
    table = Table(box=box.SIMPLE, pad_edge=False)
    for column in rows[0]:
        table.add_column(column, justify="left" if column == "posterior" else "right")
    for row in rows:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v or "") for v in row.values()))
    Console(width=120).print(table)


# Regression with a gap.


def gap_data(samples: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return inputs on [−1, −0.4] and [0.3, 1] with noisy targets, for training and for testing."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(2 * samples, generator=generator, dtype=torch.float64)
    x = torch.where(uniform < 0.5, -1.0 + 1.2 * uniform, 0.3 + 1.4 * (uniform - 0.5)).unsqueeze(1)
    noise = torch.randn(2 * samples, 1, generator=generator, dtype=torch.float64)
    y = torch.sin(5.0 * x) + 0.5 * x + 0.1 * noise
    return x[:samples], y[:samples], x[samples:], y[samples:]


def fit_regression(x: Tensor, y: Tensor, steps: int) -> nn.Sequential:
    """Return a network trained by EGN."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 1)
    ).double()
    optimizer = natgrad.EGN(model, likelihood=natgrad.Gaussian(1.0))
    for _ in range(steps):

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = 0.5 * (model(x) - y).square().mean()
            value.backward()
            return value

        optimizer.step(loss)
    return model


def gap(options: argparse.Namespace) -> None:
    """Compare posteriors on the regression problem."""
    x, y, x_test, y_test = gap_data(60 if options.fast else 200, options.seed)
    model = fit_regression(x, y, 30 if options.fast else 100)
    # The noise and the prior precision with the largest evidence serve all bounds.
    chosen = natgrad.VariationalLaplace(model, (x, y), "gaussian", x)
    delta, variance = chosen.optimize_noise()
    noise = natgrad.Gaussian(variance)

    def sparse(points: int, selection: str) -> natgrad.VariationalLaplace:
        return natgrad.VariationalLaplace(
            model, (x, y), noise, points, selection=selection, prior_precision=delta,
            seed=options.seed,
        )  # fmt: skip

    full = natgrad.Laplace(model, (x, y), noise, "full", prior_precision=delta)
    points = options.points or 20
    whole, source = sparse(points, "greedy"), sparse(points, "greedy")
    for posterior, mean_term in ((whole, True), (source, False)):
        posterior.fit_predictive((x, y), 50 if options.fast else 500, mean_term=mean_term)
    posteriors: dict[str, natgrad.Laplace | natgrad.VariationalLaplace] = {
        "full": full,
        f"{points // 2} points, greedy": sparse(points // 2, "greedy"),
        f"{points} points, greedy": sparse(points, "greedy"),
        f"{points} points, k-means": sparse(points, "k_means"),
        f"{points} points, predictive fit": whole,
        "the same, as in the source": source,
    }
    grid = torch.linspace(-1.5, 1.5, 301, dtype=torch.float64).unsqueeze(1)
    middle = torch.linspace(-0.25, 0.15, 41, dtype=torch.float64).unsqueeze(1)
    rows, curves = [], {}
    for name, posterior in posteriors.items():
        mean, total = posterior.predict(x_test)
        nll = 0.5 * ((2 * torch.pi * total).log() + (y_test - mean).square() / total).mean()
        variances = [posterior.functional_variance(at)[1][:, 0, 0] for at in (x_test, middle)]
        inside, between = (float(one.sqrt().mean()) for one in variances)
        rows.append(
            {
                "posterior": name,
                "bound": None
                if "predictive" in name or posterior is source
                else posterior.log_marginal_likelihood(),
                "δ": posterior.prior_precision,
                "noise": posterior.likelihood.variance**0.5,
                "at data": inside,
                "in gap": between,
                "test NLL": float(nll),
            }
        )
        mean, covariance = posterior.functional_variance(grid)
        curves[name] = mean[:, 0], covariance[:, 0, 0].sqrt()
    show(rows)
    draw(options.output / "variational-laplace-gap.png", x, y, grid, curves)
    (options.output / "gap.json").write_text(json.dumps(rows, indent=1))


def draw(
    file: Path, x: Tensor, y: Tensor, grid: Tensor, curves: dict[str, tuple[Tensor, Tensor]]
) -> None:
    """Draw mean and two standard deviations of every posterior."""
    figure, axes = pyplot.subplots(2, 3, figsize=(12, 6), sharex=True, sharey=True)
    for axis, (name, (mean, deviation)) in zip(axes.flat, curves.items(), strict=True):
        axis.fill_between(
            grid[:, 0], mean - 2 * deviation, mean + 2 * deviation, alpha=0.3, linewidth=0
        )
        axis.plot(grid[:, 0], mean)
        axis.plot(x, y, ".", color="black", markersize=2)
        axis.set(title=name, ylim=(-3, 3))
    figure.tight_layout()
    figure.savefig(file, dpi=120)


# Fashion-MNIST.


def network() -> nn.Sequential:
    """Return a convolutional network of 52,138 weights."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(784, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def fit_network(data: Dataset, epochs: int, seed: int) -> nn.Sequential:
    """Train the network."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(data.train_inputs), generator=order).split(256):
            optimizer.zero_grad()
            output = model(data.train_inputs[batch])
            functional.cross_entropy(output, data.train_labels[batch]).backward()
            optimizer.step()
    return model.eval()


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Return ``Σ_b |accuracy − confidence| · share`` over bins of confidence."""
    confidence, predicted = probabilities.max(1)
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gaps = (predicted == labels).to(confidence.dtype) - confidence
    return float(gaps.new_zeros(bins).index_add_(0, index, gaps).abs().sum()) / len(labels)


def separation(inside: Tensor, outside: Tensor) -> float:
    """Return the area under the ROC curve of telling by the entropy, ties counted half."""
    entropies = [torch.special.entr(one.double()).sum(1) for one in (inside, outside)]
    ranks = torch.unique(torch.cat(entropies), return_inverse=True, return_counts=True)
    mean_rank = ranks[2].cumsum(0) - (ranks[2] - 1) / 2  # Of equal values.
    n, m = len(inside), len(outside)
    return (float(mean_rank[ranks[1]][n:].sum()) - m * (m + 1) / 2) / (n * m)


def measure(name: str, predict: Callable[[Tensor], Tensor], data: Dataset, digits: Tensor) -> Row:
    """Return the figures of one way to predict."""
    inside, outside = predict(data.test_inputs), predict(digits)
    labels = data.test_labels
    return {
        "posterior": name,
        "accuracy %": 100 * float((inside.argmax(1) == labels).float().mean()),
        "NLL": float(functional.nll_loss(inside.clamp(min=1e-38).log(), labels)),
        "ECE %": 100 * calibration_error(inside, labels),
        "AUC": separation(inside, outside),
    }


def images(options: argparse.Namespace) -> None:
    """Compare posteriors on Fashion-MNIST."""
    if options.data is None:
        raise SystemExit(
            "Fashion-MNIST and MNIST are read from files: give --data DIR or set NATGRAD_DATA, the "
            "folder with fashion_mnist/train-images-idx3-ubyte.gz and so on."
        )
    train, test = (10_000, 1_000) if options.fast else (None, 3_000)
    try:
        data = load_dataset("fashion_mnist", options.data, train_samples=options.samples or train,
                            test_samples=test, seed=options.seed)  # fmt: skip
        digits = load_dataset("mnist", options.data, train_samples=1_000, test_samples=test)
    except DataError as error:
        raise SystemExit(str(error)) from error
    model = fit_network(data, 5 if options.fast else 15, options.seed)
    with torch.no_grad():
        rows = [measure("MAP", lambda x: model(x).softmax(1), data, digits.test_inputs)]
    show(rows)
    torch.manual_seed(options.seed)
    pairs = torch.utils.data.TensorDataset(data.train_inputs, data.train_labels)
    loader = torch.utils.data.DataLoader(pairs, batch_size=100, shuffle=True)
    points, steps = (20, 40) if options.fast else (100, 200)
    points, steps = options.points or points, options.steps or steps

    def sparse(outputs: Any) -> natgrad.VariationalLaplace:
        return natgrad.VariationalLaplace(
            model, loader, "categorical", points, outputs=outputs, steps=steps, seed=options.seed
        )

    def predictive(mean_term: bool) -> natgrad.VariationalLaplace:
        posterior = sparse("all")
        posterior.optimize_prior_precision()
        posterior.fit_predictive(loader, steps, mean_term=mean_term)
        return posterior

    def laplace(structure: str, parameters: Any = "all") -> natgrad.Laplace:
        return natgrad.Laplace(model, loader, "categorical", structure, parameters=parameters)

    ways: dict[str, Callable[[], natgrad.Laplace | natgrad.VariationalLaplace]] = {
        "last layer, full": lambda: laplace("full", "last_layer"),
        "K-FAC": lambda: laplace("kfac"),
        f"{points} points": lambda: sparse("all"),
        f"{points} points, one output each": lambda: sparse("one"),
        f"{points} points, predictive fit": lambda: predictive(True),
        "the same, as in the source": lambda: predictive(False),
    }
    for name, make in ways.items():
        start = time.process_time()
        posterior = make()
        if name not in list(ways)[-2:]:
            posterior.optimize_prior_precision()
        fitted = time.process_time() - start
        with torch.no_grad():
            row = measure(name, lambda x, p=posterior: p.predict(x), data, digits.test_inputs)
        row["δ"] = posterior.prior_precision
        row["seconds to fit"] = fitted
        rows.append(row)
        (options.output / "images.json").write_text(json.dumps(rows, indent=1))
    show([{**dict.fromkeys(rows[-1], ""), **row} for row in rows])


def main(arguments: list[str] | None = None) -> None:
    """Run a task."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--task", choices=["gap", "images"], default="gap")
    parser.add_argument("--data", type=Path, default=os.environ.get("NATGRAD_DATA"))
    parser.add_argument("--fast", action="store_true", help="a size for minutes on a CPU")
    parser.add_argument("--samples", type=int, default=None, help="training images")
    parser.add_argument(
        "--points",
        type=int,
        default=None,
        help="inducing points: 20 for the gap; 100 for images, fast 20",
    )
    parser.add_argument("--steps", type=int, default=None, help="mini-batches: 200, fast 40")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results/variational_laplace"))
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    {"gap": gap, "images": images}[options.task](options)


if __name__ == "__main__":
    main()
