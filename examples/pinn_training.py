"""What the examples of physics-informed networks share: the optimizers, the clock, the report.

A problem says what its residuals are (``natgrad.Residual``, for the natural gradients, on a
``natgrad.TaylorNetwork``) and writes the same loss once more the ordinary way, by differentiating
the network twice with autograd, for the first-order rivals: that is what a user of Adam would do,
and on these networks it is the faster of the two for them.

Every optimizer gets the same network, the same points and the same seconds. Measuring is not
counted.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import matplotlib
import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

import natgrad
from natgrad.residuals import Residual, ResidualNetwork, TaylorNetwork

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

Step = Callable[[], None]

OPTIMIZERS = {
    "adam": "Adam, cosine",
    "lbfgs": "L-BFGS",
    "implicit": "implicit SGD",
    "kfac": "K-FAC",
    "block_diagonal": "block-diagonal NGD",
    "exact": "exact NGD",
    "egn": "EGN",
}
STYLES = {
    "adam": ("#7f7f7f", "-"),
    "lbfgs": ("#bcbd22", "--"),
    "implicit": ("#17becf", ":"),
    "kfac": ("#1f77b4", "-"),
    "block_diagonal": ("#9467bd", "-."),
    "exact": ("#d62728", "-"),
    "egn": ("#ff7f0e", "--"),
}
ADAM_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


class Problem(ABC):
    """A differential equation with a known solution.

    Attributes:
        name: For file names.
        residuals: The parts of the loss, as functions of a Taylor expansion.
        grid: Points the error is measured at, ``(A·B, 2)``, along the first coordinate first.
        truth: The solution there, ``(A·B, 1)``.
        shape: ``(A, B)``.
        axes: What the two coordinates are called.
    """

    name: str
    residuals: dict[str, Residual]
    grid: Tensor
    truth: Tensor
    shape: tuple[int, int]
    axes: tuple[str, str]

    @abstractmethod
    def taylor(self, network: nn.Sequential) -> TaylorNetwork:
        """Return the network with the derivatives that the residuals need."""

    @abstractmethod
    def loss(self, network: nn.Module) -> Tensor:
        """Return the loss of the residuals by ordinary automatic differentiation."""

    @torch.no_grad()
    def field(self, network: nn.Module) -> Tensor:
        """Return u − u* on the grid, as an image ``(A, B)``."""
        return (network(self.grid) - self.truth).view(self.shape)

    def error(self, network: nn.Module) -> float:
        """Return ‖u − u*‖ / ‖u*‖."""
        return float(self.field(network).norm() / self.truth.norm())


def perceptron(width: int, depth: int, seed: int) -> nn.Sequential:
    """Return a tanh network from two coordinates to one value, in float64."""
    torch.manual_seed(seed)
    widths = [2, *[width] * depth, 1]
    layers: list[nn.Module] = []
    for before, after in zip(widths, widths[1:], strict=False):
        linear = nn.Linear(before, after)
        nn.init.xavier_normal_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


# The optimizers: each function returns what takes one step.


def adam(network: nn.Module, problem: Problem, lr: float, spent: Callable[[], float]) -> Step:
    """Adam; the rate falls as a cosine of the share of time (or steps) spent."""
    optimizer = torch.optim.Adam(network.parameters(), lr)

    def step() -> None:
        optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * min(1.0, spent())))
        optimizer.zero_grad()
        problem.loss(network).backward()
        optimizer.step()

    return step


def closure_of(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> Callable:
    """Return a closure that clears gradients, evaluates the loss and backpropagates."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    return closure


def lbfgs(network: nn.Module, problem: Problem) -> Step:
    """L-BFGS, ten iterations per step, restarted where its line search gets stuck."""

    def make() -> torch.optim.LBFGS:
        return torch.optim.LBFGS(
            network.parameters(), lr=1.0, max_iter=10, history_size=100, tolerance_grad=0.0,
            tolerance_change=0.0, line_search_fn="strong_wolfe",
        )  # fmt: skip

    optimizer = make()

    def step() -> None:
        nonlocal optimizer
        before = [p.detach().clone() for p in network.parameters()]
        optimizer.step(closure_of(optimizer, lambda: problem.loss(network)))
        if all(torch.equal(p, old) for p, old in zip(network.parameters(), before, strict=True)):
            optimizer = make()

    return step


def implicit(network: nn.Module, problem: Problem, lr: float) -> Step:
    """Implicit SGD on all points, its inner problems by L-BFGS."""
    optimizer = natgrad.ImplicitSGD(network.parameters(), lr=lr, inner_steps=50, history=50)
    closure = closure_of(optimizer, lambda: problem.loss(network))
    return lambda: optimizer.step(closure)


