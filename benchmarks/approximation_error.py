"""How far every structure is from the exact Fisher matrix of a real network, along its training.

A small network learns the handwritten digits of scikit-learn. At some steps the exact Fisher matrix
F of 200 training images and the gradient g of their loss are formed, in float64, and every
structure is compared with them:

* matrix: the relative error ‖F̂ − F_b‖ / ‖F_b‖ to the block diagonal F_b of F, Frobenius norm;
* solution: ‖û − u‖ / ‖u‖ in the norm of F + λI, for û = (F̂ + λI)⁻¹g and the exact damped natural
  gradient u. A step of length zero has error 1;
* direction: the same at the best length of û, which leaves the angle between û and u: its sine.

All structures damp exactly, as they do by default outside training, so that approximations are
compared and not ways of damping. Two-level K-FAC has K-FAC's matrix. But for what rounding does to
the training, the numbers do not depend on the machine.

    python benchmarks/approximation_error.py                       # a minute, one thread
    python benchmarks/approximation_error.py --model cnn
    python benchmarks/approximation_error.py --steps 0,100 --damping 1e-3 --output errors.png
"""

from __future__ import annotations

import argparse
import copy
import math
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from natgrad import fisher_matrix

OUTPUT = Path(__file__).parent.parent / "docs" / "images" / "approximation-error.png"

#: Title → structure and options.
STRUCTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "diagonal": ("diagonal", {}),
    "unit-wise": ("unit_wise", {}),
    "TKFAC": ("tkfac", {}),
    "TEKFAC": ("tekfac", {}),
    "K-FAC": ("kfac", {}),
    "EKFAC": ("ekfac", {}),
    "KPSVD": ("kpsvd", {"rank": 1}),
    "KPSVD, rank 2": ("kpsvd", {"rank": 2}),
    "two-level, ones": ("two_level", {"coarse_space": "nicolaides"}),
    "two-level, spectral": ("two_level", {"coarse_space": "spectral"}),
    "two-level, residual": ("two_level", {"coarse_space": "residual"}),
    "two-level, Krylov": ("two_level", {"coarse_space": "krylov"}),
    "block-diagonal": ("block_diagonal", {}),
    "block-tridiagonal": ("block_tridiagonal", {}),
}


@dataclass(frozen=True)
class Errors:
    """Errors of one structure at one point of training; None where there is none."""

    matrix: float | None
    solution: float | None
    direction: float | None


def make_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "mlp":
        sizes = (64, 16, 16, 16, 10)
        layers: list[nn.Module] = [nn.Flatten()]
        for d_in, d_out in zip(sizes, sizes[1:], strict=False):
            layers += [nn.Linear(d_in, d_out), nn.Tanh()]
        return nn.Sequential(*layers[:-1])
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 16),
        nn.ReLU(),
        nn.Linear(16, 10),
    )


