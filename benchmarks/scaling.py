"""How time and peak memory of one training step grow with batch, outputs and parameters.

Every point is a process of its own: one method trains a multilayer perceptron of three layers with
the cross-entropy loss, on one thread. Time is the least processor time of a step, less that of a
step on a network of two units, which is what Python takes; memory is the peak of the process above
what it held after that small network. Exponents are the slopes of straight lines through the
logarithms, beside those of two predictions: the same slope for the number of multiplications (or of
entries held) that theory gives at the same points, and its limit far along the axis. Products and
factorisations do not run at one speed, so the two differ by some tenths where several terms count;
and where Python takes most of a step its growth is lost (nan: no longer than the small network).

    python benchmarks/scaling.py                              # about ten minutes
    python benchmarks/scaling.py --methods exact,kfac --axes batch --batch 32,64,128,256,512
    python benchmarks/scaling.py --json scaling.json --figure scaling.png
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from natgrad.curvature import Full
from natgrad.experiments.memory import PeakMemory
from natgrad.solvers import ConjugateGradient, Thermodynamic

#: Units of the input.
INPUTS = 64
#: Iterations of conjugate gradients and steps of the simulated process.
ITERATIONS, SIMULATED = 10, 20
#: Products that estimate the largest eigenvalue for the simulated process.
POWER_ITERATIONS = 4
AXES = ("batch", "outputs", "parameters")


@dataclass(frozen=True)
class Point:
    """One problem: N samples, C outputs, hidden layers of some width."""

    batch: int
    outputs: int
    width: int

    @property
    def layers(self) -> list[tuple[int, int]]:
        """Inputs with the bias, and outputs, of every layer."""
        sizes = (INPUTS, self.width, self.width, self.outputs)
        return [(d_in + 1, d_out) for d_in, d_out in zip(sizes, sizes[1:], strict=False)]

    @property
    def parameters(self) -> int:
        """P."""
        return sum(d_in * d_out for d_in, d_out in self.layers)

    def along(self, axis: str) -> int:
        """Return the coordinate on an axis."""
        return {"batch": self.batch, "outputs": self.outputs, "parameters": self.parameters}[axis]


# -- theory ----------------------------------------------------------------------------------------


def multiplications(method: str, point: Point) -> float:
    """Return the leading multiplications of a step."""
    n, c, layers, p = point.batch, point.outputs, point.layers, point.parameters
    behind_first = p - layers[0][0] * layers[0][1]
    units = sum(d_out for _, d_out in layers)
    plain = n * (2 * p + behind_first)  # forward, gradients of weights and of inputs
    cubes = sum(d_in**3 + d_out**3 for d_in, d_out in layers)
    moments = n * sum(d_in**2 + d_out**2 for d_in, d_out in layers)

    def pull_back(k: int) -> float:
        return n * k * behind_first

    def gram(k: int) -> float:
        return sum((n * k) ** 2 * d_out + n**2 * d_in for d_in, d_out in layers)

    def product(k: int) -> float:  # with J or its transpose
        return n * p + n * k * units

    def rows_or_gradient(d_in: int, d_out: int) -> float:
        on_rows = n * (d_in**2 + d_out**2 + d_in * d_out)
        return min(on_rows, d_in * d_out * (d_in + d_out))

    if method in ("sgd", "fngd"):
        return plain
    if method in ("exact", "egn", "block_diagonal"):
        solves = len(layers) if method == "block_diagonal" else 1
        total = plain + pull_back(c) + gram(c) + solves * (n * c) ** 3 / 3 + 3 * product(c)
        return total + (n * p if method == "egn" else 0.0)  # a trial of the line search
    if method == "improved":
        return plain + pull_back(1) + gram(1) + n**3 / 3 + 3 * product(1)
    if method == "conjugate_gradient":
        return plain + pull_back(c) + 2 * (ITERATIONS + 1) * product(c)
    if method == "thermodynamic":
        return plain + pull_back(c) + 2 * (SIMULATED + POWER_ITERATIONS) * product(c)
    if method == "kfac":
        applied = sum(rows_or_gradient(*layer) for layer in layers)
        return plain + pull_back(1) + moments + cubes + applied
    if method == "fngd_first":
        return plain + sum(n**2 * (d_in + d_out) + n**3 / 3 for d_in, d_out in layers)
    if method == "singd":
        applied = sum(d_in * d_out * (d_in + d_out) for d_in, d_out in layers)
        return plain + pull_back(1) + moments + 6 * cubes + applied
    raise ValueError(f"unknown method {method!r}")


def entries(method: str, point: Point) -> float:
    """Return the leading numbers held at once, model and gradients included."""
    n, c, layers, p = point.batch, point.outputs, point.layers, point.parameters
    units = sum(d_in + d_out for d_in, d_out in layers)
    plain = 3 * p + 2 * n * units
    behind = n * c * sum(d_out for _, d_out in layers)  # output gradients of C vectors
    squares = sum(d_in**2 + d_out**2 for d_in, d_out in layers)
    if method in ("exact", "egn"):
        return plain + 2 * behind + 4 * (n * c) ** 2
    if method == "block_diagonal":
        return plain + 2 * behind + (2 + 2 * len(layers)) * (n * c) ** 2
    if method == "improved":
        return plain + 4 * n**2
    if method in ("conjugate_gradient", "thermodynamic"):
        return plain + 2 * behind + 5 * p
    if method == "kfac":
        return plain + 5 * squares
    if method == "fngd_first":
        return plain + 4 * n**2
    if method == "singd":
        return plain + 8 * squares
    return plain


def slope(x: list[float], y: list[float]) -> float:
    """Return the exponent of a power law, by least squares in the logarithms."""
    if len(x) < 2 or min(y) <= 0:
        return math.nan
    u, v = [math.log(value) for value in x], [math.log(value) for value in y]
    mean_u, mean_v = sum(u) / len(u), sum(v) / len(v)
    above = sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v, strict=True))
    return above / sum((a - mean_u) ** 2 for a in u)


def limit(theory: Callable[[str, Point], float], method: str, axis: str) -> float:
    """Return the exponent far along an axis, everything else held."""
    if axis == "batch":
        points = [Point(10**k, 8, 128) for k in (8, 9)]
    elif axis == "outputs":
        points = [Point(64, 10**k, 128) for k in (8, 9)]
    else:
        points = [Point(64, 8, 10**k) for k in (8, 9)]
    return slope([p.along(axis) for p in points], [theory(method, p) for p in points])


# -- measurement -----------------------------------------------------------------------------------

Step = Callable[[], Any]


def methods() -> dict[str, Callable[[nn.Module], Any]]:
    """Return name → maker of the optimizer, at rates that leave the network about where it is."""

    def every_step(kind: type[natgrad.NaturalGradient], model: nn.Module) -> Any:
        return kind(model, lr=1e-4, refresh=replace(kind.method.refresh, factors=1, inverses=1))

    conjugate = Full(solver=ConjugateGradient(tolerance=0.0, max_iterations=ITERATIONS))
    process = Full(solver=Thermodynamic(time=SIMULATED))
    return {
        "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=1e-4, momentum=0.9),
        "kfac": lambda m: every_step(natgrad.KFAC, m),
        "exact": lambda m: natgrad.ExactNGD(m, lr=1e-4),
        "egn": lambda m: natgrad.EGN(m, lr=1e-4, damping=1.0),
        "block_diagonal": lambda m: natgrad.BlockDiagonalNGD(m, lr=1e-4),
        "improved": lambda m: natgrad.ImprovedEmpiricalNGD(m, lr=1e-4),
        "conjugate_gradient": lambda m: natgrad.ConjugateGradientNGD(
            m, lr=1e-4, structure=conjugate
        ),
        "thermodynamic": lambda m: natgrad.ThermodynamicNGD(m, lr=1e-4, structure=process),
        "fngd_first": lambda m: natgrad.FNGD(m, lr=1e-4, coefficient_steps=10**6),
        "fngd": lambda m: natgrad.FNGD(m, lr=1e-4, coefficient_steps=1),
        "singd": lambda m: every_step(natgrad.SINGD, m),
    }


def make_step(method: str, point: Point) -> Step:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(INPUTS, point.width),
        nn.Tanh(),
        nn.Linear(point.width, point.width),
        nn.Tanh(),
        nn.Linear(point.width, point.outputs),
    )
    inputs = torch.randn(point.batch, INPUTS)
    targets = torch.randint(0, point.outputs, (point.batch,))
    optimizer = methods()[method](model)

    def loss() -> Tensor:
        return functional.cross_entropy(model(inputs), targets)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return (lambda: optimizer.step(loss)) if method == "egn" else step


def seconds_per_step(step: Step, least: float) -> float:
    """Return the least processor time of a step, over at least so many seconds and five steps."""
    times: list[float] = []
    while len(times) < 5 or sum(times) < least:
        start = time.process_time()
        step()
        times.append(time.process_time() - start)
    return min(times)


def measure_one(method: str, point: Point) -> dict[str, float]:
    """Return seconds, the seconds of Python's share, and peak bytes, in this process."""
    torch.set_num_threads(1)
    small = make_step(method, Point(2, 2, 2))
    overhead = seconds_per_step(small, 0.05)
    with PeakMemory(torch.device("cpu")) as peak:
        step = make_step(method, point)
        for _ in range(3):
            step()
    seconds = seconds_per_step(step, 0.2)
    memory = math.nan if peak.bytes is None else peak.bytes
    return {"seconds": seconds, "overhead": overhead, "bytes": memory}


