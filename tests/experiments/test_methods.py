import inspect

import pytest
import torch

from natgrad.experiments.compare import compare
from natgrad.experiments.config import CompareConfig
from natgrad.experiments.methods import DEFAULT_METHODS, METHODS, Setting
from natgrad.experiments.models import build_model
from natgrad.optim import NaturalGradient

NATURAL = [name for name, method in METHODS.items() if method.is_natural]
WIDE = Setting(
    "mlp", "mse", depth=3, width=64, input_dim=64, outputs=10, samples=30, full_batch=True
)
BATCHES = Setting(
    "mlp", "mse", depth=3, width=64, input_dim=64, outputs=10, samples=30, full_batch=False
)


def build(name, setting, lr=0.5):
    model = build_model("mlp", (1, 8, 8), 10, width=8, depth=3, seed=0)
    return METHODS[name].build(model, lr, "gaussian", setting)


def test_the_methods_of_the_issue_are_the_default():
    assert DEFAULT_METHODS == (
        "sgd",
        "adamw",
        "exact",
        "block-diagonal",
        "block-tridiagonal",
        "kfac",
        "unit-wise",
    )


@pytest.mark.parametrize("name", NATURAL)
@pytest.mark.parametrize("setting", [WIDE, BATCHES])
def test_reported_options_are_those_of_the_optimizer(name, setting):
    optimizer = build(name, setting)
    assert isinstance(optimizer, NaturalGradient)
    assert optimizer.preconditioner.curvature.structure.name == METHODS[name].structure
    assert optimizer.param_groups[0]["damping"] == METHODS[name].damping(setting)
    assert optimizer.param_groups[0]["lr"] == 0.5
    given = Setting(**{**setting.__dict__, "damping": 0.25, "fisher": "empirical"})
    optimizer = build(name, given)
    assert optimizer.param_groups[0]["damping"] == METHODS[name].damping(given) == 0.25
    if not METHODS[name].alone:
        assert type(optimizer.preconditioner.observer.fisher).__name__ == "EmpiricalFisher"


@pytest.mark.parametrize("name", NATURAL)
def test_mini_batches_run_with_the_learning_rate_of_the_optimizer(name):
    method = METHODS[name]
    if method.rule == "search":
        assert method.learning_rate_rule(BATCHES) == "search"
        return
    assert method.learning_rate_rule(BATCHES) == "default"
    default = inspect.signature(method.optimizer).parameters["lr"].default
    assert method.default_rate() == default
    assert build(name, BATCHES).defaults["momentum"] == method._default("momentum")
    assert method.theoretical_rate(BATCHES) is None


@pytest.mark.parametrize("name", NATURAL)
@pytest.mark.parametrize("full_batch", [True, False])
def test_other_networks_run_with_the_defaults_of_the_optimizer(name, full_batch):
    setting = Setting(**{**WIDE.__dict__, "model": "cnn", "full_batch": full_batch})
    method, optimizer = METHODS[name], build(name, setting)
    assert method.learning_rate_rule(setting) == (
        "search" if method.rule == "search" else "default"
    )
    defaults = method.optimizer(build_model("mlp", (1, 8, 8), 10, width=8, depth=3, seed=0))
    for option in {"damping", "momentum", "kl_clip"} - set(method.options):
        assert optimizer.defaults.get(option) == defaults.defaults.get(option)
    if not method.alone:
        assert optimizer.step_rule == defaults.step_rule


def test_the_first_epoch_gives_fngd_its_coefficients():
    setting = Setting(**{**BATCHES.__dict__, "epoch": 7})
    assert build("fngd", setting).coefficient_steps == 7


@pytest.mark.parametrize(
    ("name", "alpha"),
    [("exact", 1), ("block-diagonal", 3), ("block-tridiagonal", 1), ("kfac", 30 + 30 + 1)],
)
def test_theoretical_rates(name, alpha):
    assert METHODS[name].theoretical_rate(WIDE) == pytest.approx(1 / alpha)


def test_first_order_methods_are_searched_everywhere():
    for name in ("sgd", "adamw", "padam"):
        assert METHODS[name].learning_rate_rule(WIDE) == "search"
        assert METHODS[name].learning_rate_rule(BATCHES) == "search"
        assert METHODS[name].damping(WIDE) is None


def run(**options):
    base = dict(train_samples=30, test_samples=10, width=128, steps=6, quality=False)
    return compare(CompareConfig(**{**base, **options})).methods


def test_wide_networks_obey_the_theory():
    """At their theoretical rates the exact forms nearly solve the squared error in one step."""
    for result in run(methods=("exact", "block-diagonal", "block-tridiagonal"), width=400):
        assert result.status == "completed", result.message
        assert result.learning_rate_source == "theory"
        assert result.measured_learning_rate == pytest.approx(result.learning_rate, rel=0.1)
        assert result.train.loss[1] < 0.2 * result.train.loss[0]
        assert result.train.loss[-1] < 1e-3 * result.train.loss[0]


#: One of rows, one of averaged factors, one of inverse factors, one of coefficients.
FEW = ("exact", "kfac", "singd", "fngd")


@pytest.mark.parametrize(("methods", "loss"), [(NATURAL, "mse"), (FEW, "cross_entropy")])
def test_every_method_learns_on_the_full_batch(methods, loss):
    options = dict(loss=loss, train_samples=20, width=64, steps=12, search_steps=4)
    for result in run(methods=tuple(methods), **options):
        assert result.status == "completed", f"{result.name}: {result.message}"
        assert result.train.loss[-1] < 0.7 * result.train.loss[0], result.name


@pytest.mark.parametrize(("methods", "model"), [(NATURAL, "mlp"), (FEW, "cnn")])
def test_every_method_learns_from_mini_batches(methods, model):
    width = 32 if model == "mlp" else 8
    options = dict(batch_size=15, loss="cross_entropy", steps=20, search_steps=15)
    for result in run(methods=tuple(methods), model=model, width=width, **options):
        assert result.status == "completed", f"{result.name}: {result.message}"
        assert result.train.loss[-1] < 0.9 * result.train.loss[0], result.name


def test_measuring_ignores_the_bound_on_the_step():
    config = dict(loss="cross_entropy", steps=1)
    (bounded,) = run(methods=("exact",), **config)
    assert bounded.measured_learning_rate == pytest.approx(1.0, rel=0.5)


def test_double_precision_runs_through():
    (result,) = run(methods=("exact",), dtype="float64", steps=8)
    assert result.train.loss[-1] < 1e-12
    assert torch.get_default_dtype() == torch.float32
