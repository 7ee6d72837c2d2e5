"""How well optimizers train networks that nobody tuned them for, at equal budgets.

Fifteen small tasks, three schedules of the learning rate, budgets in processor time or in steps.
natgrad runs with untouched defaults; SGD (momentum 0.9), AdamW, SOAP, Muon and PSGD (weight decay
0.01) search their rate: all rates with the first seed, the best of them, by the held-out metric at
the end, with the others. The table marks a best rate at the edge of the search by a bar. The
schedule multiplies the learning rate: ``constant``; ``linear``, a warm-up over 5 % of the budget,
then linearly to zero; ``cosine``, the same warm-up and half a cosine.

The clock is the processor time of training steps (zero_grad, forward, backward, step, schedule) on
one thread; measurements are outside. The steps of a run on a busy machine cost more: compare what
ran side by side.

    export NATGRAD_DATA=DIR  # mnist/, fashion_mnist/, cifar100/, tinyshakespeare/, multi30k/
    python benchmarks/quality.py                          # all of it: many hours
    python benchmarks/quality.py --tasks ae_tanh,vit --methods adamw,kfac --schedules cosine
    python benchmarks/quality.py --methods "kfac,kfac:damping=1e-3;momentum=0.8"
    python benchmarks/quality.py --methods "kfac:step_rule=natgrad.StepRule(norm_clip=1.0)"
    python benchmarks/quality.py --budget steps --scale 0.5
    python benchmarks/quality.py --table --plot quality.png  # of the runs in the file; runs nothing

A method with options after the colon is a variant, and its text its name. Every run appends a line
to ``--out``; runs that are there already are not repeated, so that an interrupted command goes on
where it was. ``--add`` shows the runs of other files in the table too, and counts them as done:
keep the rivals' runs in one file and those of every state of natgrad in another.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import multiprocessing
import os
import signal
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from quality_tasks import TASKS, Problem
from rivals import USUAL_RATES, Optimizer, make_rival, missing, rate_grid
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import natgrad

Record = dict[str, Any]

NATURAL = {
    name.lower(): getattr(natgrad, name)
    for name in ("KFAC", "EKFAC", "TKFAC", "TEKFAC", "KPSVD", "SINGD", "FNGD")
}
#: Middles of searches: small networks take larger rates. Layers of thousands of words would take
#: SOAP and PSGD seconds a step.
RATES = {**USUAL_RATES, "adamw": 3e-3, "soap": 1e-2, "muon": 1e-2, "psgd": 3e-3}
RIVALS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "adamw": {"weight_decay": 0.01},
    "soap": {"weight_decay": 0.01, "max_precondition_dim": 1024},
    "muon": {"weight_decay": 0.01},
    "psgd": {"weight_decay": 0.01, "max_size_triangular": 1024},
}
WARM_UP = 0.05
MEASUREMENTS = 12
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda p: 1.0,
    "linear": lambda p: min(p / WARM_UP, (1 - p) / (1 - WARM_UP)),
    "cosine": lambda p: min(
        p / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * max(p - WARM_UP, 0) / (1 - WARM_UP))
    ),
}


# Methods.


def split_outside_brackets(text: str, separator: str) -> list[str]:
    """Split a text at separators that no bracket or quote encloses."""
    parts, depth, quote = [""], 0, ""
    for c in text:
        if quote:
            quote = "" if c == quote else quote
        elif c in "'\"":
            quote = c
        depth += (c in "([{") - (c in ")]}") if not quote else 0
        if c == separator and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += c
    return [part.strip() for part in parts if part.strip()]


def evaluated(text: str) -> Any:
    """Return a Python literal, or the value of an expression over natgrad."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return eval(text, {"natgrad": natgrad})  # The user's own command line.


def parse_method(name: str) -> tuple[str, dict[str, Any]]:
    """Return the base of a variant such as ``kfac:damping=1e-3;momentum=0.8`` and its options."""
    base, _, rest = name.partition(":")
    options = {}
    for part in split_outside_brackets(rest, ";"):
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"{name!r}: expected option=value, got {part!r}")
        options[key.strip()] = evaluated(value.strip())
    if base not in NATURAL and base not in RIVALS:
        raise ValueError(f"unknown method {base!r}: choose of {', '.join((*RIVALS, *NATURAL))}")
    return base, options


def rates_of(name: str, task: str, count: int) -> list[float | None]:
    """Return the rates to search; None for a method that takes its defaults or a given rate."""
    base, options = parse_method(name)
    if base in NATURAL or "lr" in options:
        return [None]
    return [*rate_grid(TASKS[task].usual_rates.get(base, RATES[base]), count)]