def in_another_process(method: str, point: Point) -> dict[str, float] | str:
    """Return the measurements of a point, or why there are none."""
    command = [sys.executable, __file__, "--one", method]
    command += [str(value) for value in (point.batch, point.outputs, point.width)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, capture_output=True, text=True, env=environment)
    if found.returncode:
        return found.stderr.strip().splitlines()[-1]
    result: dict[str, float] = json.loads(found.stdout.splitlines()[-1])
    return result


# -- report ----------------------------------------------------------------------------------------


def exponents(results: list[dict[str, Any]], method: str, axis: str) -> dict[str, float] | None:
    """Return measured and predicted exponents of a method along an axis."""
    kept = [r for r in results if r["method"] == method and axis in r["axes"]]
    points = [Point(r["batch"], r["outputs"], r["width"]) for r in kept]
    if len(points) < 2:
        return None
    x = [float(point.along(axis)) for point in points]
    memory = [float(r["bytes"]) for r in kept]
    return {
        "time": slope(x, [r["seconds"] - r["overhead"] for r in kept]),
        "time_predicted": slope(x, [multiplications(method, point) for point in points]),
        "time_limit": limit(multiplications, method, axis),
        "memory": slope(x, memory) if not any(map(math.isnan, memory)) else math.nan,
        "memory_predicted": slope(x, [entries(method, point) for point in points]),
        "memory_limit": limit(entries, method, axis),
        "first_ms": 1e3 * kept[0]["seconds"],
        "last_ms": 1e3 * kept[-1]["seconds"],
        "last_mib": memory[-1] / 2**20,
    }


