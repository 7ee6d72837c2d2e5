"""The main job: train one network with every method from the same initial weights, and compare."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone

import torch
from torch import Tensor, nn

from natgrad.experiments.calibration import measured_learning_rate
from natgrad.experiments.config import CompareConfig
from natgrad.experiments.data import DATASETS, load_dataset
from natgrad.experiments.environment import describe_environment
from natgrad.experiments.memory import PeakMemory
from natgrad.experiments.methods import METHODS, Method, Setting
from natgrad.experiments.models import build_model
from natgrad.experiments.objectives import OBJECTIVES
from natgrad.experiments.quality import QUALITY_SAMPLES, measure_quality
from natgrad.experiments.results import MethodResult, QualityPoint, Results, Run, Search, Target
from natgrad.experiments.search import BUDGET, best_learning_rate, search_learning_rate
from natgrad.experiments.training import Schedule, train

__all__ = ["Observer", "compare"]


class Observer:
    """Told of the progress of a comparison; one that does something overrides the methods."""

    def begin(self, method: str, steps: int, searching: bool) -> None:
        """A method begins its learning-rate search or its training, of so many steps."""

    def step(self, taken: int, loss: float, accuracy: float) -> None:
        """So many steps are taken; loss and training accuracy of the last one."""

    def end(self, result: MethodResult) -> None:
        """A method has ended, well or not."""


def compare(config: CompareConfig, observer: Observer | None = None, command: str = "") -> Results:
    """Train one network with every method from the same initial weights on the same data.

    Args:
        config: What to compare.
        observer: Told of progress; silent by default.
        command: The command line to record as the one that repeats the comparison.

    Returns:
        The results. After Ctrl-C they hold what was measured until then, `interrupted` is true, and
        methods that had not begun have the status "not run".
    """
    created, began = datetime.now(timezone.utc), time.perf_counter()
    comparison = _Comparison(config, observer or Observer())
    methods = [comparison.blank(name) for name in config.methods]
    interrupted = False
    try:
        comparison.warm_up()
        for index, name in enumerate(config.methods):
            methods[index] = comparison.run(name)
            comparison.observer.end(methods[index])
            if methods[index].status == "interrupted":
                interrupted = True
                break
    except KeyboardInterrupt:
        interrupted = True
    quality = [] if interrupted else comparison.measure_quality()
    target = _target(config, methods)
    for result in methods:
        reached = None if target.loss is None else result.train.first_below(target.loss)
        if reached is not None:
            result.steps_to_target = result.train.step[reached]
            result.seconds_to_target = result.train.seconds[reached]
    return Results(
        created=created.isoformat(timespec="seconds"),
        seconds=time.perf_counter() - began,
        interrupted=interrupted,
        command=command,
        config=config.as_dict(),
        data=comparison.describe_data(),
        model=comparison.describe_model(),
        environment=describe_environment(config.torch_device()),
        target=target,
        methods=methods,
        quality=quality,
    )


class _Comparison:
    """The network, the data and the options that all methods share."""

    def __init__(self, config: CompareConfig, observer: Observer) -> None:
        self.config = config
        self.observer = observer
        self.objective = OBJECTIVES[config.loss]
        self.device, dtype = config.torch_device(), config.torch_dtype()
        data = load_dataset(
            config.data,
            config.data_dir,
            train_samples=config.effective_train_samples,
            test_samples=config.test_samples,
            seed=config.seed,
        )
        self.data = data.to(self.device, dtype)
        self.model = build_model(
            config.model,
            data.input_shape,
            data.classes,
            width=config.effective_width,
            depth=config.depth,
            seed=config.seed,
        ).to(self.device, dtype)
        samples = len(data.train_labels)
        batch = samples if config.batch_size is None else min(config.batch_size, samples)
        self.setting = Setting(
            model=config.model,
            loss=config.loss,
            depth=config.depth,
            width=config.effective_width,
            input_dim=data.train_inputs[0].numel(),
            outputs=data.classes,
            samples=batch,
            full_batch=config.batch_size is None,
            epoch=math.ceil(samples / batch),
            damping=config.damping,
            fisher=config.fisher,
            seed=config.seed,
        )
        #: States of the network along the run of the first method, by steps taken.
        self.snapshots: dict[int, dict[str, Tensor]] = {}

    def schedule(self, method: Method) -> Schedule:
        """Return how long a method trains, and when it is evaluated."""
        config = self.config
        steps = config.steps if method.is_natural else config.effective_first_order_steps
        if config.eval_every is not None:
            evaluations = set(range(0, steps, config.eval_every))
        elif config.batch_size is not None:
            evaluations = set(range(0, steps, min(max(1, steps // 20), self.setting.epoch)))
        else:  # also dense at the start, where most happens
            evaluations = {round(steps * part / 20) for part in range(20)}
            evaluations |= {round(steps ** (part / 20)) for part in range(20)}
        return Schedule(steps, config.batch_size, frozenset(evaluations), config.seed)

    def blank(self, name: str) -> MethodResult:
        """Return the result of a method that has not run."""
        method = METHODS[name]
        return MethodResult(
            name=name,
            title=method.title,
            family="natural" if method.is_natural else "first-order",
            description=method.description,
            steps=self.schedule(method).steps,
            damping=method.damping(self.setting),
        )

    def warm_up(self) -> None:
        """Take two steps, so that the first method does not pay for what PyTorch does only once."""
        model = copy.deepcopy(self.model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        schedule = Schedule(2, self.config.batch_size, frozenset({0}))
        train(model, optimizer, self.objective, self.data, schedule)
        square = torch.eye(256, device=self.device, dtype=self.config.torch_dtype())
        torch.linalg.cholesky(square)
        torch.linalg.eigh(square)

    def run(self, name: str) -> MethodResult:
        """Choose the learning rate of a method, train with it, and return the result."""
        method, result = METHODS[name], self.blank(name)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            try:
                self._choose_learning_rate(name, method, result)
                if result.learning_rate is None:
                    result.status = "diverged"
                    result.message = "Every learning rate of the search diverged."
                else:
                    self._train_for(name, method, result.learning_rate, result)
            except KeyboardInterrupt:
                result.status = "interrupted"
            except (RuntimeError, ValueError, ArithmeticError) as error:
                result.status, result.message = "failed", f"{type(error).__name__}: {error}"
        said = [str(warning.message) for warning in caught if warning.category is UserWarning]
        result.message = " ".join(filter(None, [result.message, *dict.fromkeys(said)]))
        return result

    def _train_for(self, name: str, method: Method, rate: float, result: MethodResult) -> None:
        """Train with a method and fill in its result."""
        schedule = self.schedule(method)
        self.observer.begin(name, schedule.steps, False)
        with PeakMemory(self.device) as peak:
            keep = name == self.config.methods[0] and self.config.quality
            run = self._train(method, rate, schedule, self.observer.step, keep)
        vars(result).update(vars(run))
        result.peak_memory_bytes = peak.bytes

    def _choose_learning_rate(self, name: str, method: Method, result: MethodResult) -> None:
        """Fill in the learning rate of a result; None if every rate of a search diverged."""
        began = time.perf_counter()
        rule = method.learning_rate_rule(self.setting)
        if method.is_natural:
            result.theory_learning_rate = method.theoretical_rate(self.setting)
            if self.setting.is_wide and rule in ("theory", "measured"):
                result.measured_learning_rate = self._measure(method)
        result.learning_rate = self.config.learning_rates.get(name)
        result.learning_rate_source = rule if result.learning_rate is None else "given"
        try:
            if result.learning_rate is None:
                result.learning_rate = self._learning_rate(name, method, rule, result)
        finally:
            result.learning_rate_seconds = time.perf_counter() - began

    def _learning_rate(
        self, name: str, method: Method, rule: str, result: MethodResult
    ) -> float | None:
        """Return the learning rate that a rule gives."""
        if rule == "search":
            result.search = self._search(name, method)
            return best_learning_rate(result.search)
        if rule == "default":
            return method.default_rate()
        if rule == "theory":
            return result.theory_learning_rate
        measured = result.measured_learning_rate
        if measured is None or not math.isfinite(measured):
            raise ValueError("no learning rate follows from its first direction.")
        return method.scale * measured

    def _search(self, name: str, method: Method) -> Search:
        """Try learning rates on short runs."""
        schedule = self.schedule(method)
        steps = self.config.search_steps or schedule.steps
        schedule = replace(schedule, steps=steps, evaluations=frozenset())
        self.observer.begin(name, BUDGET * steps, True)
        before = 0

        def report(taken: int, loss: float, correct: float) -> None:
            self.observer.step(before + taken, loss, correct)

        def final_loss(rate: float) -> float:
            nonlocal before
            run = self._train(method, rate, schedule, report)
            before += steps
            if run.status == "interrupted":
                raise KeyboardInterrupt
            return run.final_loss

        return search_learning_rate(final_loss, method.grid, steps)

    def _measure(self, method: Method) -> float:
        data = self.data
        return measured_learning_rate(
            self.model,
            lambda model: self._build(method, model, 1.0, clip=False),
            self.objective,
            data.train_inputs,
            self.objective.encode(data.train_labels, data.classes),
        )

    def _build(
        self, method: Method, model: nn.Module, rate: float, clip: bool = True
    ) -> torch.optim.Optimizer:
        optimizer = method.build(model, rate, self.objective.likelihood, self.setting)
        if not clip:
            for group in optimizer.param_groups:
                group["kl_clip"] = None
        return optimizer

    def _train(
        self,
        method: Method,
        rate: float,
        schedule: Schedule,
        report: Callable[[int, float, float], None],
        keep_snapshots: bool = False,
    ) -> Run:
        model = copy.deepcopy(self.model)
        optimizer = self._build(method, model, rate)
        wanted = {schedule.steps // 10, schedule.steps} if keep_snapshots else set()
        if keep_snapshots:
            self.snapshots = {0: copy.deepcopy(model.state_dict())}

        def observe(taken: int, loss: float, correct: float) -> None:
            if taken in wanted:
                self.snapshots[taken] = copy.deepcopy(model.state_dict())
            report(taken, loss, correct)

        return train(
            model, optimizer, self.objective, self.data, schedule, observe, method.takes_closure
        )

    def measure_quality(self) -> list[QualityPoint]:
        """Measure the updates of all approximations at the snapshots."""
        data = self.data
        inputs, labels = data.train_inputs, data.train_labels
        targets = self.objective.encode(labels, data.classes).to(self.device)
        return measure_quality(
            self.model,
            self.snapshots,
            self.objective,
            inputs[:QUALITY_SAMPLES],
            targets[:QUALITY_SAMPLES],
            self.config.seed,
        )

    def describe_data(self) -> dict[str, object]:
        """Return the data in JSON values."""
        data = self.data
        return {
            "name": data.name,
            "title": DATASETS[data.name].title,
            "train_samples": len(data.train_labels),
            "test_samples": len(data.test_labels),
            "input_shape": list(data.input_shape),
            "classes": data.classes,
        }

    def describe_model(self) -> dict[str, object]:
        """Return the network in JSON values."""
        return {
            "name": self.config.model,
            "width": self.config.effective_width,
            "depth": self.config.depth,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "text": str(self.model),
        }


def _target(config: CompareConfig, methods: list[MethodResult]) -> Target:
    if config.target_loss is not None:
        return Target(config.target_loss, "as given")
    lowest = {
        result.title: min(filter(math.isfinite, result.train.loss), default=math.inf)
        for result in methods
    }
    first_order = [result.title for result in methods if result.family == "first-order"]
    best = min(first_order, key=lowest.__getitem__, default=None)
    if best is not None and math.isfinite(lowest[best]):
        rule = f"the lowest training loss of {best}, the best first-order method"
        return Target(lowest[best], rule)
    completed = [lowest[result.title] for result in methods if result.status == "completed"]
    if completed:
        return Target(max(completed), "the loss that every completed method reached")
    return Target(None, "none, since no method completed")