def make_optimizer(name: str, rate: float | None, model: nn.Module, likelihood: Any) -> Optimizer:
    """Return the optimizer of a run."""
    base, options = parse_method(name)
    if rate is not None:
        options["lr"] = rate
    if base in NATURAL:
        return NATURAL[base](model, likelihood, **options)
    return make_rival(base, model, **{**RIVALS[base], **options})


# Runs.


@dataclass(frozen=True)
class Run:
    """What identifies a training run. `amount` is its budget, in seconds or steps."""

    task: str
    method: str
    rate: float | None
    schedule: str
    seed: int
    budget: str
    amount: float

    @staticmethod
    def of(record: Record) -> Run:
        """Return the key of a record."""
        return Run(**{name: record[name] for name in Run.__dataclass_fields__})


class Diverged(Exception):
    """The loss is not finite."""


class Progress:
    """Counts steps and seconds, and measures a run about twelve times."""

    def __init__(self, run: Run, problem: Problem, models: list[nn.Module]) -> None:
        self.run, self.problem, self.models = run, problem, models
        self.steps, self.seconds = 0, 0.0
        self._began: float | None = None
        self.curve: list[tuple[int, float, float, float]] = []

    @property
    def amount(self) -> float:
        """The budget, in seconds or steps."""
        return self.run.amount

    @property
    def fraction(self) -> float:
        """How much of the budget is used."""
        used = self.seconds if self.run.budget == "seconds" else self.steps
        return min(used / self.amount, 1.0)

    @property
    def done(self) -> bool:
        """Whether the budget is used up."""
        return self.fraction >= 1

    def scheduler(self, optimizer: Optimizer) -> LambdaLR:
        """Return the schedule, to be advanced after every step."""
        shape = SCHEDULES[self.run.schedule]
        if self.run.budget == "seconds":
            return LambdaLR(optimizer, lambda _: shape(self._fraction_now()))
        return LambdaLR(optimizer, lambda step: shape(min(step / self.amount, 1.0)))

    def _fraction_now(self) -> float:
        """Return the fraction in the middle of a step too."""
        running = time.process_time() - self._began if self._began is not None else 0.0
        return min((self.seconds + running) / self.amount, 1.0)

    def begin_step(self) -> None:
        """Start the clock."""
        self._began = time.process_time()

    def end_step(self, loss: float = 0.0) -> None:
        """Stop the clock and measure if it is time.

        Raises:
            Diverged: If the loss is not finite.
        """
        assert self._began is not None
        self.seconds += time.process_time() - self._began
        self._began = None
        self.steps += 1
        if not math.isfinite(loss):
            raise Diverged(f"training loss {loss}")
        if self.fraction >= len(self.curve) / MEASUREMENTS:
            self.measure()

    def measure(self) -> None:
        """Append training loss and metric to the curve."""
        modes = [model.training for model in self.models]
        for model in self.models:
            model.eval()
        with torch.no_grad():
            values = self.problem.evaluate(self.models)
        for model, mode in zip(self.models, modes, strict=True):
            model.train(mode)
        self.curve.append((self.steps, self.seconds, *values))
        if not all(math.isfinite(value) for value in values):
            raise Diverged(f"measured training loss {values[0]}, metric {values[1]}")


@cache
def load(task: str, folder: Path) -> Problem:
    """Return the problem of a task, read once by every process."""
    return TASKS[task].load(folder)


def perform(run: Run, folder: Path) -> Record:
    """Train once and return all there is to know about it."""
    torch.set_num_threads(1)
    problem = load(run.task, folder)
    state, message, progress = "done", "", None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        try:
            torch.manual_seed(run.seed)
            models = problem.make_models()
            optimizers = [
                make_optimizer(run.method, run.rate, model, likelihood)
                for model, likelihood in zip(models, problem.likelihoods(), strict=True)
            ]
            progress = Progress(run, problem, models)
            progress.measure()
            problem.fit(models, optimizers, progress, run.seed)
        except Exception as error:
            state, message = "diverged", f"{type(error).__name__}: {error}"
    curve = progress.curve if progress is not None else []
    finished = state == "done"
    natural = parse_method(run.method)[0] in NATURAL
    return {
        **asdict(run),
        "state": state,
        "message": message,
        "steps": progress.steps if progress is not None else 0,
        "seconds": progress.seconds if progress is not None else 0.0,
        "train_loss": curve[-1][2] if finished else None,
        "metric": curve[-1][3] if finished else None,
        "curve": curve,
        "warnings": list(dict.fromkeys(str(w.message) for w in caught))[:20] if natural else [],
        "natgrad": natgrad.__version__,
    }


