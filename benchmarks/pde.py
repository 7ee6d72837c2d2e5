"""How accurately optimizers solve equations with one network, at equal processor time.

Nine equations (`pde_problems.py`), one also without the singular part of its solution; the same
network, points and weights for every optimizer. ``natgrad.ResidualNGD`` runs with its defaults;
where points are drawn anew for every step, its rate falls as a cosine. The others:

* ``adam``, ``soap``: the best of the rates given, by the error at the end, falling as a cosine;
* ``lbfgs``: PyTorch's, history 100, strong Wolfe, restarted where its search gets stuck;
* ``bfgs``, ``ssbfgs``: a dense inverse Hessian, plain or self-scaled (Al-Baali 1998: before an
  update it is divided by ``min(1, yᵀs / sᵀBs)``), with SciPy's search for strong Wolfe conditions;
* ``engd_w``: ``Jᵀ(JJᵀ + λI)⁻¹ρ`` (Guzmán-Cordero, Dangel, Goldshlager & Zeinhofer 2025), solved on
  the smaller side, the length by search over powers of ½ for the least loss (Müller & Zeinhofer
  2023), and the best of the λ given;
* ``spring``: the same with momentum 0.9, ``φ ← μφ + Jᵀ(JJᵀ + λI)⁻¹(ρ − μJφ)``.

They evaluate the loss of ``natgrad.ResidualNetwork``, and take its rows: derivatives propagated
forward, which suits high dimensions. Where the problem says so, points are drawn anew for every
step of all but the quasi-Newton methods, which need a loss that stays, or added during training
(``natgrad.residuals.AdaptivePoints`` with its defaults).

The clock is the processor time of steps on one thread, adding points included; drawing them anew
and measuring are outside.

    python benchmarks/pde.py --problems burgers,kovasznay --methods natgrad,adam --seconds 60
    python benchmarks/pde.py --methods natgrad          # the seconds that are asked for, or 60
    python benchmarks/pde.py --table                    # of the runs in the file; runs nothing

Every run appends a line to ``--out``; runs that are there already are not repeated, so that an
interrupted command goes on where it was. ``--add`` shows the runs of other files in the table too,
and counts them as done.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pde_problems import PROBLEMS, Problem, tanh_network
from rivals import make_rival, missing
from scipy.optimize import line_search
from torch import Tensor, nn

import natgrad
from natgrad.residuals import AdaptivePoints, Residual, ResidualNetwork
from natgrad.residuals.rows import CapturedRows

Record = dict[str, Any]
Step = Callable[[float], None]  # Given the share of the budget that is spent.

MEASUREMENTS = 12
SECONDS = 60.0
RATES = {"adam": (1e-3, 1e-2), "soap": (1e-3, 1e-2)}
DAMPINGS = (1e-8, 1e-5, 1e-2)
DENSE_PARAMETERS = 3000


# Methods: each function returns what takes one step.


def natural(network: nn.Sequential, problem: Problem, residuals: dict[str, Residual]) -> Step:
    """natgrad, its rate falling from 1 as a cosine where points change, else untouched."""
    optimizer = natgrad.ResidualNGD(problem.model(network), residuals)

    def step(spent: float) -> None:
        if problem.resampled:
            optimizer.param_groups[0]["lr"] = falling(spent)
        optimizer.step()

    return step


def first_order(
    name: str, network: nn.Sequential, problem: Problem, residuals: dict[str, Residual], rate: float
) -> Step:
    """Adam or SOAP; the rate falls as a cosine of the share of time spent."""
    loss = ResidualNetwork(problem.model(network), residuals).loss
    if name == "adam":
        optimizer: torch.optim.Optimizer = torch.optim.Adam(network.parameters(), rate)
    else:
        optimizer = make_rival(name, network, rate)

    def step(spent: float) -> None:
        optimizer.param_groups[0]["lr"] = rate * falling(spent)
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def lbfgs(network: nn.Sequential, problem: Problem, residuals: dict[str, Residual]) -> Step:
    """L-BFGS, ten iterations a step."""
    loss = ResidualNetwork(problem.model(network), residuals).loss

    def make() -> torch.optim.LBFGS:
        return torch.optim.LBFGS(
            network.parameters(), max_iter=10, history_size=100, tolerance_grad=0.0,
            tolerance_change=0.0, line_search_fn="strong_wolfe",
        )  # fmt: skip

    optimizer = make()

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    def step(spent: float) -> None:
        nonlocal optimizer
        before = flat(network)
        optimizer.step(closure)
        if torch.equal(before, flat(network)):
            optimizer = make()

    return step


def bfgs(
    network: nn.Sequential, problem: Problem, residuals: dict[str, Residual], scaled: bool
) -> Step:
    """BFGS with a dense inverse Hessian H, self-scaled or not; restarted where it gets stuck."""
    loss = ResidualNetwork(problem.model(network), residuals).loss
    parameters = list(network.parameters())

    def at(theta: Any) -> tuple[float, Tensor]:
        assign(network, torch.as_tensor(theta))
        value = loss()
        gradients = torch.autograd.grad(value, parameters)
        return float(value.detach()), torch.cat([g.flatten() for g in gradients])

    theta = flat(network)
    value, gradient = at(theta)
    before: float | None = None
    inverse: Tensor | None = None
    seen: dict[bytes, tuple[float, Tensor]] = {}

    def once(point: Any) -> tuple[float, Tensor]:
        key = point.tobytes()
        if key not in seen:
            seen[key] = at(point)
        return seen[key]

    def step(spent: float) -> None:
        nonlocal theta, value, gradient, before, inverse
        direction = -gradient if inverse is None else -(inverse @ gradient)
        seen.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # It says that it failed by returning None, too.
            length = line_search(
                lambda x: once(x)[0], lambda x: once(x)[1].numpy(), theta.numpy(),
                direction.numpy(), gradient.numpy(), value, before, c2=0.9,
            )[0]  # fmt: skip
        if length is None:
            assign(network, theta)
            inverse, before = None, None
            return
        s = length * direction
        before, old = value, gradient
        value, gradient = once((theta + s).numpy())
        theta = theta + s
        assign(network, theta)
        y = gradient - old
        curvature = s @ y
        if inverse is None:
            inverse = torch.eye(len(theta), dtype=theta.dtype) * (curvature / (y @ y))
        elif scaled:
            inverse = inverse / float((curvature / (-length * (s @ old))).clamp(max=1.0))
        product = inverse @ y
        inverse += (1 + y @ product / curvature) / curvature * torch.outer(s, s)
        inverse -= (torch.outer(product, s) + torch.outer(s, product)) / curvature

    return step


def woodbury(
    network: nn.Sequential,
    problem: Problem,
    residuals: dict[str, Residual],
    damping: float,
    momentum: float,
) -> Step:
    """ENGD-W, or SPRING with momentum, at one λ."""
    rows = CapturedRows(problem.model(network), residuals, None)
    search = natgrad.LineSearch("best", max_trials=30)
    last = torch.zeros_like(flat(network))

    def step(spent: float) -> None:
        nonlocal last
        start = flat(network)
        chunks = [(values, jacobian) for _, values, jacobian in rows.chunks()]
        if len(chunks) > 1:
            raise ValueError("more rows than fit at once")
        values, jacobian = chunks[0]
        rest = values - momentum * jacobian.matvec(last)
        if jacobian.rows > len(start):  # The same step, from the smaller matrix.
            dense = jacobian.to_dense()
            matrix, right = dense.T @ dense, jacobian.rmatvec(rest)
        else:
            matrix, right = jacobian.gram(), rest.flatten()
        matrix.diagonal().add_(damping)
        factor = torch.linalg.cholesky(matrix)
        solution = torch.cholesky_solve(right.unsqueeze(1), factor)[:, 0]
        if jacobian.rows <= len(start):
            solution = jacobian.rmatvec(solution.view_as(rest))
        direction = momentum * last + solution
        length, _ = search.search(
            lambda t: assign(network, start - t * direction), lambda: float(rows.loss()),
            0.5 * float(values.square().sum()), 0.0, 1.0,
        )  # fmt: skip
        last = direction if momentum else last

    return step


def falling(spent: float) -> float:
    """Return a cosine of the share of time spent, from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * spent))


