r"""A physics-informed network for the Poisson equation, by natural gradients.

    python examples/poisson_pinn.py --fast
    python examples/poisson_pinn.py --optimizer exact --seconds 30

A small tanh network learns the solution of −Δu = f on the unit square with u = g on its boundary,
from nothing but the residuals of these two equations. Every optimizer gets the same network, the
same points and the same seconds; the plot shows the relative L2 error against the known solution.

What makes natural gradients of differential operators easy: the network propagates a *stack* of
T = 4 rows per point, namely the value, both first derivatives and the Laplacian, so that no
derivative is ever taken by automatic differentiation with respect to the points. Each linear layer
is called once, on the whole stack; its bias is the weight of a coordinate that is 1 in the row of
the value and 0 in the others. To natgrad that is an ordinary linear layer whose weight is shared by
four positions. Its rows J_n = Σ_t δ_nt a_ntᵀ are exact, and every optimizer works as it is (the
Kronecker factors are those of Dangel, Müller & Zeinhofer, *Kronecker-factored approximate curvature
for physics-informed neural networks*, 2024, with one pair for both kinds of points).

The optimizers:

* ``adam``: Adam with a cosine schedule over the time there is;
* ``lbfgs``: L-BFGS of PyTorch with a strong Wolfe line search;
* ``kfac``: ``natgrad.KFAC`` whose rate and momentum minimise the quadratic model, with damping by
  Levenberg and Marquardt;
* ``block_diagonal``, ``exact``: the natural gradient with one exact block per layer, or of the
  whole Fisher matrix, by ``natgrad.Preconditioner``, and the step size of a grid that makes the
  loss smallest (Müller & Zeinhofer, *Achieving high accuracy with PINNs via energy natural gradient
  descent*, 2023), with damping that falls after long steps and rises after short ones;
* ``egn``: the exact natural gradient by ``natgrad.EGN``, which brings line search and damping.

It writes ``pinn.png`` and ``pinn.json`` to the output directory.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import matplotlib
import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

import natgrad

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

Step = Callable[[], None]
Closure = Callable[[], Tensor]

MODES = ((1, 1, 1.0), (2, 3, 0.5))
"""The solution is a sum of c sin(kπx) sin(mπy), plus the harmonic function x² − y²."""


def solution(points: Tensor) -> Tensor:
    """Return u at points ``(N, 2)``, as ``(N, 1)``."""
    x, y = points.mul(math.pi).unbind(1)
    waves = sum(c * torch.sin(k * x) * torch.sin(m * y) for k, m, c in MODES)
    return (waves + points[:, 0].square() - points[:, 1].square()).unsqueeze(1)


def source(points: Tensor) -> Tensor:
    """Return f = −Δu at points ``(N, 2)``, as ``(N, 1)``."""
    x, y = points.mul(math.pi).unbind(1)
    waves = [(k, m, c * torch.sin(k * x) * torch.sin(m * y)) for k, m, c in MODES]
    return sum(math.pi**2 * (k * k + m * m) * wave for k, m, wave in waves).unsqueeze(1)


class LaplaceNetwork(nn.Module):
    """A tanh network that returns its value on the boundary and its −Δ in the interior.

    Args:
        widths: Number of inputs, of each layer's units, and of outputs (1).
    """

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(1 + before, after, bias=False)  # Input 0 is the constant.
            for before, after in zip(widths, widths[1:], strict=False)
        )
        for layer in self.layers:
            nn.init.xavier_normal_(layer.weight[:, 1:])
            nn.init.zeros_(layer.weight[:, 0])

    def propagate(self, points: Tensor) -> Tensor:
        """Return value, first derivatives and Laplacian at points ``(N, D)``: ``(N, D + 2, 1)``."""
        samples, dimension = points.shape
        stack = points.new_zeros(samples, dimension + 2, dimension)
        stack[:, 0] = points
        stack[:, 1:-1] = torch.eye(dimension, dtype=points.dtype, device=points.device)
        constant = points.new_zeros(samples, dimension + 2, 1)
        constant[:, 0] = 1.0
        for layer in self.layers[:-1]:
            z = layer(torch.cat([constant, stack], dim=2))
            stack = tanh_of_stack(z)
        return self.layers[-1](torch.cat([constant, stack], dim=2))

    def forward(self, points: Tensor, boundary: Tensor, scale: Tensor) -> Tensor:
        """Return ``(N, 1)``: u where ``boundary``, −Δu elsewhere, times ``scale``."""
        stack = self.propagate(points)
        return scale * torch.where(boundary, stack[:, 0], -stack[:, -1])


def tanh_of_stack(z: Tensor) -> Tensor:
    """Return value, first derivatives and Laplacian of tanh(z) from those of z.

    The chain rule: ∂_i h = h' ∂_i z and Δh = h' Δz + h'' Σ_i (∂_i z)².
    """
    value, first, laplacian = z[:, :1], z[:, 1:-1], z[:, -1:]
    h = torch.tanh(value)
    slope = 1 - h.square()
    squares = first.square().sum(1, keepdim=True)
    return torch.cat([h, slope * first, slope * (laplacian - 2 * h * squares)], dim=1)


@dataclass(frozen=True)
class Problem:
    """Points with what the network should return there.

    The mean of all squared residuals is the mean over the interior plus ``boundary_weight`` times
    the mean over the boundary.
    """

    points: Tensor
    boundary: Tensor
    scale: Tensor
    target: Tensor

    @classmethod
    def sample(cls, interior: int, boundary: int, boundary_weight: float, seed: int) -> Problem:
        """Draw quasi-random points."""
        sobol = torch.quasirandom.SobolEngine(2, scramble=True, seed=seed)
        inside = sobol.draw(interior, dtype=torch.float64)
        along = (torch.arange(boundary, dtype=torch.float64) + 0.5) / boundary * 4
        corners = torch.tensor([[0, 0], [1, 0], [1, 1], [0, 1], [0, 0]], dtype=torch.float64)
        side, share = along.long(), (along % 1).unsqueeze(1)
        edge = corners[side] * (1 - share) + corners[side + 1] * share
        count = interior + boundary
        on_edge = torch.arange(count).unsqueeze(1) >= interior
        weights = torch.full((count, 1), count / interior, dtype=torch.float64)
        weights[interior:] = boundary_weight * count / boundary
        scale = weights.sqrt()
        target = scale * torch.cat([source(inside), solution(edge)])
        return cls(torch.cat([inside, edge]), on_edge, scale, target)

    def loss(self, network: nn.Module) -> Tensor:
        """Return the mean squared residual."""
        return nn.functional.mse_loss(network(self.points, self.boundary, self.scale), self.target)


class Error:
    """The relative L2 error on a grid."""

    def __init__(self, resolution: int = 64) -> None:
        axis = (torch.arange(resolution, dtype=torch.float64) + 0.5) / resolution
        self.resolution, self.points = resolution, torch.cartesian_prod(axis, axis)
        self.exact = solution(self.points)

    @torch.no_grad()
    def field(self, network: LaplaceNetwork) -> Tensor:
        """Return u − u* as an image."""
        values = network.propagate(self.points)[:, 0] - self.exact
        return values.view(self.resolution, self.resolution)

    def __call__(self, network: LaplaceNetwork) -> float:
        """Return ‖u − u*‖ / ‖u*‖."""
        return float(self.field(network).norm() / self.exact.norm())


# The optimizers: each function returns what takes one step.


def adam(network: nn.Module, closure: Closure, lr: float, spent: Callable[[], float]) -> Step:
    """Adam; the rate falls as a cosine of the share of time (or steps) spent."""
    optimizer = torch.optim.Adam(network.parameters(), lr)

    def step() -> None:
        optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * min(1.0, spent())))
        optimizer.zero_grad()
        closure().backward()
        optimizer.step()

    return step


def lbfgs(network: nn.Module, closure: Closure) -> Step:
    """L-BFGS, ten iterations per step, restarted where its line search gets stuck."""

    def make() -> torch.optim.LBFGS:
        return torch.optim.LBFGS(
            network.parameters(), lr=1.0, max_iter=10, history_size=100, tolerance_grad=0.0,
            tolerance_change=0.0, line_search_fn="strong_wolfe",
        )  # fmt: skip

    optimizer = make()

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss = closure()
        loss.backward()
        return loss

    def step() -> None:
        nonlocal optimizer
        before = [p.detach().clone() for p in network.parameters()]
        optimizer.step(evaluate)
        if all(torch.equal(p, old) for p, old in zip(network.parameters(), before, strict=True)):
            optimizer = make()

    return step


def kfac(network: nn.Module, closure: Closure) -> Step:
    """K-FAC with the step and momentum that minimise the quadratic model."""
    optimizer = natgrad.KFAC(
        network, nn.MSELoss(), fisher="exact", lr=1.0, momentum=0.9, step_rule="quadratic_model",
        damping=natgrad.LevenbergMarquardt(initial=1.0, interval=1, minimum=1e-10),
        kl_clip=None, factor_interval=1, inverse_interval=1,
    )  # fmt: skip

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss = closure()
        loss.backward()
        return loss

    return lambda: optimizer.step(evaluate)


def with_line_search(network: nn.Module, closure: Closure, structure: str, damping: float) -> Step:
    """Natural gradient of any structure with the best step of a grid.

    Damping halves after steps of at least ½ and doubles after those below ¼. (Next to none from
    the start, as in the source, needs a shallow network: here the linearisation that a long natural
    gradient trusts does not hold yet.)
    """
    preconditioner = natgrad.Preconditioner(
        network, structure, nn.MSELoss(), fisher="exact", damping=damping
    )

    def step() -> None:
        network.zero_grad()
        loss = closure()
        loss.backward()
        preconditioner.step()  # Now .grad holds the natural gradient.
        length = search(list(network.parameters()), closure, float(loss.detach()))
        factor = 0.5 if length >= 0.5 else 2.0 if length < 0.25 else 1.0
        preconditioner.damping = max(1e-14, factor * preconditioner.damping)

    return step


@torch.no_grad()
def search(parameters: list[nn.Parameter], closure: Closure, before: float) -> float:
    """Move along −.grad by the best of 1, ½, ¼, …; return how far (0 if nothing helps)."""
    start = [p.clone() for p in parameters]

    def move(length: float) -> None:
        for p, old in zip(parameters, start, strict=True):
            p.copy_(old).sub_(p.grad, alpha=length)

    best, least, length = 0.0, before, 1.0
    for _ in range(31):
        move(length)
        loss = float(closure())
        if loss < least:
            best, least = length, loss
        elif best:
            break  # Past the minimum.
        length /= 2
    move(best)
    return best


def egn(network: nn.Module, closure: Closure) -> Step:
    """Exact Gauss-Newton with natgrad's own line search and damping."""
    optimizer = natgrad.EGN(
        network, nn.MSELoss(), damping=1e-2, damping_range=(1e-12, 1e3), max_trials=20
    )
    return lambda: optimizer.step(closure)


