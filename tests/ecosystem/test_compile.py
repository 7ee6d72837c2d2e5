"""torch.compile leaves the steps as they are."""

from __future__ import annotations

import copy
import shutil
import warnings
from itertools import pairwise

import pytest
import torch
from torch import nn

from tests.ecosystem.loops import (
    assert_curvature_everywhere,
    batches,
    make,
    network,
    perceptron,
    train,
)
from tests.state import flat


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


ORDERS = ("compiled first", "optimizer first", "in place")
BACKENDS = ("eager", "aot_eager")
#: Hooks and their order are the same for all: one optimizer meets every order, on convolutions,
#: and one of each other kind of step meets one of all combinations with a backend.
OTHERS = ["singd", "exact", "egn", "padam"]
CASES = [("kfac", order, BACKENDS[(index + 1) % 2]) for index, order in enumerate(ORDERS)]
CASES += [(name, ORDERS[index % 3], BACKENDS[index % 2]) for index, name in enumerate(OTHERS)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "order", "backend"), CASES)
def test_compiled_models_take_the_same_steps(name, order, backend):
    plain, model = (network() if name == "kfac" else perceptron() for _ in range(2))
    data = batches(5)
    optimizer = make(name, plain)
    train(plain, optimizer, data)
    if order == "in place":
        other = make(name, model)
        model.compile(backend=backend)
        compiled = model
    elif order == "compiled first":
        compiled = torch.compile(model, backend=backend)
        other = make(name, compiled)
    else:
        other = make(name, model)
        compiled = torch.compile(model, backend=backend)
    train(compiled, other, data)
    torch.testing.assert_close(flat(model), flat(plain), rtol=1e-9, atol=1e-12)
    assert_curvature_everywhere(other)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the inductor needs a C++ compiler")
def test_inductor(monkeypatch):
    # Scalar code, in this process: finding vectors or starting others takes longer than all else.
    monkeypatch.setattr("torch._inductor.config.cpp.vec_isa_ok", False)
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)
    plain, model = network(), network()
    data = batches(5)
    train(plain, make("kfac", plain), data)
    train(torch.compile(model), make("kfac", model), data)
    torch.testing.assert_close(flat(model), flat(plain), rtol=1e-7, atol=1e-9)


class _ActivatedBatchNorm(nn.BatchNorm2d):
    """A batch norm that goes on with an activation, as in libraries of image models."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        buffers = self.running_mean, self.running_var
        return nn.functional.batch_norm(x, *buffers, self.weight, self.bias, self.training).relu()


@pytest.mark.slow
def test_more_shapes_than_versions_of_a_function():
    """The compiler gives up on a function that is called with ever other shapes: not on hooks."""
    torch.manual_seed(0)
    widths = [1, *range(2, 8)]
    layers = [
        layer
        for before, after in pairwise(widths)
        for layer in (nn.Conv2d(before, after, 3, padding=1), _ActivatedBatchNorm(after))
    ]
    plain = nn.Sequential(*layers, nn.BatchNorm2d(7), nn.Flatten(), nn.Linear(252, 3)).double()
    model = copy.deepcopy(plain)
    data = batches(2)
    train(plain, make("kfac", plain), data)
    optimizer = make("kfac", model)
    train(torch.compile(model, backend="aot_eager"), optimizer, data)
    torch.testing.assert_close(flat(model), flat(plain), rtol=1e-9, atol=1e-12)
    assert_curvature_everywhere(optimizer)


class _Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = perceptron()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


@pytest.mark.parametrize("how", ["from outside", "in place", "one of its layers", "another"])
def test_models_that_ran_compiled_before(how):
    """They are compiled anew, with the hooks of their layers."""
    plain, model = _Classifier(), _Classifier()
    data = batches(3)
    train(plain, make("kfac", plain), data)
    compiled = model
    if how in ("from outside", "another"):
        compiled = torch.compile(model, backend="eager")
    else:
        (model if how == "in place" else model.layers).compile(backend="eager")
    ran = torch.compile(_Classifier(), backend="eager") if how == "another" else compiled
    ran(data[0][0])
    optimizer = make("kfac", model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="natgrad")
        train(compiled, optimizer, data)
    torch.testing.assert_close(flat(model), flat(plain), rtol=1e-9, atol=1e-12)
    assert_curvature_everywhere(optimizer)


def test_programs_of_jit_where_the_compiler_is_loaded():
    plain, data = perceptron(), batches(3)
    model = torch.jit.trace(perceptron(), data[0][0])
    for one in (plain, model):
        train(one, make("exact", one), data)
    torch.testing.assert_close(flat(model), flat(plain), rtol=1e-7, atol=1e-9)


def test_models_that_ran_inside_of_a_compiled_function_before():
    """The hooks of their layers are not called, and whoever trains them is told."""
    model = _Classifier()
    data = batches(1)
    compiled = torch.compile(lambda x: model(x), backend="eager")
    compiled(data[0][0])
    optimizer = make("kfac", model)
    with pytest.warns(UserWarning, match=r"torch.compiler.reset\(\)"):
        train(compiled, optimizer, data)
    torch.compiler.reset()
    optimizer = make("kfac", model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="natgrad")
        train(compiled, optimizer, data)


@pytest.mark.slow
def test_compiled_step():
    """The step itself may be wrapped, too: it runs eagerly inside."""
    plain, model = perceptron(), perceptron()
    data = batches(4)
    train(plain, make("kfac", plain), data)
    optimizer = make("kfac", model)
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    for x, y in data:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        step()
    torch.testing.assert_close(flat(model), flat(plain), rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_compiled_loop():
    """A whole training step may be compiled, too; the optimizer runs eagerly inside."""
    plain, model = perceptron(), perceptron()
    data = batches(4)
    train(plain, make("kfac", plain), data)
    optimizer = make("kfac", model)

    def loop(x: torch.Tensor, y: torch.Tensor) -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(loop, backend="eager")
    for x, y in data:
        compiled(x, y)
    torch.testing.assert_close(flat(model), flat(plain), rtol=1e-9, atol=1e-12)
    assert torch._dynamo.utils.counters["frames"]["total"] < 60
