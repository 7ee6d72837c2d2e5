"""The main job: train one network with every method from the same initial weights, and compare."""

from __future__ import annotations

import contextlib
import copy
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone

import torch
from torch import Tensor, nn

from natgrad.experiments.batches import TensorBatches
from natgrad.experiments.config import CompareConfig, ConfigError
from natgrad.experiments.environment import describe_environment
from natgrad.experiments.factories import described
from natgrad.experiments.learning_rates import (
    BUDGET,
    best_learning_rate,
    measured_learning_rate,
    search_learning_rate,
)
from natgrad.experiments.memory import PeakMemory
from natgrad.experiments.methods import METHODS, Method
from natgrad.experiments.problems import Problem, Problems
from natgrad.experiments.quality import QUALITY_SAMPLES, measure_quality
from natgrad.experiments.random_state import reproducible
from natgrad.experiments.results import (
    MethodResult,
    QualityPoint,
    Repeat,
    Results,
    Run,
    Search,
    Target,
)
from natgrad.experiments.training import Schedule, train

_EVALUATIONS = 20  # per run, unless asked for otherwise


class Observer:
    """Told of the progress of a comparison; one that does something overrides the methods.

    Before anything begins it is given the name of the metric, and the steps or seconds of all that
    will begin.
    """

    metric: str = "accuracy"
    total: float = 0.0

    def begin(self, method: str, budget: float, searching: bool) -> None:
        """A method begins its learning-rate search or its training, of so many steps or seconds."""

    def step(self, taken: float, loss: float, metric: float) -> None:
        """So much of the budget is spent; loss and metric of the last training batch."""

    def end(self, result: MethodResult) -> None:
        """A method has ended, well or not."""


def compare(
    config: CompareConfig,
    observer: Observer | None = None,
    command: str = "",
    earlier: Results | None = None,
    keep: Callable[[Results], None] = lambda results: None,
) -> Results:
    """Train one network with every method from the same initial weights on the same data.

    `command` is the command line to record as the one that repeats the comparison. Whole runs and
    trials of `earlier` results, interrupted, are taken over; `keep` is given the results so far
    after every run and trial. After Ctrl-C the results hold what was measured until then,
    `interrupted` is true, and methods that had not begun have the status "not run".

    Raises `ConfigError` if earlier results are those of another comparison, `DataError` or
    `FactoryError` if data or a user's model cannot be made, and `ObjectiveError` if they do not go
    together, or the loss cannot be told.
    """
    comparison = _Comparison(config, observer or Observer(), command, keep)
    if earlier is not None:
        comparison.take_over(earlier)
    comparison.observer.total = comparison.budget()
    try:
        comparison.warm_up()
        for result in comparison.methods:
            if not comparison.run(result):
                comparison.interrupted = True
                break
        else:
            comparison.interrupted = False
            comparison.measure_quality()
    except KeyboardInterrupt:
        comparison.interrupted = True
    return comparison.results()