def flat(network: nn.Module) -> Tensor:
    """Return all parameters as one vector."""
    return nn.utils.parameters_to_vector(network.parameters()).detach().clone()


def assign(network: nn.Module, vector: Tensor) -> None:
    """Set all parameters."""
    with torch.no_grad():
        nn.utils.vector_to_parameters(vector, network.parameters())


#: Method → the values of the one option that it searches.
METHODS: dict[str, tuple[float | None, ...]] = {
    "natgrad": (None,),
    "adam": RATES["adam"],
    "soap": RATES["soap"],
    "lbfgs": (None,),
    "bfgs": (None,),
    "ssbfgs": (None,),
    "engd_w": DAMPINGS,
    "spring": DAMPINGS,
}
QUASI_NEWTON = ("lbfgs", "bfgs", "ssbfgs")


def make_step(
    method: str,
    option: float | None,
    network: nn.Sequential,
    problem: Problem,
    residuals: dict[str, Residual],
) -> Step:
    """Return what takes one step of a method."""
    if method == "natgrad":
        return natural(network, problem, residuals)
    if method == "lbfgs":
        return lbfgs(network, problem, residuals)
    if method in ("bfgs", "ssbfgs"):
        return bfgs(network, problem, residuals, method == "ssbfgs")
    assert option is not None
    if method in ("adam", "soap"):
        return first_order(method, network, problem, residuals, option)
    return woodbury(network, problem, residuals, option, 0.9 if method == "spring" else 0.0)


