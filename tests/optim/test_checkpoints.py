"""State dicts of every optimizer: hooks, refusals, other types, and distributed checkpoints."""

from __future__ import annotations

import copy
import functools
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import natgrad
from tests.optim.every_optimizer import KINDS, make_model, weights
from tests.state import same

pytestmark = pytest.mark.filterwarnings("ignore")

FEW = ["KFAC", "SINGD", "ExactNGD", "FNGD", "EGN", "ResidualNGD"]


def trained(name: str, steps: int, dtype: torch.dtype = torch.float64) -> tuple[Any, nn.Module]:
    """Return an optimizer and its model after some steps, which are taken once."""
    return copy.deepcopy(_trained(name, steps, dtype)) if steps else _made(name, 0, dtype)


def _made(name: str, steps: int, dtype: torch.dtype) -> tuple[Any, nn.Module]:
    model = make_model(dtype)
    optimizer = KINDS[name].make(model)
    for _ in range(steps):
        KINDS[name].step(optimizer, model)
    return optimizer, model


_trained = functools.cache(_made)


def curvature(optimizer: Any) -> Any:
    """What is loaded beside groups and per-parameter state."""
    state = optimizer.state_dict()["natgrad"]
    return state.get("curvature", state)


def continues(name: str, original: tuple[Any, nn.Module], other: tuple[Any, nn.Module]) -> None:
    """Check that both take the same further steps."""
    other[1].load_state_dict(original[1].state_dict())
    for _ in range(3):
        for optimizer, model in (original, other):
            KINDS[name].step(optimizer, model)
        assert same(weights(original[1]), weights(other[1]))


# -- hooks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FEW)
def test_hooks_see_everything(name: str):
    source, _ = trained(name, 3)
    seen: list[Any] = []
    source.register_state_dict_post_hook(lambda _, state: seen.append(set(state)))
    state = source.state_dict()
    assert seen == [set(state)] and "natgrad" in state
    target, _ = trained(name, 0)
    target.register_load_state_dict_pre_hook(lambda _, given: seen.append(set(given)))
    target.register_load_state_dict_post_hook(lambda one: seen.append(one.state_dict()))
    target.load_state_dict(state)
    assert seen[1] == set(state)
    assert same(seen[2]["natgrad"], state["natgrad"])


def test_a_hook_may_replace_the_state_dict():
    source, _ = trained("KFAC", 2)
    source.register_state_dict_post_hook(lambda _, state: {**state, "more": 1})
    state = source.state_dict()
    assert state.pop("more") == 1
    for entry in state["state"].values():
        entry.pop("natgrad", None)
    own = state.pop("natgrad")
    target, _ = trained("KFAC", 0)
    with pytest.raises(ValueError, match="has no natgrad curvature"):
        target.load_state_dict(state)
    target.register_load_state_dict_pre_hook(lambda _, given: {**given, "natgrad": own})
    target.load_state_dict(state)
    assert same(curvature(target), curvature(source))


# -- refusals --------------------------------------------------------------------------------------


def wider(name: str) -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    optimizer = KINDS[name].make(model)
    KINDS[name].step(optimizer, model)
    return optimizer.state_dict()


@pytest.mark.parametrize(
    "options", [{"damping": 1e-3}, {"lr": 1.5, "step_rule": natgrad.StepRule(length="lr")}]
)
def test_a_checkpoint_in_other_units_is_refused(options):
    saved, optimizer = (natgrad.KFAC(make_model(), **one) for one in ({}, options))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="in other units than this optimizer's"):
        optimizer.load_state_dict(saved.state_dict())
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("fault", ["none", "layers", "sizes", "groups", "version"])
def test_a_refused_load_changes_nothing(name: str, fault: str):
    state = copy.deepcopy(trained(name, 2)[0].state_dict())
    state["param_groups"][0]["lr"] = 123.0
    own = state["natgrad"]
    if fault == "none":
        for entry in (state, *state["state"].values()):
            entry.pop("natgrad", None)
    elif fault == "layers":
        layers = own.get("curvature", own)
        layers["other"] = layers.pop(next(iter(layers)))
    elif fault == "sizes":
        state = wider(name)
    elif fault == "groups":
        state["param_groups"].append(copy.deepcopy(state["param_groups"][0]))
    elif name == "ResidualNGD":
        return  # Its state has no version.
    else:
        own["version"] = 99
    optimizer, model = trained(name, 3)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError):
        optimizer.load_state_dict(state)
    assert same(before, copy.deepcopy(optimizer.state_dict()))
    twin = trained(name, 3)
    for _ in range(2):
        KINDS[name].step(optimizer, model)
        KINDS[name].step(*twin)
    assert same(weights(model), weights(twin[1]))