OPTIMIZERS = {
    "adam": "Adam, cosine",
    "lbfgs": "L-BFGS",
    "kfac": "K-FAC",
    "block_diagonal": "block-diagonal NGD",
    "exact": "exact NGD",
    "egn": "EGN",
}
STYLES = {
    "adam": ("#7f7f7f", "-"),
    "lbfgs": ("#bcbd22", "--"),
    "kfac": ("#1f77b4", "-"),
    "block_diagonal": ("#9467bd", "-."),
    "exact": ("#d62728", "-"),
    "egn": ("#ff7f0e", "--"),
}


@dataclass
class Run:
    """What an optimizer did."""

    name: str
    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)


def train(
    name: str, arguments: argparse.Namespace, problem: Problem, progress: Progress
) -> tuple[Run, LaplaceNetwork]:
    """Train a fresh network until its seconds or steps are used up; measuring is not counted."""
    torch.manual_seed(arguments.seed)
    network = LaplaceNetwork([2, *[arguments.width] * arguments.depth, 1]).double()
    error, run = Error(), Run(name)
    elapsed, taken, measured = 0.0, 0, 0.0

    clock = time.process_time if arguments.cpu_time else time.perf_counter

    def closure() -> Tensor:
        return problem.loss(network)

    def spent() -> float:
        return max(elapsed / arguments.seconds, taken / (arguments.steps or math.inf))

    if name == "adam":
        step = adam(network, closure, arguments.adam_lr, spent)
    elif name in ("exact", "block_diagonal"):
        structure = "full" if name == "exact" else name
        step = with_line_search(network, closure, structure, arguments.damping)
    else:
        step = {"lbfgs": lbfgs, "kfac": kfac, "egn": egn}[name](network, closure)

    def measure() -> None:
        with torch.no_grad():
            run.losses.append(float(closure()))
        run.errors.append(error(network))
        run.steps.append(taken)
        run.seconds.append(elapsed)

    measure()
    bar = progress.add_task(f"{OPTIMIZERS[name]:<18}", total=1.0, measured="")
    while spent() < 1:
        begin = clock()
        step()
        elapsed += clock() - begin
        taken += 1
        if taken <= 5 or elapsed - measured >= arguments.seconds / 100 or spent() >= 1:
            measure()
            measured = elapsed
            progress.update(
                bar,
                completed=min(1.0, spent()),
                measured=f"step {taken:>6}  loss {run.losses[-1]:.1e}  error {run.errors[-1]:.1e}",
            )
    progress.stop_task(bar)
    return run, network