def trained(
    model: nn.Module, inputs: Tensor, labels: Tensor, steps: list[int]
) -> Iterator[tuple[int, nn.Module]]:
    """Yield the model after so many steps of Adam on batches of 100 images."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(max(steps) + 1):
        if step in steps:
            yield step, copy.deepcopy(model)
        chosen = torch.randint(0, len(inputs), (100,), generator=generator)
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs[chosen]), labels[chosen]).backward()
        optimizer.step()


def block_diagonal(matrix: Tensor, model: nn.Module) -> Tensor:
    """Keep what is between parameters of the same layer."""
    result = torch.zeros_like(matrix)
    with natgrad.Capture(model) as capture:
        layout = capture.layout
        layers = [block.layout for block in capture.blocks.values()]
    for layer in layers:
        slices = layout.slices(layer)
        for i in slices:
            for j in slices:
                result[i, j] = matrix[i, j]
    return result


def measure(model: nn.Module, data: tuple[Tensor, Tensor], damping: float) -> dict[str, Errors]:
    """Return the errors of every structure."""
    full = fisher_matrix(model, data, structure="full")
    exact = full.to_dense()
    blocks = block_diagonal(exact, model)
    loss = functional.cross_entropy(model(data[0]), data[1])
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    gradient = torch.cat([g.flatten() for g in gradients])
    solution = full.solve(gradient, damping)

    def product(left: Tensor, right: Tensor) -> float:
        return float(left @ (exact @ right) + damping * left @ right)

    square = product(solution, solution)
    result = {}
    for title, (structure, options) in STRUCTURES.items():
        found = fisher_matrix(model, data, structure=structure, **options)
        error = None
        if structure not in ("two_level", "block_tridiagonal"):
            error = float((found.to_dense() - blocks).norm() / blocks.norm())
        try:
            step = found.solve(gradient, damping)
        except ValueError:  # The block-tridiagonal matrix need not be positive definite.
            result[title] = Errors(error, None, None)
            continue
        difference = step - solution
        cosine = product(step, solution) / math.sqrt(square * product(step, step))
        result[title] = Errors(
            error,
            math.sqrt(product(difference, difference) / square),
            math.sqrt(max(0.0, 1 - cosine**2)),
        )
    return result


def print_table(name: str, points: dict[int, dict[str, Errors]], kind: str) -> None:
    print(f"\n{name}")
    print(f"{'structure':<24}" + "".join(f"{'step ' + str(step):>12}" for step in points))
    for title in STRUCTURES:
        values = [getattr(errors[title], kind) for errors in points.values()]
        if all(value is None for value in values):
            continue
        print(f"{title:<24}" + "".join(f"{'-' if v is None else f'{v:.4f}':>12}" for v in values))


def draw(points: dict[int, dict[str, Errors]], title: str, path: Path) -> None:
    """Draw one row of points per structure, the worst matrix at the top; darker is later."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter

    from natgrad.experiments.drawing import new_figure, save_figure

    last = points[max(points)]
    panels = {
        "matrix": "matrix: error to the block diagonal",
        "solution": "damped solve: error to the natural gradient",
    }
    figure, axes = new_figure(len(panels), len(panels))
    figure.set_size_inches(10.4, 4.9)
    shades = [1.0 - i / max(1, len(points) - 1) for i in range(len(points))]
    colours = [(0.02 + 0.6 * s**2, 0.12 + 0.7 * s, 0.35 + 0.6 * s) for s in shades]
    for axis, (kind, label) in zip(axes, panels.items(), strict=True):
        known = {t: getattr(e, kind) for t, e in last.items() if getattr(e, kind) is not None}
        shown = sorted((t for t in known if known[t] > 1e-9), key=lambda t: -known[t])
        for row, name in enumerate(shown):
            values = [getattr(errors[name], kind) for errors in points.values()]
            found = [v for v in values if v is not None]
            axis.plot([min(found), max(found)], [row, row], color="#c8c8c8", lw=1.2, zorder=1)
            for value, colour in zip(values, colours, strict=True):
                if value is not None:
                    axis.plot(value, row, "o", color=colour, ms=7, mec="white", mew=0.6, zorder=2)
        axis.set_yticks(range(len(shown)), shown)
        axis.set_ylim(len(shown) - 0.4, -0.6)
        axis.set_xscale("log")
        axis.grid(axis="y", visible=False)
        axis.tick_params(axis="y", length=0)
        axis.set_title(label, fontsize=11, loc="left")
        axis.set_xlabel("relative error")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axis.xaxis.set_minor_formatter(FuncFormatter(_minor_label))
        axis.tick_params(axis="x", which="minor", labelsize=8)
    axes[-1].axvline(1.0, color="#d55e00", ls="--", lw=1.0, zorder=0)
    marks = [
        Line2D([], [], ls="", marker="o", ms=7, mec="white", color=colour, label=f"step {step}")
        for step, colour in zip(points, colours, strict=True)
    ]
    marks.append(Line2D([], [], color="#d55e00", ls="--", lw=1.0, label="no step at all"))
    figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), frameon=False)
    figure.suptitle(title, fontsize=11.5, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(save_figure(figure, path.suffix[1:] or "png"))


def _minor_label(value: float, _: int) -> str:
    digit = round(value / 10 ** math.floor(math.log10(value)))
    return f"{value:g}" if digit in (2, 5) else ""


def main() -> None:
    from natgrad.experiments.data import load_dataset

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("mlp", "cnn"), default="mlp")
    parser.add_argument("--steps", default="0,10,100,1000", help="when to measure")
    parser.add_argument("--damping", type=float, default=1e-2, help="λ, in the units of F")
    parser.add_argument("--samples", type=int, default=200, help="images that F is the mean over")
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"the figure [{OUTPUT.name}]")
    arguments = parser.parse_args()
    dataset = load_dataset("digits")
    inputs, labels = dataset.train_inputs.double(), dataset.train_labels
    data = inputs[: arguments.samples], labels[: arguments.samples]
    model = make_model(arguments.model).double()
    size = sum(p.numel() for p in model.parameters())
    print(
        f"# torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}; "
        f"{arguments.model}, {size} parameters, digits, N={len(data[0])}, λ={arguments.damping:g}"
    )
    points: dict[int, dict[str, Errors]] = {}
    for step, snapshot in trained(
        model, inputs, labels, [int(step) for step in arguments.steps.split(",")]
    ):
        start = time.perf_counter()
        loss = functional.cross_entropy(snapshot(data[0]), data[1]).item()
        points[step] = measure(snapshot, data, arguments.damping)
        print(f"# step {step}: loss {loss:.3g}, {time.perf_counter() - start:.0f} s", flush=True)
    print_table("matrix", points, "matrix")
    print_table("solution", points, "solution")
    print_table("direction", points, "direction")
    network = f"{arguments.model.upper()} of {size} parameters on digits"
    title = f"Errors of Fisher approximations along training: {network}, λ = {arguments.damping:g}"
    draw(points, title, arguments.output)
    print(f"\n# figure: {arguments.output}")


if __name__ == "__main__":
    main()
