"""Rows of passes that compute something else than those before, though with the same calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from natgrad.capture.graph import graph_hash
from tests import dense
from tests.cases import normal
from tests.fisher.test_situations import rows_of
from tests.situations import Calls

Program = Callable[[Any, Tensor, int], Tensor]
PROGRAMS: dict[str, tuple[Program, list[Any]]] = {}


def program(states: list[Any]) -> Callable[[Program], Program]:
    """Register a function of a network, inputs and a state, which is another one at every step."""

    def register(function: Program) -> Program:
        PROGRAMS[function.__name__] = function, states
        return function

    return register


@program([0, 0, 0, 0, 0, 1, 1, 0])
def mixed_up_from_some_step_on(m: Any, x: Tensor, state: int) -> Tensor:
    h = torch.tanh(m.layer(x))
    h = 0.7 * h + 0.3 * h[[1, 2, 3, 0]] if state else h
    return m.head(h)


@program([0, 1, 2, 0, 1, 2, 2, 1, 0])
def two_views_laid_in_turn(m: Any, x: Tensor, state: int) -> Tensor:
    views = x, x.flip(1)
    if state == 0:
        left, right = map(m.layer, views)
    elif state == 1:
        left, right = m.layer(torch.cat(views)).chunk(2)
    else:
        both = m.layer(torch.stack(views, 1).flatten(0, 1))
        left, right = both[::2], both[1::2]
    return m.head(torch.tanh(left) - 2 * torch.tanh(right))


@program([0, 0, 0, 0, 1, 1])
def weights_used_once_more(m: Any, x: Tensor, state: int) -> Tensor:
    h = torch.tanh(m.layer(x))
    return m.head(h + torch.tanh(h @ m.layer.weight) @ m.layer.weight.T if state else h)


@program([0, 0, 0, 0, 0, 1, 1, 1])
def branch_behind_a_gate(m: Any, x: Tensor, state: int) -> Tensor:
    h = torch.tanh(m.layer(x))
    return m.head(h + state * torch.tanh(m.branch(h)) @ m.branch.weight)


@program([0, 0, 0, 0, 0, 1, 1])
def power_behind_a_gate(m: Any, x: Tensor, state: int) -> Tensor:
    h = torch.tanh(m.layer(x))
    return m.head(h + state * functional.linear(h, m.branch.weight @ m.branch.weight))


@program([1, 1, 1, 1, 1, 2, 2, 3])
def recurrent_views(m: Any, x: Tensor, state: int) -> Tensor:
    """As many views as the state says, which are no part of the graph."""
    views = x.repeat(state, 1) + torch.arange(state).repeat_interleave(len(x)).unsqueeze(1)
    return m.head(m.layer(views.unsqueeze(1))[1][-1].unflatten(0, (state, len(x))).sum(0))


@program([(1,) * 4, (1,) * 4, (1,) * 4, (2,) * 4, (2,) * 4, (1, 2, 4, 5)])
def unlike_numbers_of_tokens(m: Any, x: Tensor, state: tuple[int, ...]) -> Tensor:
    """Equal numbers at first, then as many per sample on average as never before."""
    owners = torch.arange(len(x)).repeat_interleave(torch.tensor(state))
    tokens = torch.tanh(m.layer(x[owners] + torch.arange(len(owners)).unsqueeze(1) / 10))
    return m.head(tokens.new_zeros(len(x), 4).index_add(0, owners, tokens))


def network(function: Program) -> Calls:
    torch.manual_seed(0)
    parts = {"layer": nn.Linear(3, 4), "head": nn.Linear(4, 2)}
    if function in (branch_behind_a_gate, power_behind_a_gate):
        parts["branch"] = nn.Linear(4, 4)
    if function is recurrent_views:
        parts["layer"] = nn.GRU(3, 4, batch_first=True)
    return Calls(function, **parts).double()


def wrong_steps(
    function: Program, states: Sequence[Any], samples: Sequence[int] | None = None
) -> list[int]:
    """Return the steps whose matrix is not that of their rows; they have 4 samples by default."""
    model, sizes = network(function), samples or [4] * len(states)
    steps = [
        (normal(n, 3, seed=i), state)
        for i, (n, state) in enumerate(zip(sizes, states, strict=True))
    ]
    expected = [rows_of(model, step, 0)[1].flatten(0, 1) for step in steps]
    optimizer, wrong = natgrad.ExactNGD(model, "gaussian", fisher="exact", lr=0.0, kl_clip=None), []
    for number, (step, rows, n) in enumerate(zip(steps, expected, sizes, strict=True)):
        optimizer.zero_grad()
        z = model(*step)
        (0.5 * (z - normal(n, 2, seed=9)).square().sum() / n).backward()
        optimizer.step()
        found = optimizer.preconditioner.curvature.matrix().to_dense()
        try:
            dense.assert_same(found, rows.T @ rows / n, 1e-10)
        except AssertionError:
            wrong.append(number)
    return wrong


@pytest.mark.filterwarnings("ignore:natgrad")
@pytest.mark.parametrize("name", PROGRAMS)
def test_rows_are_those_of_every_step(name: str):
    assert wrong_steps(*PROGRAMS[name]) == []


def moved_by_an_index(m: Any, x: Tensor, state: int) -> Tensor:
    index = torch.arange(4).roll(state)
    return m.head(torch.tanh(m.layer(x))[index])


def mixed_by_a_factor(m: Any, x: Tensor, state: int) -> Tensor:
    h = torch.tanh(m.layer(x))
    return m.head(h + 0.3 * state * h.roll(1, 0))


def statistics_by_a_flag(m: Any, x: Tensor, state: int) -> Tensor:
    h = m.layer(x)
    return m.head(torch.tanh(torch.where(torch.tensor(state > 0), h - h.mean(0), h)))


def weights_by_a_factor(m: Any, x: Tensor, state: int) -> Tensor:
    return m.head(torch.tanh(m.layer(x)) + state * m.layer.weight.square().sum(1))


@pytest.mark.filterwarnings("ignore:natgrad")
@pytest.mark.parametrize("function", [moved_by_an_index, mixed_by_a_factor, statistics_by_a_flag])
def test_samples_that_are_moved_by_values_are_seen_at_powers_of_two(function: Program):
    assert wrong_steps(function, [0] * 5 + [1] * 9) == [5, 6, 7]


def rolled(m: Any, x: Tensor, state: int) -> Tensor:
    h = torch.tanh(m.layer(x))
    return m.head(h + 0.3 * h.roll(1, 0))


def rolled_by_two(m: Any, x: Tensor, state: int) -> Tensor:
    """Which leaves two samples in their order, but not more."""
    return m.head(torch.tanh(m.layer(x)).roll(2, 0))


@pytest.mark.filterwarnings("ignore:natgrad")
@pytest.mark.parametrize(
    ("function", "samples"), [(rolled, [1] * 5 + [4]), (rolled_by_two, [2] * 5 + [1, 5, 4])]
)
def test_more_samples_than_before_are_looked_at(function: Program, samples: list[int]):
    assert wrong_steps(function, [0] * len(samples), samples) == []


def mixed_up_in_the_last_of_many_graphs(m: Any, x: Tensor, state: int) -> Tensor:
    h = torch.tanh(m.layer(x))
    for _ in range(state):
        h = torch.sin(h)
    return m.head(h + 0.3 * h.roll(1, 0) if state == 10 else h)


@pytest.mark.filterwarnings("ignore:natgrad")
def test_graphs_that_come_after_many_are_looked_at_if_they_are_rare():
    states = [*range(10), *range(9), 10, 10]
    assert wrong_steps(mixed_up_in_the_last_of_many_graphs, states) == []


@pytest.mark.filterwarnings("ignore:natgrad")
def test_weights_that_are_used_by_values_are_seen_at_every_third_of_them():
    assert wrong_steps(weights_by_a_factor, [0] * 3 + [1] * 4) == [3]
    assert wrong_steps(weights_by_a_factor, [0] * 30 + [1] * 6) == [30, 31]


def test_graphs_differ_in_operations_and_ways_but_not_in_sizes():
    layer = nn.Linear(3, 3)

    def of(function: Callable[[Tensor], Tensor], samples: int = 4) -> int:
        return graph_hash(function(torch.ones(samples, 3)))

    assert of(layer) == of(layer, 5)
    assert of(layer) != of(lambda x: layer(x).tanh())
    once, twice = (lambda x: layer(x).tanh() + layer(x)), (lambda x: (y := layer(x)).tanh() + y)
    assert of(once) != of(twice)
    assert of(once) == of(once, 2)


def test_ever_fewer_of_many_unlike_graphs_are_looked_at():
    def grown(m: Any, x: Tensor, number: int) -> Tensor:
        h = m.layer(x)
        for _ in range(number):
            h = torch.tanh(h)
        return h

    torch.manual_seed(0)
    model = Calls(grown, layer=nn.Linear(3, 2))
    optimizer = natgrad.ExactNGD(model, "gaussian", fisher="exact", lr=0.0)
    sources, checks = optimizer.preconditioner.capture.sources, []
    for number in range(40):
        optimizer.zero_grad()
        model(torch.ones(4, 3), number).square().sum().backward()
        optimizer.step()
        checks.append(sources.checks)
    assert checks == sorted(checks) and checks[7] == 8
    assert checks[-1] == 10  # The 16th and the 32nd besides.