def draw(runs: list[Run], fields: dict[str, Tensor], path: Path) -> None:
    """Draw errors against seconds and steps, and where the errors of three networks are."""
    pyplot.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    shown = [name for name in ("adam", "kfac", "exact") if name in fields] or list(fields)[:3]
    figure = pyplot.figure(figsize=(11, 7.4), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.25, 1))
    left, right = upper.subplots(1, 2, sharey=True)
    for run in runs:
        colour, line = STYLES[run.name]
        for axes, x in ((left, run.seconds), (right, run.steps)):
            axes.plot(x, run.errors, line, color=colour, label=OPTIMIZERS[run.name], linewidth=1.8)
    left.set(xlabel="seconds", ylabel="relative L2 error", yscale="log")
    right.set(xlabel="steps", yscale="log")
    right.set_xscale("symlog", linthresh=1)
    right.set_xlim(0)
    for axes in (left, right):
        axes.grid(alpha=0.25)
    upper.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=len(runs),
                 frameon=False)  # fmt: skip
    logs = {name: fields[name].abs().clamp(min=1e-16).log10() for name in shown}
    low = min(float(image.quantile(0.02)) for image in logs.values())
    high = max(float(image.max()) for image in logs.values())
    panels = lower.subplots(1, len(shown) + 1)
    axis = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    truth = solution(torch.cartesian_prod(axis, axis)).view(64, 64)
    images = [("solution u*", truth, None), *[
        (f"log₁₀ |u − u*|: {OPTIMIZERS[name]}", logs[name], (low, high)) for name in shown
    ]]  # fmt: skip
    for axes, (title, image, limits) in zip(panels, images, strict=True):
        vmin, vmax = limits or (None, None)
        drawn = axes.imshow(
            image.T, origin="lower", extent=(0, 1, 0, 1), vmin=vmin, vmax=vmax,
            cmap="RdBu_r" if limits is None else "viridis",
        )  # fmt: skip
        axes.set_title(title, fontsize=10)
        axes.set(xticks=[0, 1], yticks=[0, 1])
        if limits is None or title == images[-1][0]:
            lower.colorbar(drawn, ax=axes, shrink=0.8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def report(console: Console, runs: list[Run]) -> None:
    """Print the table of what was reached."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("optimizer")
    for heading in ("steps", "seconds", "ms/step", "loss", "relative L2 error"):
        table.add_column(heading, justify="right")
    for run in runs:
        steps, seconds = run.steps[-1], run.seconds[-1]
        table.add_row(
            OPTIMIZERS[run.name], f"{steps:,}", f"{seconds:.1f}",
            f"{1000 * seconds / max(1, steps):.1f}", f"{run.losses[-1]:.1e}",
            f"{run.errors[-1]:.1e}",
        )  # fmt: skip
    console.print(table)
    errors = {run.name: run.errors[-1] for run in runs}
    if {"adam", "exact"} <= set(errors):
        ratio = errors["adam"] / errors["exact"]
        console.print(f"In the same time Adam's error is {ratio:,.0f} times that of exact NGD.")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--optimizer", choices=[*OPTIMIZERS, "all"], default=["all"], nargs="+")
    parser.add_argument("--seconds", type=float, default=None, help="per optimizer: 60, fast 15")
    parser.add_argument("--steps", type=int, default=None, help="stop earlier, after these steps")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count seconds of the processor: for busy machines"
    )
    parser.add_argument("--fast", action="store_true", help="fewer points, 15 s per optimizer")
    parser.add_argument("--interior", type=int, default=None, help="points: 900, fast 500")
    parser.add_argument("--boundary", type=int, default=None, help="points: 120, fast 80")
    parser.add_argument("--boundary-weight", type=float, default=100.0)
    parser.add_argument("--width", type=int, default=24)
    parser.add_argument("--depth", type=int, default=3, help="hidden layers")
    parser.add_argument("--adam-lr", type=float, default=1e-2)
    parser.add_argument("--damping", type=float, default=1e-2, help="of exact NGD, to begin with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results/poisson_pinn"))
    options = parser.parse_args(arguments)
    for name, full, fast in (
        ("seconds", 60.0, 15.0),
        ("interior", 900, 500),
        ("boundary", 120, 80),
    ):
        if getattr(options, name) is None:
            setattr(options, name, fast if options.fast else full)
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    console = Console()
    problem = Problem.sample(
        options.interior, options.boundary, options.boundary_weight, options.seed
    )
    names = list(OPTIMIZERS) if "all" in options.optimizer else options.optimizer
    runs, fields = [], {}
    with Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=24),
        TextColumn("{task.fields[measured]}"), TimeElapsedColumn(), console=console,
    ) as progress:  # fmt: skip
        for name in names:
            run, network = train(name, options, problem, progress)
            runs.append(run)
            fields[name] = Error().field(network)
    options.output.mkdir(parents=True, exist_ok=True)
    draw(runs, fields, options.output / "pinn.png")
    (options.output / "pinn.json").write_text(json.dumps([asdict(run) for run in runs], indent=1))
    report(console, runs)
    console.print(f"Plot: {options.output / 'pinn.png'}")


if __name__ == "__main__":
    main()