def read(files: Iterable[Path]) -> dict[Run, Record]:
    """Return the runs of some files; where several hold the same, the last."""
    found = {}
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            try:
                record = json.loads(line)
                found[Run.of(record)] = record
            except (ValueError, KeyError):
                print(f"# {file}, line {number} is no run, skipped", file=sys.stderr)
    return found


def budget_of(task: str, arguments: argparse.Namespace) -> tuple[str, float]:
    """Return the kind and the amount of a task's budget."""
    known = TASKS[task]
    if arguments.budget == "steps" or known.steps_only:
        steps = arguments.steps or known.steps
        return "steps", max(round(steps * arguments.scale), 1)
    return "seconds", known.seconds * arguments.scale


def wanted(
    tasks: list[str], arguments: argparse.Namespace, records: dict[Run, Record], seed: int
) -> Iterator[Run]:
    """Return the runs of a seed: all rates for the first, after that the best of those."""
    for task in tasks:
        for schedule in arguments.schedules:
            for method in arguments.methods:
                runs = [
                    Run(task, method, rate, schedule, 0, *budget_of(task, arguments))
                    for rate in rates_of(method, task, arguments.rates)
                ]
                if seed > 0:
                    best = min(runs, key=lambda run: result(records.get(run)))
                    runs = [Run(**{**asdict(best), "seed": seed})]
                yield from runs


def result(record: Record | None, name: str = "metric") -> float:
    """Return the metric or the training loss at the end of a run, infinite if it diverged."""
    value = None if record is None else record[name]
    return math.inf if value is None else value


def execute(runs: list[Run], workers: int, folder: Path, keep: Callable[[Record], None]) -> None:
    """Perform runs, in other processes if there are to be several."""
    if workers == 1:
        for run in runs:
            keep(perform(run, folder))
        return
    with ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),
        signal.signal,
        (signal.SIGINT, signal.SIG_IGN),
    ) as pool:
        pending: set[Future[Record]] = set()
        queue = iter(runs)
        try:
            while True:
                for run in queue:
                    pending.add(pool.submit(perform, run, folder))
                    if len(pending) == workers:
                        break
                if not pending:
                    return
                ended, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in ended:
                    keep(future.result())
        except KeyboardInterrupt:
            for process in list(pool._processes.values()):
                process.terminate()
            raise


# Reports.


@dataclass(frozen=True)
class Row:
    """A method on a task and schedule: its best rate, and the medians over seeds there."""

    method: str
    rate: float | None
    at_edge: bool
    metric: float
    worst: float
    train_loss: float
    steps: float
    seconds: float
    seeds: int
    diverged: int


def rows_of(records: list[Record]) -> list[Row]:
    """Return the rows of one task and schedule, the best first."""
    rows = []
    for method in dict.fromkeys(record["method"] for record in records):
        by_rate: dict[float | None, list[Record]] = {}
        for record in records:
            if record["method"] == method:
                by_rate.setdefault(record["rate"], []).append(record)
        medians = {rate: statistics.median(map(result, runs)) for rate, runs in by_rate.items()}
        rate = min(medians, key=lambda rate: (-len(by_rate[rate]), medians[rate]))
        chosen = by_rate[rate]
        edges = {min(by_rate), max(by_rate)} if len(by_rate) > 1 else set()  # type: ignore
        rows.append(
            Row(
                method,
                rate,
                rate in edges,
                medians[rate],
                max(map(result, chosen)),
                statistics.median(result(r, "train_loss") for r in chosen),
                statistics.median(r["steps"] for r in chosen),
                statistics.median(r["seconds"] for r in chosen),
                len(chosen),
                sum(r["state"] == "diverged" for r in chosen),
            )
        )
    return sorted(rows, key=lambda row: row.metric)


def grouped(records: Iterable[Record]) -> dict[tuple[str, str, str, float], list[Record]]:
    """Return the records by task, schedule and budget, in the order of the tasks."""
    groups: dict[tuple[str, str, str, float], list[Record]] = {}
    for record in records:
        key = (record["task"], record["schedule"], record["budget"], record["amount"])
        groups.setdefault(key, []).append(record)
    tasks, schedules = list(TASKS), list(SCHEDULES)
    return dict(
        sorted(
            groups.items(),
            key=lambda item: (
                tasks.index(item[0][0]),
                item[0][2:],
                schedules.index(item[0][1]),
            ),
        )
    )