# Runs.


@dataclass(frozen=True)
class Run:
    """What identifies a training run; `option` is a rate or a damping."""

    problem: str
    method: str
    option: float | None
    seed: int
    seconds: float

    @staticmethod
    def of(record: Record) -> Run:
        """Return the key of a record."""
        return Run(**{name: record[name] for name in Run.__dataclass_fields__})


def perform(run: Run) -> Record:
    """Train once and return all there is to know about it."""
    torch.set_num_threads(1)
    problem = PROBLEMS[run.problem]
    network = tanh_network(problem.widths, run.seed)
    residuals = problem.sample(run.seed)
    resampled = problem.resampled and run.method not in QUASI_NEWTON
    adaptive = None
    if problem.draw is not None and run.method not in QUASI_NEWTON:
        draw = problem.draw(10**6 + run.seed)
        adaptive = AdaptivePoints(problem.model(network), residuals, draw)
    judge = ResidualNetwork(problem.model(network), problem.sample(10**6 + run.seed))
    curve: list[tuple[int, float, float, float]] = []
    steps, seconds, state, message = 0, 0.0, "done", ""

    def measure() -> None:
        with torch.no_grad():
            loss = float(judge.loss()) if problem.resampled else float(own.loss())
        curve.append((steps, seconds, loss, problem.error(network)))
        if not math.isfinite(curve[-1][3]):
            raise ValueError("the network is not finite")

    own = ResidualNetwork(problem.model(network), residuals)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            measure()
            step = make_step(run.method, run.option, network, problem, residuals)
            while seconds < run.seconds:
                if resampled and steps:
                    for name, fresh in problem.sample(1000 * (run.seed + 1) + steps).items():
                        residuals[name].replace(fresh.points, fresh.data)
                began = time.process_time()
                step(min(seconds / run.seconds, 1.0))
                if adaptive is not None:
                    adaptive.update()
                seconds += time.process_time() - began
                steps += 1
                if seconds >= run.seconds * len(curve) / MEASUREMENTS:
                    measure()
        except (ValueError, RuntimeError) as error:
            state, message = "failed", f"{type(error).__name__}: {error}"
    return {
        **asdict(run),
        "state": state,
        "message": message,
        "steps": steps,
        "points": sum(map(len, residuals.values())),
        "loss": curve[-1][2],
        "error": curve[-1][3] if state == "done" else None,
        "curve": curve,
        "warnings": list(dict.fromkeys(str(w.message) for w in caught))[:5],
        "natgrad": natgrad.__version__,
    }


def read(files: Iterable[Path]) -> dict[Run, Record]:
    """Return the runs of some files; where several hold the same, the last."""
    found = {}
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            found[Run.of(record)] = record
    return found


