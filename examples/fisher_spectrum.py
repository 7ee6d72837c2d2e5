"""The spectrum of a network's Fisher matrix, in several structures and without its eigenvalues.

A network learns digits. Its exact Fisher matrix and its approximations are compared by their
spectra and by the effective dimension; the trace of the damped inverse is estimated from products.

    python examples/fisher_spectrum.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

import natgrad
from natgrad.experiments.data import load_dataset
from natgrad.experiments.drawing import line_style, new_figure

STRUCTURES = ("full", "block_diagonal", "kfac", "ekfac", "diagonal")
PRODUCTS = (10, 20, 40, 80, 160, 320)
DAMPING = 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("results/fisher-spectrum"))
    arguments = parser.parse_args()
    found = load_dataset("digits", train_samples=arguments.samples)
    x, y = found.train_inputs.flatten(1).double(), found.train_labels
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, arguments.width), nn.Tanh(), nn.Linear(arguments.width, 10)
    ).double()
    optimizer = natgrad.KFAC(model, "categorical")
    for _ in range(arguments.epochs):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    matrices = {s: natgrad.fisher_matrix(model, (x, y), structure=s) for s in STRUCTURES}
    points, dampings = torch.logspace(-7, 1, 300), torch.logspace(-6, 0, 50)
    figure, (left, middle, right) = new_figure(3, 3)
    results: dict = {"parameters": matrices["full"].shape[0], "dimension": {}, "errors": {}}
    for index, (structure, matrix) in enumerate(matrices.items()):
        density = natgrad.tools.spectral_density(matrix, 80, 10)
        style = {**line_style(index), "marker": ""}
        left.plot(points, density.per_decade(points, 0.15), label=structure, **style)
        dimension = natgrad.tools.effective_dimension(matrix, dampings)
        middle.plot(dampings, dimension, label=structure, **style)
        results["dimension"][structure] = {
            "exact": float(natgrad.tools.effective_dimension(matrix, DAMPING)),
            "lanczos": float(natgrad.tools.effective_dimension(density, DAMPING)),
        }
        print(structure, results["dimension"][structure])
    # tr F(F + λI)⁻¹ = P − λ tr (F + λI)⁻¹ where only products with F are to be had, and tr F.
    for name, matrix in {
        "F": matrices["full"],
        "inverse": matrices["full"].inverse(DAMPING),
    }.items():
        exact = float(matrix.to_dense().trace())
        for index, method in enumerate(("hutchinson", "hutch++", "xtrace")):
            errors = []
            for products in PRODUCTS:
                squares = [
                    (natgrad.tools.estimate_trace(matrix, products, method, seed=s)[0] / exact - 1)
                    ** 2
                    for s in range(arguments.repetitions)
                ]
                errors.append((sum(squares) / len(squares)) ** 0.5)
            results["errors"][f"{name}, {method}"] = errors
            print(name, method, " ".join(f"{e:.1e}" for e in errors))
            if name == "F":
                right.plot(PRODUCTS, errors, label=method, **line_style(index + 2))
    left.set(xscale="log", yscale="log", ylim=(1e-5, 3), xlabel="eigenvalue",
             ylabel="share of the spectrum per decade")  # fmt: skip
    middle.set(xscale="log", yscale="log", xlabel="damping", ylabel="effective dimension")
    right.set(xscale="log", yscale="log", xlabel="products", ylabel="relative error of tr F")
    for axes in (middle, right):
        axes.legend(fontsize=8)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "fisher-spectrum.json").write_text(json.dumps(results, indent=1))
    figure.savefig(arguments.output / "fisher-spectrum.png", dpi=120)


if __name__ == "__main__":
    main()