# -- other types -----------------------------------------------------------------------------------


def floating(state: Any) -> set[torch.dtype]:
    """Types of all matrices and vectors of a nested state."""
    if isinstance(state, torch.Tensor):
        return {state.dtype} if state.is_floating_point() and state.dim() else set()
    items = state.values() if isinstance(state, dict) else state
    if isinstance(state, (dict, list, tuple)):
        return set().union(*(floating(item) for item in items))
    return set()


@pytest.mark.parametrize(
    ("name", "types"),
    [(name, (torch.float64, torch.float32)) for name in KINDS]
    + [(name, (torch.float32, torch.float64)) for name in FEW],
)
def test_state_is_cast_to_the_types_it_is_loaded_for(name: str, types):
    source, _ = trained(name, 3, types[0])
    target, model = trained(name, 0, types[1])
    target.load_state_dict(source.state_dict())
    own, _ = trained(name, 3, types[1])
    assert floating(target.state_dict()) == floating(own.state_dict())
    start = weights(model)
    for _ in range(3):
        KINDS[name].step(target, model)
    assert weights(model).isfinite().all() and not torch.equal(weights(model), start)


# -- distributed checkpoints -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "flat"), [(name, False) for name in KINDS] + [(name, True) for name in FEW]
)
def test_distributed_state_dicts_hold_everything(name: str, flat: bool):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    original, other = trained(name, 3), trained(name, 0)
    state = get_optimizer_state_dict(original[1], original[0], options=options)
    if KINDS[name].takes == "parameters":
        state = copy.deepcopy(state)  # As in torch.optim what is loaded is shared otherwise.
    set_optimizer_state_dict(other[1], other[0], state, options=options)
    continues(name, original, other)


@pytest.mark.parametrize("looked_at", ["copied", "saved"])
@pytest.mark.parametrize("name", FEW)
def test_optimizers_that_were_looked_at_are_as_new_to_distributed_state_dicts(name, looked_at):
    """Torch gives them the state of a first step before it loads, if they have none."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    original, other = trained(name, 3), trained(name, 0)
    if looked_at == "copied":
        other = copy.deepcopy(other)
    else:
        other[0].state_dict()
    state = get_optimizer_state_dict(original[1], original[0], options=options)
    set_optimizer_state_dict(other[1], other[0], state, options=options)
    continues(name, original, other)


@pytest.mark.parametrize(
    "name", [*FEW, "Padam", "ImplicitSGD", "SINGD, bfloat16", "ConjugateGradientNGD", "EKFAC"]
)
def test_distributed_checkpoints_hold_everything(name: str, tmp_path: Path):
    original, other = trained(name, 3), trained(name, 0)
    state = {"optimizer": get_optimizer_state_dict(original[1], original[0])}
    dcp.save(state, checkpoint_id=str(tmp_path))
    state = {"optimizer": get_optimizer_state_dict(other[1], other[0])}
    dcp.load(state, checkpoint_id=str(tmp_path))
    set_optimizer_state_dict(other[1], other[0], state["optimizer"])
    continues(name, original, other)


@pytest.mark.parametrize("name", FEW)
def test_files_load_with_weights_only(name: str):
    original, other = trained(name, 3), trained(name, 0)
    file = io.BytesIO()
    torch.save(original[0].state_dict(), file)
    file.seek(0)
    other[0].load_state_dict(torch.load(file, weights_only=True))
    continues(name, original, other)