def is_natural(method: str) -> bool:
    """Return whether a method is natgrad's."""
    return method.partition(":")[0] in NATURAL


def print_table(records: list[Record]) -> None:
    """Print a table for every task, schedule and budget, and the sum of all."""
    groups = grouped(records)
    width = max([len(record["method"]) for record in records] + [12])
    found = {}
    for (task, schedule, budget, amount), members in groups.items():
        rows = found[task, schedule, budget, amount] = rows_of(members)
        known = TASKS[task]
        print(f"\n{task}: {known.title}; {schedule}, {amount:g} {budget}")
        print(
            f"  {'method':<{width}} {'rate':>8} {known.metric:>16} {'worst seed':>11} "
            f"{'train loss':>11} {'steps':>6} {'seconds':>8} {'seeds':>6}"
        )
        for row in rows:
            rate = "default" if row.rate is None else f"{row.rate:g}{'|' if row.at_edge else ''}"
            best = "*" if row.metric == rows[0].metric else " "
            note = f"  {row.diverged} diverged" if row.diverged else ""
            print(
                f"{best} {row.method:<{width}} {rate:>8} {row.metric:>16.4g} {row.worst:>11.4g} "
                f"{row.train_loss:>11.4g} {row.steps:>6g} {row.seconds:>8.1f} {row.seeds:>6}{note}"
            )
    print_sums(found, width)
    print_troubles(records)


def ratio(ours: float, theirs: float) -> float:
    """Return the ratio of two metrics, infinite if ours diverged."""
    return ours / theirs if math.isfinite(ours) and theirs > 0 else math.inf


def print_troubles(records: list[Record]) -> None:
    """Print what diverged, and what natgrad warned of."""
    lost = [record for record in records if record["state"] == "diverged"]
    if lost:
        print("\ndiverged:")
    for record in lost:
        rate = "" if record["rate"] is None else f" {record['rate']:g}"
        print(
            f"  {record['task']} {record['method']}{rate}, {record['schedule']}, "
            f"seed {record['seed']}, step {record['steps']}: {record['message'][:200]}"
        )
    told: dict[str, list[str]] = {}
    for record in records:
        for text in record["warnings"]:
            told.setdefault(text[:200], []).append(f"{record['task']} {record['method']}")
    if told:
        print("\nwarnings:")
    for text, where in told.items():
        print(f"  {', '.join(dict.fromkeys(where))}: {text}")


def print_sums(found: dict[Any, list[Row]], width: int) -> None:
    """Print how often each method of natgrad is at least as good as the others.

    In the geometric mean, ratios count as 0.1 at least and as 10 at most.
    """
    methods = dict.fromkeys(row.method for rows in found.values() for row in rows)
    naturals = [method for method in methods if is_natural(method)]
    if not naturals:
        return
    print(
        f"\n  {'tasks × schedules × budgets':<{width}} {'≤ best rival':>13} {'≤ AdamW':>10} "
        f"{'mean ratio':>11} {'worst ratio to the best rival':>30}"
    )
    for method in naturals:
        against: dict[str, list[tuple[float, str]]] = {"rival": [], "adamw": []}
        for key, rows in found.items():
            by_name = {row.method: row.metric for row in rows}
            rivals = [row.metric for row in rows if not is_natural(row.method)]
            if method not in by_name:
                continue
            if rivals:
                against["rival"].append((ratio(by_name[method], min(rivals)), " ".join(key[:2])))
            if "adamw" in by_name:
                against["adamw"].append((ratio(by_name[method], by_name["adamw"]), ""))
        counts = [
            f"{sum(value <= 1 for value, _ in pairs)} of {len(pairs)}" for pairs in against.values()
        ]
        logs = [math.log(min(max(value, 0.1), 10.0)) for value, _ in against["rival"]]
        mean = f"{math.exp(statistics.fmean(logs)):.3f}" if logs else "–"
        worst = max(against["rival"], default=(math.nan, ""))
        print(
            f"  {method:<{width}} {counts[0]:>13} {counts[1]:>10} {mean:>11} "
            f"{worst[0]:>12.3f} {worst[1]}"
        )