def wanted(arguments: argparse.Namespace) -> Iterator[Run]:
    """Yield the runs asked for; methods of dense matrices run on small networks only."""
    for seed in range(arguments.seeds):
        for name in arguments.problems:
            problem = PROBLEMS[name]
            seconds = arguments.seconds or (problem.asked or (0.0, SECONDS))[1]
            size = sum(
                (a + 1) * b for a, b in zip(problem.widths, problem.widths[1:], strict=False)
            )
            for method in arguments.methods:
                if method in ("bfgs", "ssbfgs") and size > DENSE_PARAMETERS:
                    continue
                for option in METHODS[method]:
                    yield Run(name, method, option, seed, seconds)


# Reports.


def error_of(record: Record) -> float:
    """Return the error at the end, infinite if the run failed."""
    return math.inf if record["error"] is None else record["error"]


def print_table(records: list[Record]) -> None:
    """Print the best option of every method, its median and largest error over seeds."""
    groups: dict[tuple[str, float], list[Record]] = {}
    for record in records:
        groups.setdefault((record["problem"], record["seconds"]), []).append(record)
    order = list(PROBLEMS)
    for (name, seconds), members in sorted(groups.items(), key=lambda g: order.index(g[0][0])):
        problem = PROBLEMS[name]
        asked = ""
        if problem.asked is not None:
            asked = f"; asked: {problem.asked[0]:g} in {problem.asked[1]:g} s"
        print(f"\n{name}: {problem.title}, {seconds:g} s{asked}")
        print(
            f"  {'method':<10} {'option':>8} {'error':>9} {'largest':>9} {'loss':>9} {'steps':>7}"
        )
        for method in [m for m in METHODS if any(r["method"] == m for r in members)]:
            by_option: dict[float | None, list[Record]] = {}
            for record in members:
                if record["method"] == method:
                    by_option.setdefault(record["option"], []).append(record)
            option, runs = min(
                by_option.items(), key=lambda item: statistics.median(map(error_of, item[1]))
            )
            errors = [error_of(r) for r in runs]
            print(
                f"  {method:<10} {'' if option is None else f'{option:g}':>8} "
                f"{statistics.median(errors):>9.1e} {max(errors):>9.1e} "
                f"{statistics.median(r['loss'] for r in runs):>9.1e} "
                f"{statistics.median(r['steps'] for r in runs):>7g}"
                f"{'' if len(runs) == 1 else f'  {len(runs)} seeds'}"
            )
    for record in records:
        if record["state"] != "done":
            option = "" if record["option"] is None else f" {record['option']:g}"
            print(f"# {record['problem']} {record['method']}{option}: {record['message'][:150]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    names: Callable[[str], list[str]] = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--problems", type=names, default=list(PROBLEMS))
    parser.add_argument("--methods", type=names, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--seconds", type=float, help="of a run; by default what is asked, or 60")
    parser.add_argument("--out", type=Path, default=Path("pde.jsonl"), help="file for the runs")
    parser.add_argument("--add", type=Path, nargs="*", default=[], help="further files with runs")
    parser.add_argument("--table", action="store_true", help="print the runs there are")
    arguments = parser.parse_args()
    for given, known in ((arguments.problems, PROBLEMS), (arguments.methods, METHODS)):
        for name in given:
            if name not in known:
                parser.error(f"unknown {name!r}: choose of {', '.join(known)}")
    for method in list(arguments.methods):
        if reason := missing(method):
            print(f"# {reason}, {method} left out", file=sys.stderr)
            arguments.methods.remove(method)
    arguments.out.touch()
    records = read([*arguments.add, arguments.out])
    for run in () if arguments.table else wanted(arguments):
        if run in records:
            continue
        records[run] = record = perform(run)
        with arguments.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        option = "" if run.option is None else f" {run.option:g}"
        print(
            f"{run.problem} {run.method}{option}, seed {run.seed}: error {error_of(record):.2e}, "
            f"loss {record['loss']:.2e}, {record['steps']} steps {record['message'][:150]}",
            flush=True,
        )
    shown = [r for r in records.values() if r["problem"] in arguments.problems]
    print_table([r for r in shown if r["method"] in arguments.methods])


if __name__ == "__main__":
    main()
