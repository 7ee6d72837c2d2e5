"""Pruning and rounding a network by its Fisher matrix.

A network of two hidden layers learns digits. Then weights are removed in one shot, without training
afterwards, by magnitude and by the saliencies of several structures, with and without adjusting
the other weights; and weights are rounded, where the predicted rise of the loss stands beside the
measured one, layer by layer.

    python examples/compression.py                       # 8 × 8 digits, seconds
    python examples/compression.py --dataset mnist --data DIR --samples 10000 --test-samples 10000
"""

from __future__ import annotations

import argparse
import copy
import json
import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from natgrad.experiments.data import load_dataset
from natgrad.experiments.drawing import line_style, new_figure

FRACTIONS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
STRUCTURES = ("diagonal", "kfac", "ekfac")
Data = tuple[Tensor, Tensor]


def trained(data: Data, width: int, epochs: int) -> nn.Module:
    x, y = data
    model = nn.Sequential(
        nn.Linear(x.shape[1], width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
        nn.Linear(width, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(100):
            optimizer.zero_grad()
            functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return model


def accuracy(model: nn.Module, data: Data) -> float:
    with torch.no_grad():
        return float((model(data[0]).argmax(1) == data[1]).double().mean())


def loss(model: nn.Module, data: Data) -> float:
    with torch.no_grad():
        return float(functional.cross_entropy(model(data[0]), data[1]))


def by_magnitude(model: nn.Module, fraction: float) -> None:
    weights = [p for n, p in model.named_parameters() if n.endswith("weight")]
    sizes = torch.cat([w.detach().abs().flatten() for w in weights])
    limit = sizes.kthvalue(round(fraction * len(sizes))).values
    with torch.no_grad():
        for weight in weights:
            weight.mul_(weight.abs() > limit)


def pruned(model: nn.Module, matrices: dict, test: Data, share: float) -> dict[str, list[float]]:
    """Return title → accuracies in the order of the fractions."""
    results: dict[str, list[float]] = {}
    for fraction in FRACTIONS:
        copied = copy.deepcopy(model)
        by_magnitude(copied, fraction)
        results.setdefault("magnitude", []).append(accuracy(copied, test))
        for structure, matrix in matrices.items():
            for adjust in (False, True) if structure != "diagonal" else (False,):
                copied = copy.deepcopy(model)
                natgrad.tools.prune(
                    copied, matrix, fraction, adjust=adjust,
                    damping=natgrad.RelativeDamping(share),
                )  # fmt: skip
                title = f"{structure}, adjusted" if adjust else structure
                results.setdefault(title, []).append(accuracy(copied, test))
    return results


def rounded(model: nn.Module, matrices: dict, data: Data) -> list[dict]:
    """Return predicted and measured rises of the training loss, by bits and layer."""
    before, results = loss(model, data), []
    for bits in (2, 3, 4, 6):
        errors = {s: natgrad.tools.quantization_error(model, m, bits) for s, m in matrices.items()}
        for layer in errors["kfac"].layers:
            copied = copy.deepcopy(model)
            name = f"{layer}.weight"
            copied.load_state_dict({name: errors["kfac"].rounded[name]}, strict=False)
            predicted = {s: e.layers[layer] for s, e in errors.items()}
            rise = loss(copied, data) - before
            results.append({"bits": bits, "layer": layer, "measured": rise, **predicted})
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", default="digits", choices=("digits", "mnist"))
    parser.add_argument("--data", default=os.environ.get("NATGRAD_DATA"))
    parser.add_argument("--samples", type=int, default=1200)
    parser.add_argument("--test-samples", type=int, default=597)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--width", type=int, default=100)
    parser.add_argument("--share", type=float, default=0.01, help="damping of saliencies")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results/compression"))
    arguments = parser.parse_args()
    found = load_dataset(
        arguments.dataset, arguments.data, train_samples=arguments.samples,
        test_samples=arguments.test_samples, seed=arguments.seed,
    )  # fmt: skip
    data = found.train_inputs.flatten(1), found.train_labels
    test = found.test_inputs.flatten(1), found.test_labels
    torch.manual_seed(arguments.seed)
    model = trained(data, arguments.width, arguments.epochs)
    loader = list(zip(data[0].split(1000), data[1].split(1000), strict=True))
    matrices = {s: natgrad.fisher_matrix(model, loader, structure=s) for s in STRUCTURES}
    print(f"accuracy {accuracy(model, test):.2%}")
    accuracies = pruned(model, matrices, test, arguments.share)
    for title, values in accuracies.items():
        print(f"{title:18s}", " ".join(f"{v:7.2%}" for v in values))
    rises = rounded(model, matrices, data)
    for one in rises:
        print("  ".join(f"{k} {v:.2e}" if isinstance(v, float) else f"{v}" for k, v in one.items()))
    arguments.output.mkdir(parents=True, exist_ok=True)
    results = {"fractions": FRACTIONS, "accuracies": accuracies, "rises": rises}
    (arguments.output / "compression.json").write_text(json.dumps(results, indent=1))
    figure, (left, right) = new_figure(2, 2)
    for index, (title, values) in enumerate(accuracies.items()):
        left.plot([100 * f for f in FRACTIONS], [100 * v for v in values], label=title,
                  **line_style(index))  # fmt: skip
    left.set(xlabel="weights removed, %", ylabel="test accuracy, %")
    left.legend(fontsize=8)
    for index, structure in enumerate(STRUCTURES):
        style = {**line_style(index + 2), "linestyle": ""}
        some = [one for one in rises if one["measured"] > 0]
        right.plot([r["measured"] for r in some], [r[structure] for r in some], label=structure,
                   **style)  # fmt: skip
    right.set(xlabel="measured rise of the loss", ylabel="predicted", xscale="log", yscale="log")
    right.axline((1e-3, 1e-3), (1e-2, 1e-2), color="grey", linewidth=1)
    right.legend(fontsize=8)
    figure.savefig(arguments.output / "compression.png", dpi=120)


if __name__ == "__main__":
    main()