def draw(file: Path, records: list[Record]) -> None:
    """Draw the metric against seconds: a panel per task, schedule and budget, the first seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = grouped(records)
    columns = min(3, len(groups))
    lines = -(-len(groups) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(5 * columns, 3.6 * lines), squeeze=False
    )
    for axis in axes.flat[len(groups) :]:
        axis.set_visible(False)
    methods = list(dict.fromkeys(record["method"] for record in records))
    colours = {method: f"C{i}" for i, method in enumerate(methods)}
    for axis, ((task, schedule, budget, amount), members) in zip(
        axes.flat, groups.items(), strict=False
    ):
        for row in rows_of(members):
            record = min(
                (r for r in members if (r["method"], r["rate"]) == (row.method, row.rate)),
                key=lambda r: r["seed"],
            )
            if record["curve"]:
                _, seconds, _, metrics = zip(*record["curve"], strict=True)
                rate = "" if row.rate is None else f" {row.rate:g}"
                axis.plot(seconds, metrics, colours[row.method], label=row.method + rate)
        axis.set(xlabel="processor seconds", ylabel=TASKS[task].metric, yscale="log")
        axis.set_title(f"{task}, {schedule}, {amount:g} {budget}", fontsize="small", loc="left")
        axis.legend(fontsize="xx-small")
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def print_run(record: Record) -> None:
    """Print one line about a run that has ended."""
    rate = "" if record["rate"] is None else f" {record['rate']:g}"
    print(
        f"{record['task']} {record['method']}{rate}, {record['schedule']}, seed {record['seed']}: "
        f"{TASKS[record['task']].metric} {result(record):.4g}, train loss "
        f"{result(record, 'train_loss'):.4g}, {record['steps']} steps, "
        f"{record['seconds']:.1f} s {record['message'][:200]}",
        flush=True,
    )


def comma_separated(text: str) -> list[str]:
    return split_outside_brackets(text, ",")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("NATGRAD_DATA"))
    parser.add_argument("--tasks", type=comma_separated, default=list(TASKS))
    parser.add_argument(
        "--methods",
        type=comma_separated,
        default=[*RIVALS, *(name for name in NATURAL if name != "fngd")],
    )
    parser.add_argument("--schedules", type=comma_separated, default=list(SCHEDULES))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rates", type=int, default=3, help="rates a search tries")
    parser.add_argument("--budget", choices=("seconds", "steps"), default="seconds")
    parser.add_argument("--steps", type=int, help="steps of a run; by default the task's own")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on budgets")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--out", type=Path, default=Path("quality.jsonl"), help="file for the runs")
    parser.add_argument("--add", type=Path, nargs="*", default=[], help="further files with runs")
    parser.add_argument("--table", action="store_true", help="print the runs there are")
    parser.add_argument("--plot", type=Path, help="draw the runs there are into this file")
    arguments = parser.parse_args()
    if arguments.seeds < 1 or arguments.rates < 1 or arguments.workers < 1 or arguments.scale <= 0:
        parser.error("--seeds, --rates and --workers must be at least 1, --scale positive")
    for given, known in ((arguments.tasks, TASKS), (arguments.schedules, SCHEDULES)):
        for name in given:
            if name not in known:
                parser.error(f"unknown {name!r}: choose of {', '.join(known)}")
    arguments.out.touch()
    records = read([*arguments.add, arguments.out])
    if not arguments.table and not arguments.plot:
        train(parser, arguments, records)
    shown = [r for r in records.values() if r["task"] in arguments.tasks]
    if shown and (arguments.table or not arguments.plot):
        print_table(shown)
    if shown and arguments.plot:
        draw(arguments.plot, shown)


def train(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, records: dict[Run, Record]
) -> None:
    """Perform all runs asked for that are not in the records, and add them there."""
    if arguments.data is None:
        parser.error("give --data or set NATGRAD_DATA: the folder that holds mnist/ ...")
    for name in arguments.methods:
        try:
            base, _ = parse_method(name)
        except Exception as error:
            parser.error(str(error))
        if reason := missing(base):
            print(f"# {reason}, {name} left out", file=sys.stderr)
            arguments.methods = [kept for kept in arguments.methods if kept != name]

    for task in list(arguments.tasks):
        if find_spec(TASKS[task].requires) is None:
            print(f"# {TASKS[task].requires} is not installed, {task} left out", file=sys.stderr)
            arguments.tasks.remove(task)

    def keep(record: Record) -> None:
        records[Run.of(record)] = record
        with arguments.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        print_run(record)

    try:
        for seed in range(arguments.seeds):
            runs = wanted(arguments.tasks, arguments, records, seed)
            missed = [run for run in runs if run not in records]
            execute(missed, arguments.workers, Path(arguments.data), keep)
    except KeyboardInterrupt:
        print("# interrupted: the same command goes on from here", file=sys.stderr)


if __name__ == "__main__":
    main()
