"""Two tasks, one after the other, and two models in one: what the Fisher matrix keeps.

A network learns digits, then the same digits with their pixels permuted, with an elastic penalty on
what the first task needs. Then two networks that were trained on from common parameters, one on the
digits 0 to 4 and one on 5 to 9, are merged into one for all. Both with several structures of the
Fisher matrix. Strengths and dampings are chosen on one half of the test images, accuracies are
those on the other.

    python examples/continual_learning.py                       # 8 × 8 digits, seconds
    python examples/continual_learning.py --dataset mnist --data DIR
"""

from __future__ import annotations

import argparse
import copy
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from natgrad.experiments.data import load_dataset
from natgrad.experiments.drawing import line_style, new_figure

STRUCTURES = ("diagonal", "kfac", "ekfac")
Data = tuple[Tensor, Tensor]


def train(
    model: nn.Module, data: Data, epochs: int, lr: float = 1e-3,
    penalty: Callable[[nn.Module], Tensor] | None = None,
) -> nn.Module:  # fmt: skip
    x, y = data
    optimizer = torch.optim.Adam(model.parameters(), lr)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(100):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x[batch]), y[batch])
            if penalty is not None:
                loss = loss + penalty(model)
            loss.backward()
            optimizer.step()
    return model


def accuracy(model: nn.Module, data: Data) -> float:
    with torch.no_grad():
        return float((model(data[0]).argmax(1) == data[1]).double().mean())


def halves(data: Data) -> tuple[Data, Data]:
    return (data[0][::2], data[1][::2]), (data[0][1::2], data[1][1::2])


def of_classes(data: Data, classes: range) -> Data:
    kept = torch.isin(data[1], torch.tensor(list(classes)))
    return data[0][kept], data[1][kept]


def one_after_the_other(model: nn.Module, first: Data, test: Data, epochs: int) -> list[dict]:
    """Train on a task, then on another with each penalty; return accuracies on both."""
    order = torch.randperm(first[0].shape[1])
    second, other = (first[0][:, order], first[1]), (test[0][:, order], test[1])
    train(model, first, epochs)
    results = []

    def measure(title: str, strength: float, trained: nn.Module) -> None:
        (a, c), (b, d) = halves(test), halves(other)
        results.append(
            {"penalty": title, "strength": strength, "first": accuracy(trained, c),
             "second": accuracy(trained, d),
             "chosen by": accuracy(trained, a) + accuracy(trained, b)}
        )  # fmt: skip

    measure("first task only", 0.0, model)
    measure("none", 0.0, train(copy.deepcopy(model), second, epochs))
    for structure in STRUCTURES:
        matrix = natgrad.fisher_matrix(model, first, "categorical", structure)
        for strength in (1.0, 10.0, 100.0, 1e3, 1e4):
            penalty = natgrad.tools.ewc_penalty(strength * matrix, model)
            measure(structure, strength, train(copy.deepcopy(model), second, epochs, 1e-3, penalty))
    return results


def two_in_one(model: nn.Module, data: Data, test: Data, epochs: int) -> list[dict]:
    """Train on from a network of few images on either half of the classes, and merge."""
    few = data[0][:500], data[1][:500]
    train(model, few, 3 * epochs)
    tasks = [of_classes(data, range(5)), of_classes(data, range(5, 10))]
    models = [train(copy.deepcopy(model), task, epochs, 3e-4) for task in tasks]
    results = []

    def measure(title: str, damping: float, merged: nn.Module) -> None:
        chosen, reported = (accuracy(merged, half) for half in halves(test))
        results.append({"merge": title, "damping": damping, "all": reported, "chosen by": chosen})

    measure("few images, before", 0.0, model)
    for title, one in zip(("0 to 4 only", "5 to 9 only"), models, strict=True):
        measure(title, 0.0, one)
    for structure in STRUCTURES:
        matrices = [
            natgrad.fisher_matrix(m, task, "categorical", structure)
            for m, task in zip(models, tasks, strict=True)
        ]
        mean = sum(float(f.trace()) for f in matrices) / 2 / matrices[0].shape[0]
        if structure == STRUCTURES[0]:
            measure("average", 0.0, natgrad.tools.merge(models, matrices, damping=1e9 * mean))
        for share in (1e-3, 1e-2, 1e-1, 1.0, 10.0):
            measure(structure, share, natgrad.tools.merge(models, matrices, damping=share * mean))
    return results


def best(results: list[dict], key: str) -> list[dict]:
    """Return the best of each kind."""
    kinds = dict.fromkeys(one[key] for one in results)
    return [max((r for r in results if r[key] == k), key=lambda r: r["chosen by"]) for k in kinds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", default="digits", choices=("digits", "mnist"))
    parser.add_argument("--data", default=os.environ.get("NATGRAD_DATA"))
    parser.add_argument("--samples", type=int, default=1200)
    parser.add_argument("--test-samples", type=int, default=597)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--width", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results/continual-learning"))
    arguments = parser.parse_args()
    found = load_dataset(
        arguments.dataset, arguments.data, train_samples=arguments.samples,
        test_samples=arguments.test_samples, seed=arguments.seed,
    )  # fmt: skip
    data = found.train_inputs.flatten(1), found.train_labels
    test = found.test_inputs.flatten(1), found.test_labels
    torch.manual_seed(arguments.seed)
    results = {}
    for title, experiment in {"tasks": one_after_the_other, "merging": two_in_one}.items():
        model = nn.Sequential(
            nn.Linear(data[0].shape[1], arguments.width), nn.ReLU(), nn.Linear(arguments.width, 10)
        )
        results[title] = experiment(model, data, test, arguments.epochs)
        for one in best(results[title], "penalty" if title == "tasks" else "merge"):
            print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else v for k, v in one.items()))
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "continual-learning.json").write_text(json.dumps(results, indent=1))
    figure, (axes,) = new_figure()
    kinds = dict.fromkeys(one["penalty"] for one in results["tasks"][1:])  # After both tasks.
    for index, kind in enumerate(kinds):
        mine = [one for one in results["tasks"] if one["penalty"] == kind]
        axes.plot([100 * r["first"] for r in mine], [100 * r["second"] for r in mine],
                  label=kind, **line_style(index))  # fmt: skip
    axes.set_xlabel("accuracy on the first task, %")
    axes.set_ylabel("accuracy on the second task, %")
    axes.legend()
    figure.savefig(arguments.output / "continual-learning.png", dpi=120)


if __name__ == "__main__":
    main()