def print_table(results: list[dict[str, Any]], names: list[str], axes: list[str]) -> None:
    for axis in axes:
        print(f"\n{axis}: exponents, measured (predicted here; far along the axis)")
        print(f"{'method':<19} {'time':>20} {'memory':>20} {'ms, first to last':>20} {'MiB':>7}")
        for name in names:
            found = exponents(results, name, axis)
            if found is None:
                continue
            columns = [
                f"{found[kind]:5.2f} ({found[f'{kind}_predicted']:.2f}; "
                f"{found[f'{kind}_limit']:.1f})"
                for kind in ("time", "memory")
            ]
            span = f"{found['first_ms']:.2f} to {found['last_ms']:.2f}"
            print(
                f"{name:<19} {columns[0]:>20} {columns[1]:>20} {span:>20} {found['last_mib']:7.1f}"
            )


def draw(path: Path, results: list[dict[str, Any]], names: list[str], axes: list[str]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(2, len(axes), figsize=(4.5 * len(axes), 7), squeeze=False)
    for column, axis in enumerate(axes):
        for name in names:
            kept = [r for r in results if r["method"] == name and axis in r["axes"]]
            x = [Point(r["batch"], r["outputs"], r["width"]).along(axis) for r in kept]
            grid[0][column].loglog(x, [1e3 * r["seconds"] for r in kept], "o-", label=name)
            grid[1][column].loglog(x, [r["bytes"] / 2**20 for r in kept], "o-", label=name)
        grid[0][column].set_ylabel("ms per step")
        grid[1][column].set_ylabel("peak MiB")
        grid[1][column].set_xlabel(axis)
    grid[0][0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path)


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", default=",".join(methods()))
    parser.add_argument("--axes", default=",".join(AXES), help="some of " + ", ".join(AXES))
    parser.add_argument("--batch", type=integers, default=[32, 64, 128, 256])
    parser.add_argument("--outputs", type=integers, default=[4, 8, 16, 32])
    parser.add_argument("--widths", type=integers, default=[64, 128, 256, 512])
    parser.add_argument(
        "--base", type=integers, default=[64, 8, 128],
        help="batch, outputs and width while another of them grows",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="write points and exponents to this file")
    parser.add_argument("--figure", type=Path, help="draw the points into this file")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.one:
        name, *sizes = arguments.one
        print(json.dumps(measure_one(name, Point(*map(int, sizes)))))
        return
    names, axes = arguments.methods.split(","), arguments.axes.split(",")
    unknown = [n for n in names if n not in methods()] + [a for a in axes if a not in AXES]
    if unknown:
        parser.error(f"unknown method or axis {unknown[0]!r}")
    batch, outputs, width = arguments.base
    points: dict[Point, list[str]] = {}
    for axis in axes:
        for value in {"batch": arguments.batch, "outputs": arguments.outputs}.get(
            axis, arguments.widths
        ):
            point = {
                "batch": Point(value, outputs, width),
                "outputs": Point(batch, value, width),
                "parameters": Point(batch, outputs, value),
            }[axis]
            points.setdefault(point, []).append(axis)
    print(
        f"# torch {torch.__version__}, 1 thread, Python {platform.python_version()}, "
        f"{platform.machine()}; {INPUTS}-w-w-C with w={width}, N={batch}, C={outputs} while "
        "another grows"
    )
    results: list[dict[str, Any]] = []
    for name in names:
        print(f"# {name}", file=sys.stderr)
        for point, along in points.items():
            found = in_another_process(name, point)
            if isinstance(found, str):
                print(f"# {name} at {point} left out: {found}", file=sys.stderr)
                continue
            sizes = {"batch": point.batch, "outputs": point.outputs, "width": point.width}
            results.append({"method": name, "axes": along, **sizes, **found})
    results.sort(key=lambda r: (r["batch"], r["outputs"], r["width"]))
    print_table(results, names, axes)
    if arguments.json:
        fitted = {n: {axis: exponents(results, n, axis) for axis in axes} for n in names}
        arguments.json.write_text(json.dumps({"points": results, "exponents": fitted}, indent=1))
    if arguments.figure:
        draw(arguments.figure, results, names, axes)


if __name__ == "__main__":
    main()
