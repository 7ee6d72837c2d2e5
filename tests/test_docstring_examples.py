"""The examples in docstrings run, and every class that people begin with has one."""

from __future__ import annotations

import copy
import doctest
import importlib
import inspect
import pkgutil
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import natgrad
from tests.wave_functions.exact import RealAmplitude

NAMES = [
    name
    for _, name, _ in pkgutil.walk_packages(natgrad.__path__, "natgrad.")
    if name != "natgrad.__main__"
]


def found_examples() -> Iterator[doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    for name in NAMES:
        yield from (test for test in finder.find(importlib.import_module(name)) if test.examples)


class Checker(doctest.OutputChecker):
    """What an example states is compared; where it states nothing, running is enough."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


EXAMPLES = {test.name: test for test in found_examples()}
NEEDED = [
    natgrad.KFAC,
    natgrad.EKFAC,
    natgrad.SINGD,
    natgrad.ExactNGD,
    natgrad.FNGD,
    natgrad.ResidualNGD,
    natgrad.Preconditioner,
    natgrad.Laplace,
    natgrad.fisher_matrix,
    natgrad.ntk.isotropy,
    natgrad.ntk.isotropic_constant,
    natgrad.tools.influence,
    natgrad.tools.prune,
    natgrad.tools.merge,
    natgrad.tools.ewc_penalty,
]


def classification() -> dict[str, Any]:
    """What most examples speak of: a classifier and its data."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 10))
    x, y = torch.randn(16, 4), torch.arange(16) % 10
    loader = [(x[:8], y[:8]), (x[8:], y[8:])]
    F = natgrad.fisher_matrix(model, (x, y), structure="kfac")

    def closure() -> torch.Tensor:
        model.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return {
        "model": model,
        "x": x,
        "y": y,
        "x_test": x[:3],
        "y_test": y[:3],
        "loader": loader,
        "train_loader": loader,
        "first_task": loader,
        "closure": closure,
        "F": F,
        "F_a": F,
        "F_b": F,
        "model_a": model,
        "model_b": copy.deepcopy(model),
        "gradient": torch.ones(F.shape[0]),
        "cross_entropy": functional.cross_entropy,
        "train": lambda model: None,
        "evaluate": lambda model: None,
    }


def regression() -> dict[str, Any]:
    """For the theory kit: targets of the output's shape."""
    x = torch.randn(6, 4)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    return {"model": model, "x": x, "y": torch.randn(6, 2), "x_test": torch.randn(3, 4)}


def equation() -> dict[str, Any]:
    """Poisson's equation and the heat equation in the plane."""
    network = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    points = torch.rand(9, 2, dtype=torch.float64)
    return {
        "network": network,
        "model": network,
        "points": points,
        "source": torch.ones(9, 1, dtype=torch.float64),
        "values": torch.zeros(9, 1, dtype=torch.float64),
        "start": points,
        "residual_loss": lambda model: model(points).square().mean(),
        "residuals": natgrad.Residual(lambda u, x: u.value + 1.0, points),
        "Square": type("Square", (nn.Module,), {"forward": lambda self, x: x**2}),
    }


def added_points() -> dict[str, Any]:
    scene = equation()
    start = natgrad.Residual(lambda u, x: u(x), scene["points"][:3])
    return {**scene, "heat": lambda u, x: torch.func.jacrev(u)(x)[:, 1], "start": start}


def training() -> dict[str, Any]:
    scene = classification()
    return {**scene, "optimizer": natgrad.KFAC(scene["model"])}


SCENES: dict[str, Callable[[], dict[str, Any]]] = {
    "natgrad.ntk": regression,
    "natgrad.optim.averaging": training,
    "natgrad.residuals": equation,
    "natgrad.residuals.adaptive_points": added_points,
    "natgrad.first_order": equation,
    "natgrad.wave_functions": lambda: {"model": RealAmplitude(12)},
}


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[None]:
    """A process group of this process alone, in place of the one an example starts."""
    begin = torch.distributed.init_process_group
    begun = {"init_method": f"file://{tmp_path}/group", "rank": 0, "world_size": 1}
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda: begin("gloo", **begun))
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name: str, one_process: None) -> None:
    example = EXAMPLES[name]
    names = {"natgrad": natgrad, "torch": torch, "nn": nn, **classification()}
    names["range"] = lambda number: range(min(number, 3))  # Three turns of a loop are enough.
    for prefix in sorted(SCENES, key=len):
        if name.startswith(prefix):
            names.update(SCENES[prefix]())
    module = importlib.import_module(max((n for n in NAMES if name.startswith(n + ".")), key=len))
    example.globs = {**vars(module), **names}
    said: list[str] = []
    doctest.DocTestRunner(Checker(), verbose=False).run(example, out=said.append)
    assert not said, "".join(said)


@pytest.mark.parametrize("one", NEEDED, ids=lambda one: one.__name__)
def test_what_people_begin_with_has_an_example(
    one: type | types.FunctionType,
) -> None:
    assert ">>> " in (inspect.getdoc(one) or "")