class _Comparison:
    """A comparison under way: what all methods share, and what was found so far."""

    def __init__(
        self,
        config: CompareConfig,
        observer: Observer,
        command: str,
        keep: Callable[[Results], None],
    ) -> None:
        self.config, self.observer, self._command, self._keep = config, observer, command, keep
        self._created, self._began = datetime.now(timezone.utc), time.perf_counter()
        self._device = config.torch_device()
        self._problems = Problems(config)
        #: The problem of the first seed.
        self.problem = self._problems.of(config.seed)
        observer.metric = self.problem.objective.metric.name
        self.methods = [self._blank(name) for name in config.methods or ()]
        self.interrupted = True
        self._quality: list[QualityPoint] = []
        #: States of the network along the run of the first method, by steps taken.
        self._snapshots: dict[int, dict[str, Tensor]] = {}

    # What was found.

    def results(self) -> Results:
        """Return what was found so far."""
        target = _target(self.config, self.methods)
        for result in self.methods:
            for run in result.runs:
                run.steps_to_target, run.seconds_to_target = run.train.until(target.loss)
        return Results(
            created=self._created.isoformat(timespec="seconds"),
            seconds=time.perf_counter() - self._began,
            interrupted=self.interrupted,
            command=self._command,
            config=self.config.as_dict(),
            data=self.problem.data,
            model=self._described_model(),
            metric=self.problem.objective.metric.name,
            environment=describe_environment(self._device),
            target=target,
            methods=self.methods,
            quality=self._quality,
        )

    def take_over(self, earlier: Results) -> None:
        """Take whole runs and trials from earlier results, which must be of this comparison."""
        now = self.results()
        for what in ("config", "data", "model"):
            old, new = getattr(earlier, what), getattr(now, what)
            differ = [key for key in {**old, **new} if old.get(key) != new.get(key)]
            if differ:
                raise ConfigError(
                    f"What is there is another comparison, as its {what} differs in "
                    f"{', '.join(differ)}: leave out --resume, or give another --output."
                )
        self._began -= earlier.seconds
        whole = ("completed", "diverged")
        for index, result in enumerate(earlier.methods):
            result.repeats = [run for run in result.repeats if run.status in whole]
            # The run of the first method has the states on which quality is measured.
            if result.status in whole and not (index == 0 and self.config.quality):
                self.methods[index] = result
            else:
                self.methods[index].search = result.search
                self.methods[index].learning_rate_seconds = result.learning_rate_seconds

    def _described_model(self) -> dict[str, object]:
        return {
            "name": self.config.factory or self.config.model,
            "width": self.config.effective_width,
            "depth": self.config.depth,
            "parameters": sum(one.numel() for one in self.problem.model.parameters()),
            "text": str(self.problem.model),
            "loss": self.problem.objective.title,
        }

    def _blank(self, name: str) -> MethodResult:
        """Return the result of a method that has not run."""
        method = METHODS[name]
        return MethodResult(
            name=name,
            title=method.title,
            family="natural" if method.is_natural else "first-order",
            description=method.description,
            steps=self._schedule(method).steps,
            damping=method.damping(self.problem.setting),
        )

    # What is done.

    def budget(self) -> float:
        """Return the steps or seconds of all searches and runs that are to come."""
        total = 0.0
        for result in self.methods:
            method = METHODS[result.name]
            total += self._schedule(method).budget * (self.config.seeds - len(result.repeats))
            if result.status != "not run":
                total -= self._schedule(method).budget
            elif method.learning_rate_rule(self.problem.setting) == "search":
                if result.name not in self.config.learning_rates:
                    total += BUDGET * self._trial(method).budget
        return total

    def warm_up(self) -> None:
        """Take two steps, so that no method pays for what PyTorch does only once in a process.

        The first method of either family takes them; what fails will fail again, and be told.
        """
        natural = [METHODS[one.name] for one in self.methods if one.family == "natural"]
        schedule = Schedule(2, frozenset({0}), seed=self.config.seed)
        with warnings.catch_warnings(), contextlib.suppress(Exception):
            warnings.simplefilter("ignore")
            for method in (METHODS["sgd"], *natural[:1]):
                self._train(self.problem, method, 1e-9, schedule, lambda *measured: None)
        square = torch.eye(256, device=self._device, dtype=self.config.torch_dtype())
        torch.linalg.cholesky(square)
        torch.linalg.eigh(square)

    def run(self, result: MethodResult) -> bool:
        """Choose a rate, train with it for every seed, and return whether that came to its end."""
        method = METHODS[result.name]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            try:
                if result.status == "not run":
                    self._run_first(method, result)
                if result.status == "completed":
                    self._repeat(method, result)
            except KeyboardInterrupt:
                result.status = "interrupted"
            except Exception as error:  # a user's model or loader may raise anything
                result.status = "failed"
                result.message = f"{type(error).__name__}: {described(error)}"
        said = [str(warning.message) for warning in caught if warning.category is UserWarning]
        result.message = " ".join(filter(None, [result.message, *dict.fromkeys(said)]))
        self._keep(self.results())
        self.observer.end(result)
        return all(run.status != "interrupted" for run in result.runs)

    def _run_first(self, method: Method, result: MethodResult) -> None:
        """Choose the learning rate, train with the first seed, and fill in the result."""
        self._choose_learning_rate(method, result)
        if result.learning_rate is None:
            result.status = "diverged"
            result.message = "Every learning rate of the search diverged."
            return
        schedule = self._schedule(method)
        self.observer.begin(result.name, schedule.budget, False)
        keep = bool(self.config.quality) and result is self.methods[0]
        with PeakMemory(self._device) as peak:
            run = self._train(self.problem, method, result.learning_rate, schedule, keep=keep)
        vars(result).update(vars(run))
        result.peak_memory_bytes = peak.bytes

    def _repeat(self, method: Method, result: MethodResult) -> None:
        """Train with the further seeds, at the learning rate of the first."""
        assert result.learning_rate is not None
        seeds = range(self.config.seed + 1, self.config.seed + self.config.seeds)
        for seed in seeds[len(result.repeats) :]:
            self._keep(self.results())
            schedule, problem = self._schedule(method, seed), self._problems.of(seed)
            self.observer.begin(result.name, schedule.budget, False)
            run = self._train(problem, method, result.learning_rate, schedule)
            result.repeats.append(Repeat(seed=seed, **vars(run)))
            if run.status == "interrupted":
                break

    def _choose_learning_rate(self, method: Method, result: MethodResult) -> None:
        """Fill in the learning rate of a result; None if every rate of a search diverged."""
        began, setting = time.perf_counter(), self.problem.setting
        rule = method.learning_rate_rule(setting)
        if method.is_natural:
            result.theory_learning_rate = method.theoretical_rate(setting)
            if setting.is_wide and rule in ("theory", "measured"):
                result.measured_learning_rate = self._measure(method)
        result.learning_rate = self.config.learning_rates.get(result.name)
        result.learning_rate_source = rule if result.learning_rate is None else "given"
        try:
            if result.learning_rate is not None:
                return
            if rule == "search":
                result.learning_rate = best_learning_rate(self._search(method, result))
            elif rule == "default":
                result.learning_rate = method.default_rate()
            elif rule == "theory":
                result.learning_rate = result.theory_learning_rate
            elif math.isfinite(measured := result.measured_learning_rate or math.nan):
                result.learning_rate = method.scale * measured
            else:
                raise ValueError("no learning rate follows from its first direction.")
        finally:
            result.learning_rate_seconds += time.perf_counter() - began

    def _search(self, method: Method, result: MethodResult) -> Search:
        """Try learning rates on short runs."""
        schedule = self._trial(method)
        search = result.search or Search(schedule.steps, seconds=schedule.seconds)
        result.search = search
        self.observer.begin(result.name, BUDGET * schedule.budget, True)
        before = len(search.trials) * schedule.budget

        def report(taken: float, loss: float, metric: float) -> None:
            self.observer.step(before + taken, loss, metric)

        def final_loss(rate: float) -> float:
            nonlocal before
            self._keep(self.results())
            run = self._train(self.problem, method, rate, schedule, report)
            before += schedule.budget
            if run.status == "interrupted":
                raise KeyboardInterrupt
            return run.final_loss

        return search_learning_rate(final_loss, method.grid, search)

    def _measure(self, method: Method) -> float:
        inputs, targets = next(self.problem.batches.training(self.config.seed))
        objective, setting = self.problem.objective, self.problem.setting

        def unbounded(model: nn.Module) -> torch.optim.Optimizer:
            optimizer = method.build(model, 1.0, objective.likelihood, setting)
            for group in optimizer.param_groups:
                group["kl_clip"] = None
            return optimizer

        return measured_learning_rate(self.problem.model, unbounded, objective, inputs, targets)

    def _train(
        self,
        problem: Problem,
        method: Method,
        rate: float,
        schedule: Schedule,
        report: Callable[[float, float, float], None] | None = None,
        keep: bool = False,
    ) -> Run:
        """Train a copy of a problem's network, and keep states along the way if asked to."""
        model = copy.deepcopy(problem.model)
        report = report or self.observer.step
        wanted: set[float] = set()
        if keep:
            assert schedule.steps is not None
            wanted = {schedule.steps // 10, schedule.steps}
            self._snapshots = {0: copy.deepcopy(model.state_dict())}

        def observe(taken: float, loss: float, metric: float) -> None:
            if taken in wanted:
                self._snapshots[int(taken)] = copy.deepcopy(model.state_dict())
            report(taken, loss, metric)

        objective, batches, closure = problem.objective, problem.batches, method.takes_closure
        with reproducible(schedule.seed):
            optimizer = method.build(model, rate, objective.likelihood, problem.setting)
            return train(model, optimizer, objective, batches, schedule, observe, closure)

    def _trial(self, method: Method) -> Schedule:
        """Return how long a trial of a search trains."""
        schedule = replace(self._schedule(method), evaluations=frozenset(), pause=None)
        if self.config.search_steps is not None:
            schedule = replace(schedule, steps=self.config.search_steps, seconds=None)
        return schedule

    def _schedule(self, method: Method, seed: int | None = None) -> Schedule:
        """Return how long a method trains, and when it is evaluated."""
        config, seed = self.config, self.config.seed if seed is None else seed
        steps = config.steps if method.is_natural else config.effective_first_order_steps
        if steps is None:
            assert config.seconds is not None
            pause = config.seconds / _EVALUATIONS
            return Schedule(None, seconds=config.seconds, pause=pause, seed=seed)
        if config.full_batch and config.eval_every is None:  # Also dense at the start.
            evaluations = {round(steps * part / _EVALUATIONS) for part in range(_EVALUATIONS)}
            evaluations |= {round(steps ** (part / _EVALUATIONS)) for part in range(_EVALUATIONS)}
        else:
            epoch = steps if config.own_data else self.problem.batches.epoch
            often = config.eval_every or min(max(1, steps // _EVALUATIONS), epoch)
            evaluations = set(range(0, steps, often))
        return Schedule(steps, frozenset(evaluations), seed=seed)

    def measure_quality(self) -> None:
        """Measure the updates of all approximations at the snapshots, if asked for."""
        if self.config.quality and self._snapshots:
            problem, batches = self.problem, self.problem.batches
            assert isinstance(batches, TensorBatches)
            what = problem.model, self._snapshots, problem.objective
            data = batches.first(QUALITY_SAMPLES)
            self._quality = measure_quality(*what, *data, self.config.seed)


def _target(config: CompareConfig, methods: list[MethodResult]) -> Target:
    if config.target_loss is not None:
        return Target(config.target_loss, "as given")

    def lowest(result: MethodResult) -> float:
        return min(filter(math.isfinite, result.train.loss), default=math.inf)

    first_order = [result for result in methods if result.family == "first-order"]
    best = min(first_order, key=lowest, default=None)
    if best is not None and math.isfinite(lowest(best)):
        rule = f"the lowest training loss of {best.title}, the best first-order method"
        return Target(lowest(best), rule)
    completed = [lowest(result) for result in methods if result.status == "completed"]
    if completed:
        return Target(max(completed), "the loss that every completed method reached")
    return Target(None, "none, since no method completed")