def kfac(network: nn.Sequential, problem: Problem) -> Step:
    """K-FAC with the step and momentum that minimise the quadratic model."""
    model = ResidualNetwork(problem.taylor(network), problem.residuals)
    optimizer = natgrad.KFAC(
        model, "gaussian", fisher="exact", lr=1.0, momentum=0.9, kl_clip=None,
        damping=natgrad.LevenbergMarquardt(initial=1.0, interval=1, minimum=1e-10),
        refresh=natgrad.Refresh(factors=1, inverses=1, decay=0.95),
        step_rule=natgrad.StepRule(length="quadratic_model"),
    )  # fmt: skip
    closure = closure_of(optimizer, model.loss)
    return lambda: optimizer.step(closure)


def natural(network: nn.Sequential, problem: Problem, structure: str) -> Step:
    """Natural gradient with an exact matrix and nothing to tune."""
    model = problem.taylor(network)
    optimizer = natgrad.ResidualNGD(model, problem.residuals, structure=structure)
    return lambda: optimizer.step()


def egn(network: nn.Sequential, problem: Problem, options: argparse.Namespace) -> Step:
    """Exact Gauss-Newton by natgrad's optimizer for any loss."""
    model = ResidualNetwork(problem.taylor(network), problem.residuals)
    optimizer = natgrad.EGN(
        model, "gaussian",
        damping=natgrad.LevenbergMarquardt(
            initial=options.damping, interval=1, decay=0.5, minimum=1e-14, maximum=1e3
        ),
        step_rule=natgrad.StepRule(length=natgrad.LineSearch(max_trials=20)),
    )  # fmt: skip
    return lambda: optimizer.step(model.loss)


def make_step(
    name: str,
    network: nn.Sequential,
    problem: Problem,
    options: argparse.Namespace,
    spent: Callable[[], float],
) -> Step:
    """Return what takes one step of an optimizer."""
    if name == "adam":
        return adam(network, problem, options.adam_lr, spent)
    if name == "implicit":
        return implicit(network, problem, options.implicit_lr)
    if name in ("exact", "block_diagonal"):
        return natural(network, problem, "full" if name == "exact" else name)
    if name == "egn":
        return egn(network, problem, options)
    return {"lbfgs": lbfgs, "kfac": kfac}[name](network, problem)


@dataclass
class Run:
    """What an optimizer did."""

    name: str
    seed: int
    lr: float | None = None
    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)


def train(
    name: str, seed: int, problem: Problem, options: argparse.Namespace, progress: Progress
) -> tuple[Run, nn.Module]:
    """Train a fresh network until its seconds or steps are used up; measuring is not counted."""
    network = perceptron(options.width, options.depth, seed)
    run = Run(name, seed, options.adam_lr if name == "adam" else None)
    clock = time.process_time if options.cpu_time else time.perf_counter
    elapsed, taken, measured = 0.0, 0, 0.0

    def spent() -> float:
        return max(elapsed / options.seconds, taken / (options.steps or math.inf))

    step = make_step(name, network, problem, options, spent)

    def measure() -> None:
        run.losses.append(float(problem.loss(network).detach()))
        run.errors.append(problem.error(network))
        run.steps.append(taken)
        run.seconds.append(elapsed)

    measure()
    bar = progress.add_task(f"{OPTIMIZERS[name]:<18}", total=1.0, measured="")
    while spent() < 1:
        begin = clock()
        step()
        elapsed += clock() - begin
        taken += 1
        if taken <= 5 or elapsed - measured >= options.seconds / 60 or spent() >= 1:
            measure()
            measured = elapsed
            progress.update(
                bar,
                completed=min(1.0, spent()),
                measured=f"step {taken:>6}  loss {run.losses[-1]:.1e}  error {run.errors[-1]:.1e}",
            )
    progress.stop_task(bar)
    return run, network


# The report.


