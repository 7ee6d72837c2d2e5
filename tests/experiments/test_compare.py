import dataclasses
import math
import warnings

import pytest
import torch

from natgrad.experiments.compare import compare
from natgrad.experiments.config import CompareConfig
from natgrad.experiments.methods import METHODS

TINY = dict(
    train_samples=30,
    test_samples=20,
    width=8,
    steps=5,
    first_order_steps=5,
    search_steps=2,
    quality=False,
)


class Recorder:
    def __init__(self, stop_at=None):
        self.events, self.stop_at = [], stop_at

    def begin(self, method, steps, searching):
        self.events.append((method, "search" if searching else "train", steps))

    def step(self, taken, loss, accuracy):
        assert math.isfinite(loss) and 0 <= accuracy <= 1
        if self.events[-1] == self.stop_at and taken == 2:
            raise KeyboardInterrupt

    def end(self, result):
        self.events.append((result.name, result.status))


def test_all_methods_start_from_the_same_weights_and_results_repeat():
    config = CompareConfig(methods=("sgd", "adamw"), **TINY)
    first, second = compare(config), compare(config)
    initial = {result.train.loss[0] for result in first.methods + second.methods}
    assert len(initial) == 1
    for one, two in zip(first.methods, second.methods, strict=True):
        assert one.train.loss == two.train.loss
        assert one.learning_rate == two.learning_rate


def test_the_search_gets_the_same_budget_and_its_best_rate_is_used():
    results = compare(CompareConfig(methods=("sgd", "adamw"), **TINY))
    for result in results.methods:
        finite = [trial for trial in result.search.trials if math.isfinite(trial.loss)]
        assert result.learning_rate == min(finite, key=lambda trial: trial.loss).learning_rate
        assert result.learning_rate_source == "search"
        assert len(result.search.trials) <= 9
        assert result.search.steps == 2
        assert result.learning_rate_seconds > 0


def test_target_is_the_best_first_order_loss_unless_given():
    results = compare(CompareConfig(methods=("sgd", "adamw"), **TINY))
    best = min(min(result.train.loss) for result in results.methods)
    assert results.target.loss == best
    for result in results.methods:
        reached = [
            s for s, x in zip(result.train.step, result.train.loss, strict=True) if x <= best
        ]
        assert result.steps_to_target == (reached[0] if reached else None)
    given = compare(CompareConfig(methods=("sgd",), target_loss=1e9, **TINY))
    assert given.target.rule == "as given"
    assert given.methods[0].steps_to_target == 0
    assert given.methods[0].seconds_to_target == 0.0


def test_a_given_learning_rate_skips_the_search():
    config = CompareConfig(methods=("sgd",), learning_rates={"sgd": 0.01}, **TINY)
    recorder = Recorder()
    result = compare(config, recorder).methods[0]
    assert result.search is None
    assert (result.learning_rate, result.learning_rate_source) == (0.01, "given")
    assert recorder.events == [("sgd", "train", 5), ("sgd", "completed")]


def test_mini_batches():
    results = compare(CompareConfig(methods=("sgd",), batch_size=7, loss="cross_entropy", **TINY))
    result = results.methods[0]
    assert result.batch.step == [0, 1, 2, 3, 4]
    assert result.train.step[-1] == 5


@pytest.mark.parametrize("stage", ["search", "train"])
def test_interrupt_keeps_what_is_there(stage):
    config = CompareConfig(methods=("sgd", "adamw"), **TINY)
    steps = 18 if stage == "search" else 5
    results = compare(config, Recorder(stop_at=("adamw", stage, steps)))
    assert results.interrupted
    assert [result.status for result in results.methods] == ["completed", "interrupted"]
    assert results.methods[1].train.step == ([0, 1, 2] if stage == "train" else [])
    results = compare(config, Recorder(stop_at=("sgd", stage, steps)))
    assert [result.status for result in results.methods] == ["interrupted", "not run"]


def test_a_method_that_cannot_run_does_not_stop_the_others(monkeypatch):
    def impossible(parameters, lr, weight_decay):
        raise ValueError("no such optimizer today")

    broken = dataclasses.replace(METHODS["adamw"], optimizer=impossible)
    monkeypatch.setitem(METHODS, "adamw", broken)
    results = compare(CompareConfig(methods=("adamw", "sgd"), **TINY))
    assert [result.status for result in results.methods] == ["failed", "completed"]
    assert "no such optimizer today" in results.methods[0].message


def test_warnings_of_an_optimizer_are_kept_with_its_result(monkeypatch):
    def warning(parameters, lr, momentum):
        warnings.warn("the weather is bad", stacklevel=1)
        return torch.optim.SGD(parameters, lr=lr)

    wordy = dataclasses.replace(METHODS["sgd"], optimizer=warning)
    monkeypatch.setitem(METHODS, "sgd", wordy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = compare(CompareConfig(methods=("sgd",), **TINY))
    assert results.methods[0].message == "the weather is bad"
    assert results.methods[0].status == "completed"
