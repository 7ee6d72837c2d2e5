"""torch.compile leaves the steps as they are."""

from __future__ import annotations

import shutil

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