def draw(problem: Problem, runs: list[Run], fields: dict[str, Tensor], path: Path) -> None:
    """Draw errors against seconds and steps, and where the errors of three networks are."""
    pyplot.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    shown = [name for name in ("adam", "kfac", "exact") if name in fields] or list(fields)[:3]
    figure = pyplot.figure(figsize=(11, 7.4), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.25, 1))
    left, right = upper.subplots(1, 2, sharey=True)
    named: set[str] = set()
    for run in runs:
        colour, line = STYLES[run.name]
        label = None if run.name in named else OPTIMIZERS[run.name]
        named.add(run.name)
        for axes, x in ((left, run.seconds), (right, run.steps)):
            axes.plot(x, run.errors, line, color=colour, label=label, linewidth=1.8)
    left.set(xlabel="seconds", ylabel="relative L2 error", yscale="log")
    right.set(xlabel="steps", yscale="log")
    right.set_xscale("symlog", linthresh=1)
    right.set_xlim(0)
    for axes in (left, right):
        axes.grid(alpha=0.25)
    upper.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=len(named),
                 frameon=False)  # fmt: skip
    logs = {name: fields[name].abs().clamp(min=1e-16).log10() for name in shown}
    low = min(float(image.quantile(0.02)) for image in logs.values())
    high = max(float(image.max()) for image in logs.values())
    panels = lower.subplots(1, len(shown) + 1)
    (x0, y0), (x1, y1) = problem.grid.amin(0).tolist(), problem.grid.amax(0).tolist()
    images = [("solution u*", problem.truth.view(problem.shape), None), *[
        (f"log₁₀ |u − u*|: {OPTIMIZERS[name]}", logs[name], (low, high)) for name in shown
    ]]  # fmt: skip
    for axes, (title, image, limits) in zip(panels, images, strict=True):
        vmin, vmax = limits or (None, None)
        drawn = axes.imshow(
            image.T, origin="lower", extent=(x0, x1, y0, y1), vmin=vmin, vmax=vmax, aspect="auto",
            cmap="RdBu_r" if limits is None else "viridis",
        )  # fmt: skip
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(problem.axes[0])
        if limits is None:
            axes.set_ylabel(problem.axes[1])
        if limits is None or title == images[-1][0]:
            lower.colorbar(drawn, ax=axes, shrink=0.8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def report(console: Console, runs: list[Run]) -> None:
    """Print what was reached: medians over seeds, and the range of the errors."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("optimizer", no_wrap=True)
    several = len({run.seed for run in runs}) > 1
    headings = ["steps", "seconds", "ms/step", "loss", "relative L2 error"]
    for heading in headings + ["least – largest"] * several:
        table.add_column(heading, justify="right")
    errors: dict[str, float] = {}
    for name in dict.fromkeys(run.name for run in runs):
        mine = [run for run in runs if run.name == name]
        steps, seconds = (median(getattr(run, x)[-1] for run in mine) for x in ("steps", "seconds"))
        last = [run.errors[-1] for run in mine]
        errors[name] = median(last)
        rate = f", lr {mine[0].lr:g}" if mine[0].lr else ""
        cells = [
            OPTIMIZERS[name] + rate, f"{steps:,.0f}", f"{seconds:.1f}",
            f"{1000 * seconds / max(1, steps):.1f}",
            f"{median(run.losses[-1] for run in mine):.1e}", f"{errors[name]:.1e}",
        ]  # fmt: skip
        table.add_row(*cells, *[f"{min(last):.1e} – {max(last):.1e}"] * several)
    console.print(table)
    for name in ("block_diagonal", "exact", "egn"):
        if {"adam", name} <= set(errors):
            ratio = errors["adam"] / errors[name]
            console.print(f"Adam's error is {ratio:,.0f} times that of {OPTIMIZERS[name]}.")


def parser(description: str, **defaults: float) -> argparse.ArgumentParser:
    """Return the command line that the examples share."""
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = result.add_argument
    add("--optimizer", choices=[*OPTIMIZERS, "all"], default=["all"], nargs="+")
    add("--seconds", type=float, help="per optimizer: 60, fast 7")
    add("--steps", type=int, help="stop earlier, after these steps")
    add("--cpu-time", action="store_true", help="count seconds of the processor: for busy machines")
    add("--fast", action="store_true", help="fewer points, 7 s per optimizer")
    add("--seed", type=int, default=0)
    add("--seeds", type=int, default=1, help="how many, from --seed on")
    add("--search", action="store_true", help=f"try Adam's rates {ADAM_RATES} and keep the best")
    add("--width", type=int)
    add("--depth", type=int, help="hidden layers")
    add("--adam-lr", type=float)
    add("--implicit-lr", type=float)
    add("--damping", type=float, help="of EGN, to begin with")
    add("--output", type=Path)
    result.set_defaults(**defaults)
    return result


def complete(options: argparse.Namespace, **choices: tuple[float, float]) -> argparse.Namespace:
    """Fill in what depends on ``--fast``: option → (value, value with --fast)."""
    for name, (full, fast) in {"seconds": (60.0, 7.0), **choices}.items():
        if getattr(options, name) is None:
            setattr(options, name, fast if options.fast else full)
    return options


def compare(make_problem: Callable[[int], Problem], options: argparse.Namespace) -> list[Run]:
    """Train with every optimizer and seed, and report.

    Args:
        make_problem: Returns the problem with points of a seed.
        options: The command line.
    """
    console = Console()
    names = list(OPTIMIZERS) if "all" in options.optimizer else options.optimizer
    runs: list[Run] = []
    fields: dict[str, Tensor] = {}
    with Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=24),
        TextColumn("{task.fields[measured]}"), TimeElapsedColumn(), console=console,
    ) as progress:  # fmt: skip
        for seed in range(options.seed, options.seed + options.seeds):
            problem = make_problem(seed)
            for name in names:
                rates = ADAM_RATES if name == "adam" and options.search else (options.adam_lr,)
                tried = []
                for rate in rates:
                    chosen = argparse.Namespace(**{**vars(options), "adam_lr": rate})
                    tried.append(train(name, seed, problem, chosen, progress))
                run, network = min(tried, key=lambda pair: pair[0].errors[-1])
                runs.append(run)
                fields[name] = problem.field(network)
    options.output.mkdir(parents=True, exist_ok=True)
    draw(problem, runs, fields, options.output / "pinn.png")
    (options.output / "pinn.json").write_text(json.dumps([asdict(run) for run in runs], indent=1))
    report(console, runs)
    console.print(f"Plot: {options.output / 'pinn.png'}")
    return runs
