"""Residual losses: rows of both routes, steps of every solver, networks that know derivatives."""

from __future__ import annotations

import copy
import functools
import math
import re
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import natgrad
from natgrad import ResidualNGD
from natgrad.curvature import BlockDiagonal, Full
from natgrad.residuals import (
    Residual,
    ResidualNetwork,
    Sine,
    TaylorNetwork,
    register_activation,
)
from natgrad.residuals.rows import CapturedRows, FunctionRows
from natgrad.solvers import ConjugateGradient, TruncatedEigh
from tests import dense
from tests.methods import make_optimizer

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "identity": nn.Identity,
    "tanh": nn.Tanh,
    "sine": lambda: Sine(1.7),
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "softplus": lambda: nn.Softplus(beta=1.3, threshold=2.0),
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
}


def perceptron(
    widths: list[int], activation: str = "tanh", bias: bool = True, seed: int = 0
) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for index, (before, after) in enumerate(zip(widths, widths[1:], strict=False)):
        layers.append(nn.Linear(before, after, bias=bias))
        if index < len(widths) - 2:
            layers.append(ACTIVATIONS[activation]())
    return nn.Sequential(*layers).double()


def points(count: int, dimension: int = 2, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dimension, generator=generator, dtype=torch.float64)


# A problem with two kinds of points, as functions of a network and as functions of its Taylor
# expansion: (equation with two residuals per point, data with one).


def equation(u, x, f):
    jacobian = torch.func.jacrev(u)(x)[0]
    hessian = torch.func.hessian(u)(x)[0]
    return torch.stack([hessian.trace() - u(x)[0] ** 3 - f[0], jacobian[0] * jacobian[1]])


def equation_of_stack(u, x, f):
    return torch.cat([u.laplacian - u.value**3 - f, u.first[0] * u.first[1]])


def data(u, x):
    return u(x) - x.sum()


def data_of_stack(u, x):
    return u.value - x.sum()


def parts(taylor: bool, weight: float = 3.0, count: int = 7) -> dict[str, Residual]:
    inside, edge = points(count), points(4, seed=2)
    known = torch.sin(inside[:, :1])
    return {
        "equation": Residual(equation_of_stack if taylor else equation, inside, known),
        "data": Residual(data_of_stack if taylor else data, edge, weight=weight),
    }


def reference(
    network: nn.Module, residuals: dict[str, Residual]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return scaled rows and residuals, part by part and point by point, by plain jacrev."""
    parameters = {n: p.detach() for n, p in network.named_parameters() if p.requires_grad}
    rows, values = [], []
    for residual in residuals.values():
        scale = math.sqrt(residual.weight / len(residual))
        for index, point in enumerate(residual.points):
            known = () if residual.data is None else (residual.data[index],)

            def at(p, residual=residual, point=point, known=known):
                def u(x):
                    return torch.func.functional_call(network, p, (x,), tie_weights=False)

                return residual.function(u, point, *known).reshape(-1)

            jacobian = torch.func.jacrev(at)(parameters)
            rows.append(scale * torch.cat([j.flatten(1) for j in jacobian.values()], 1))
            values.append(scale * at(parameters))
    return rows, values


def dense_problem(network: nn.Module, count: int = 7) -> tuple[Tensor, Tensor]:
    """Return J ``(R, P)`` and ρ ``(R,)``, which many tests ask for of the same network."""
    held = tuple((n, p.requires_grad, *p.flatten().tolist()) for n, p in network.named_parameters())
    key = (str(network), held, count)
    if key not in PROBLEMS:
        rows, values = reference(network, parts(False, count=count))
        PROBLEMS[key] = torch.cat(rows), torch.cat(values)
    return PROBLEMS[key]


PROBLEMS: dict[Any, tuple[Tensor, Tensor]] = {}


def flat(network: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters() if p.requires_grad])


def optimizer_for(network: nn.Module, route: str, count: int = 7, **options) -> ResidualNGD:
    """Return an optimizer of straight steps, by one of the two routes."""
    options = {"damping": 1e-2, "acceleration": False, **options}
    if route == "captured":
        options = {"residuals": parts(True, count=count), **options}
        return ResidualNGD(TaylorNetwork(network, laplacian=True), **options)
    return ResidualNGD(network, parts(False, count=count), jacobians="vmap", **options)


# Networks that know their derivatives.


@given(
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    dimension=st.integers(1, 4),
    hidden=st.lists(st.integers(1, 5), min_size=0, max_size=3),
    outputs=st.integers(1, 3),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_taylor_network_agrees_with_torch_func(activation, dimension, hidden, outputs, bias, seed):
    network = perceptron([dimension, *hidden, outputs], activation, bias, seed)
    x = points(3, dimension, seed)
    pairs = [(i, j) for i in range(dimension) for j in range(i, dimension)]
    u = TaylorNetwork(network, second=pairs, laplacian=True).derivatives(x)
    hessians = torch.func.vmap(torch.func.hessian(network))(x)
    torch.testing.assert_close(u.value, network(x), rtol=0, atol=1e-12)
    first = torch.func.vmap(torch.func.jacrev(network))(x).mT
    torch.testing.assert_close(u.first, first, rtol=0, atol=1e-11)
    for index, (i, j) in enumerate(pairs):
        torch.testing.assert_close(u.second[:, index], hessians[..., i, j], rtol=0, atol=1e-10)
    laplacian = hessians.diagonal(dim1=2, dim2=3).sum(2)
    torch.testing.assert_close(u.laplacian, laplacian, rtol=0, atol=1e-10)


def test_taylor_network_of_chosen_coordinates():
    network = perceptron([3, 4, 2])
    x = points(5, 3)
    model = TaylorNetwork(network, first=[2, 0], second=[(0, 2)], laplacian=[2])
    u = model.derivatives(x)
    assert model(x).shape == (5, 5, 2)
    hessians = torch.func.vmap(torch.func.hessian(network))(x)
    dense.assert_same(u.first, torch.func.vmap(torch.func.jacrev(network))(x).mT[:, [2, 0]], 1e-12)
    dense.assert_same(u.second[:, 0], hessians[..., 0, 2], 1e-12)
    dense.assert_same(u.laplacian, hessians[..., 2, 2], 1e-12)
    plain = TaylorNetwork(network, first=[1]).derivatives(x)
    assert plain.second.shape == (5, 0, 2) and plain.laplacian.shape[1] == 0


@pytest.mark.parametrize("widths", [[3, 2], [3, 4, 2], [3, 4, 5, 2]])
@pytest.mark.parametrize(
    "asked", [{}, {"laplacian": True}, {"first": [2, 0], "second": [(0, 2)], "laplacian": [2]}]
)
def test_what_is_asked_for_at_a_point_is_what_the_stack_holds(widths, asked):
    network, x = perceptron(widths, "gelu"), points(5, 3)
    model = TaylorNetwork(network, **asked)
    expected = model.derivatives(x)
    found = torch.func.vmap(lambda point: tuple(model.at(point)))(x)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.reshape(one.shape), rtol=0, atol=1e-13)
    alone = torch.func.vmap(lambda point: model.at(point).second)(x)
    torch.testing.assert_close(alone, expected.second, rtol=0, atol=1e-13)


def test_derivatives_that_no_residual_asks_for_are_not_computed(monkeypatch):
    """Of a hundred first derivatives the values need none, the Laplacian none behind tanh."""
    sizes = []

    def linear(rows, *others):
        sizes.append(rows.shape)
        return plain(rows, *others)

    plain = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", linear)
    model = TaylorNetwork(perceptron([100, 6, 1]), laplacian=True)
    u = model.at(points(1, 100)[0])
    assert u.value.shape == (1,) and sizes == [(100,), (6,)]
    assert u.laplacian.shape == (1,) and sizes[2:] == [(1, 100), (100, 100), (1, 6)]
    assert u.first.shape == (100, 1) and sizes[5:] == [(100, 6)]
    assert len(u) == 4 and all(u[i] is field for i, field in enumerate(u)) and u[-1] is u.laplacian


def test_many_derivatives_are_had_entry_by_entry():
    """Both ways are the same training; only the structures of exact rows take entries."""
    inside, edge = points(6, 40), points(5, 40, seed=2)
    steps = []
    for route in (None, "captured", "vmap"):
        network = perceptron([40, 3, 1])
        model = TaylorNetwork(network, laplacian=True)
        residuals = {
            "equation": Residual(lambda u, x: u.laplacian - u.value**3 - 1, inside),
            "data": Residual(data_of_stack, edge, weight=3.0),
        }
        optimizer = ResidualNGD(model, residuals, jacobians=route)
        before = flat(network)
        for _ in range(3):
            optimizer.step()
        steps.append((before - flat(network), type(optimizer.rows)))
    assert [kind for _, kind in steps] == [FunctionRows, CapturedRows, FunctionRows]
    assert torch.equal(steps[0][0], steps[2][0])
    dense.assert_same(steps[0][0], steps[1][0], 1e-9)
    kfac = ResidualNGD(model, residuals, structure="kfac")
    assert isinstance(kfac.rows, CapturedRows)
    few = TaylorNetwork(perceptron([2, 5, 4, 1]), laplacian=True)
    assert isinstance(ResidualNGD(few, parts(True)).rows, CapturedRows)


def test_nested_networks_and_repeated_layers():
    torch.manual_seed(0)
    shared, tanh = nn.Linear(3, 3), nn.Tanh()
    network = nn.Sequential(
        nn.Sequential(nn.Linear(2, 3), tanh), shared, tanh, shared, nn.Linear(3, 1)
    ).double()
    model = TaylorNetwork(network, laplacian=True)
    x = points(4)
    hessians = torch.func.vmap(torch.func.hessian(network))(x)
    expected = hessians.diagonal(dim1=2, dim2=3).sum(2)
    dense.assert_same(model.derivatives(x).laplacian, expected, 1e-12)
    assert len(list(model.parameters())) == len(list(network.parameters()))
    found = torch.func.vmap(lambda point: model.at(point).laplacian)(x)
    dense.assert_same(found, expected, 1e-12)


def test_taylor_network_shares_parameters_and_survives_copies():
    network = perceptron([2, 3, 1])
    model = TaylorNetwork(network)
    with torch.no_grad():
        network[0].bias.add_(1.0)
    dense.assert_same(model.derivatives(points(3)).value, network(points(3)), 1e-14)
    other, other_network = copy.deepcopy((model, network))
    with torch.no_grad():
        other_network[2].weight.add_(1.0)
    dense.assert_same(other.derivatives(points(3)).value, other_network(points(3)), 1e-14)
    assert [p.shape for p in model.parameters()] == [p.shape for p in network.parameters()]


def test_taylor_network_refuses_what_it_cannot_differentiate():
    with pytest.raises(TypeError, match="got ReLU: describe it with"):
        TaylorNetwork(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)))
    with pytest.raises(TypeError, match="nn.Sequential"):
        TaylorNetwork(nn.Linear(2, 1))
    with pytest.raises(TypeError, match="at least one Linear"):
        TaylorNetwork(nn.Sequential(nn.Tanh()))
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(2, 1))
    with pytest.raises(TypeError, match="remove the parametrization"):
        TaylorNetwork(nn.Sequential(normed))
    network = perceptron([2, 1])
    with pytest.raises(ValueError, match="coordinates from 0 to 1"):
        TaylorNetwork(network, first=[2])
    with pytest.raises(ValueError, match=r"add \[1\] to first"):
        TaylorNetwork(network, first=[0], second=[(0, 1)])
    with pytest.raises(ValueError, match=r"points must have shape \(N, 2\)"):
        TaylorNetwork(network)(points(3, 3))


def test_activation_of_ones_own():
    class Cube(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return z**3

    register_activation(Cube, lambda module, z: (z**3, 3 * z**2, 6 * z))
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 3), Cube(), nn.Linear(3, 1)).double()
    x = points(4)
    expected = torch.func.vmap(torch.func.hessian(network))(x)[..., 0, 1]
    u = TaylorNetwork(network, second=[(0, 1)]).derivatives(x)
    dense.assert_same(u.second[:, 0], expected, 1e-12)
    with pytest.raises(TypeError, match="subclass of torch.nn.Module"):
        register_activation(torch.tanh, lambda module, z: (z, z, z))


# Rows.


@pytest.mark.parametrize("chunk_size", [None, 1, 3])
@pytest.mark.parametrize("route", ["vmap", "captured", "vmap of a TaylorNetwork"])
def test_rows_and_residuals_are_those_of_plain_jacrev(route, chunk_size):
    network = perceptron([2, 5, 4, 1])
    if route == "vmap":
        rows = FunctionRows(network, parts(False), chunk_size)
    else:
        model = TaylorNetwork(network, laplacian=True)
        kind = CapturedRows if route == "captured" else FunctionRows
        rows = kind(model, parts(True), chunk_size)
    expected_rows, expected_values = dense_problem(network)
    (share, values, found), *rest = rows.chunks()
    assert share == 1.0 and not rest  # 18 rows are fewer than the parameters.
    matrix = found.to_dense()
    if route == "captured":  # One row per point and place, zero where a part has no residual.
        matrix = matrix[values.reshape(-1) != 0]
        values = values[values != 0]
    dense.assert_same(matrix, expected_rows, 1e-10)
    dense.assert_same(values.reshape(-1), expected_values, 1e-12)
    dense.assert_same(rows.loss(), 0.5 * expected_values.square().sum(), 1e-12)


@pytest.mark.parametrize("route", ["vmap", "captured"])
def test_more_rows_than_parameters_come_in_chunks(route):
    network = perceptron([2, 2, 1])
    optimizer = optimizer_for(network, route, count=40, chunk_size=7)
    shares = [share for share, *_ in optimizer.rows.chunks()]
    assert len(shares) == 7  # Six of the equation, one of the data.
    assert sum(shares) == pytest.approx(1.0)
    jacobian, rho = dense_problem(network, count=40)
    before = flat(network)
    loss = optimizer.step()
    step = expected_step(jacobian, rho, [9], optimizer.last.damping, None)
    expected = before - optimizer.last.length * step
    dense.assert_same(flat(network), expected, 1e-9)
    assert loss == pytest.approx(float(0.5 * rho @ rho), rel=1e-12)


@pytest.mark.parametrize("frozen", ["none", "weight", "bias"])
def test_rows_of_stacks_are_made_of_their_layers(frozen):
    network = perceptron([2, 5, 4, 1])
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(not name.endswith(frozen))
    rows = CapturedRows(TaylorNetwork(network, laplacian=True), parts(True), None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # No pass per sample for want of a formula.
        list(rows.chunks())
    assert not rows.capture.sources.direct


def test_loss_and_gradient_of_the_network_of_residuals():
    network = perceptron([2, 5, 1])
    problem = ResidualNetwork(TaylorNetwork(network, laplacian=True), parts(True))
    jacobian, rho = dense_problem(network)
    loss = problem.loss()
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in network.parameters()])
    dense.assert_same(loss.detach(), 0.5 * rho @ rho, 1e-12)
    dense.assert_same(gradient, jacobian.T @ rho, 1e-10)
    values = problem.values()
    assert {name: tuple(v.shape) for name, v in values.items()} == {
        "equation": (7, 2),
        "data": (4, 1),
    }


@pytest.mark.parametrize("frozen", ["0.weight", "0.bias", "2.bias", "2"])
@pytest.mark.parametrize("route", ["vmap", "captured"])
def test_frozen_parameters_have_no_rows_and_do_not_move(route, frozen):
    network = perceptron([2, 5, 4, 1])
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    kept = {n: p.detach().clone() for n, p in network.named_parameters() if not p.requires_grad}
    optimizer = optimizer_for(network, route)
    jacobian, rho = dense_problem(network)
    before = flat(network)
    optimizer.step()
    step = expected_step(jacobian, rho, [len(before)], optimizer.last.damping, None)
    expected = before - optimizer.last.length * step
    dense.assert_same(flat(network), expected, 1e-8)
    assert kept and all(torch.equal(network.get_parameter(n), v) for n, v in kept.items())


def test_any_module_with_buffers_and_shared_parameters():
    class Unusual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 4)
            self.norm = nn.BatchNorm1d(4)
            self.scale = nn.Parameter(torch.rand(4))
            self.again = self.layer

        def forward(self, x: Tensor) -> Tensor:
            h = torch.sin(self.norm(self.layer(x)) * self.scale)
            return (h * self.again(x)).sum(-1, keepdim=True)

    torch.manual_seed(0)
    network = Unusual().double()
    residuals = {"equation": Residual(equation, points(5), torch.zeros(5, 1).double())}
    with pytest.raises(ValueError, match="batch statistics in 'norm'"):
        ResidualNGD(network, residuals)
    network.eval()
    network.norm.running_mean.normal_()
    optimizer = ResidualNGD(network, residuals, damping=1e-2, acceleration=False)

    class Single(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.unsqueeze(0))[0]

    rows, values = reference(Single(network), residuals)
    jacobian, rho = torch.cat(rows), torch.cat(values)
    before = flat(network)
    optimizer.step()
    damped = jacobian.T @ jacobian + 1e-2 * torch.eye(len(before)).double()
    expected = before - torch.linalg.solve(damped, jacobian.T @ rho)
    dense.assert_same(flat(network), expected, 1e-9)


@pytest.mark.parametrize("chunk", [None, 60_000], ids=["whole", "chunks"])
def test_grams_of_many_rows_multiply_layers_together(chunk, monkeypatch):
    """More rows than a block of the triangle, of layers of either kind of product."""
    if chunk is not None:
        monkeypatch.setattr("natgrad.jacobians.layer.CHUNK_ELEMENTS", chunk)
    network, x = perceptron([5, 12, 30, 1]), points(290, 5)
    residuals = {"part": Residual(lambda u, x: u.laplacian - u.value, x)}
    rows = CapturedRows(TaylorNetwork(network, laplacian=True), residuals, None)
    ((_, _, jacobian),) = rows.chunks()
    assert [block.gram_takes_gradients for block in jacobian.values()] == [True, True, True]
    dense_rows = jacobian.to_dense()
    dense.assert_same(jacobian.gram(), dense_rows @ dense_rows.T, 1e-11)
    first = type(next(iter(jacobian.values())))  # As if positions were cheaper for most of them.
    monkeypatch.setattr(
        first, "gram_takes_gradients", property(lambda block: block.layout.d_out == 1)
    )
    dense.assert_same(jacobian.gram(), dense_rows @ dense_rows.T, 1e-11)


# Steps.


def expected_step(
    jacobian: Tensor, rho: Tensor, sizes: list[int], damping: float, cutoff: float | None
) -> Tensor:
    """Return ``(F̂ + λI)⁻¹∇L`` block by block, on eigenvalues above the cutoff."""
    pieces = []
    for columns in jacobian.split(sizes, 1):
        values, vectors = torch.linalg.eigh(columns.T @ columns)
        kept = values > (0.0 if cutoff is None else cutoff * values[-1])
        if cutoff is None:
            kept = torch.ones_like(kept)
        inverse = torch.where(kept, 1 / (values + damping), 0.0)
        pieces.append(vectors @ (inverse * (vectors.T @ (columns.T @ rho))))
    return torch.cat(pieces)


@pytest.mark.parametrize("count", [7, 24])
@pytest.mark.parametrize("structure", ["full", "block_diagonal"])
@pytest.mark.parametrize(
    "solver", ["direct", TruncatedEigh(1e-4), ConjugateGradient(1e-12, 2000)],
    ids=["direct", "eigh", "cg"],
)  # fmt: skip
@pytest.mark.parametrize("route", ["vmap", "captured"])
def test_one_step_is_the_dense_solution(route, solver, structure, count):
    network = perceptron([2, 5, 4, 1])
    kind = BlockDiagonal if structure == "block_diagonal" else Full
    optimizer = optimizer_for(network, route, count, structure=kind(solver=solver), damping=1e-3)
    jacobian, rho = dense_problem(network, count)
    sizes = [15, 24, 5] if structure == "block_diagonal" else [44]
    before = flat(network)
    optimizer.step()
    cutoff = solver.cutoff if isinstance(solver, TruncatedEigh) else None
    assert optimizer.last.loss_after < optimizer.last.loss
    expected = expected_step(jacobian, rho, sizes, optimizer.last.damping, cutoff)
    dense.assert_same(before - flat(network), optimizer.last.length * expected, 1e-7)


def test_truncation_leaves_small_eigenvalues_out():
    network = perceptron([2, 5, 4, 1])
    jacobian, rho = dense_problem(network)
    before = flat(network)
    optimizer_for(network, "captured", structure=Full(TruncatedEigh(0.5)), damping=1e-14).step()
    values, vectors = torch.linalg.eigh(jacobian.T @ jacobian)
    top = vectors[:, values > 0.5 * values[-1]]
    moved = before - flat(network)
    assert 0 < top.shape[1] < 5
    dense.assert_same(top @ (top.T @ moved), moved, 1e-9)


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "unit_wise", "diagonal",
                                       "block_tridiagonal"])  # fmt: skip
def test_other_structures_lower_the_loss_on_captured_rows(structure):
    network = perceptron([2, 5, 4, 1])
    optimizer = optimizer_for(network, "captured", structure=structure)
    losses = [optimizer.step() for _ in range(4)]
    assert losses[-1] < 0.9 * losses[0]


def test_unit_wise_and_diagonal_steps_are_exact_on_captured_rows():
    network = perceptron([2, 3, 1])
    jacobian, rho = dense_problem(network)
    before, fisher = flat(network), jacobian.T @ jacobian
    optimizer = optimizer_for(network, "captured", structure="diagonal")
    optimizer.step()
    expected = optimizer.last.length * (jacobian.T @ rho)
    expected = expected / (fisher.diagonal() + optimizer.last.damping)
    dense.assert_same(before - flat(network), expected, 1e-9)
    network = perceptron([2, 3, 1])
    optimizer = optimizer_for(network, "captured", structure="unit_wise")
    optimizer.step()
    gradient, expected = jacobian.T @ rho, torch.zeros_like(before)
    units = [[2 * i, 2 * i + 1, 6 + i] for i in range(3)] + [[9, 10, 11, 12]]
    for unit in units:
        block = fisher[unit][:, unit] + optimizer.last.damping * torch.eye(len(unit)).double()
        expected[unit] = torch.linalg.solve(block, gradient[unit])
    dense.assert_same(before - flat(network), optimizer.last.length * expected, 1e-9)


@pytest.mark.parametrize("route", ["vmap", "captured"])
def test_one_step_solves_a_linear_problem(route):
    # A network linear in its parameters, and an equation linear in the network.
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 1)).double()

    def transport(u, x):
        if route == "captured":
            return u.first.sum(0) + u.value - x[0]
        return torch.func.jacrev(u)(x).sum(1) + u(x) - x[0]

    model = TaylorNetwork(network) if route == "captured" else network
    optimizer = ResidualNGD(model, Residual(transport, points(9)), damping=1e-14)
    optimizer.step()
    assert optimizer.loss() < 1e-24


def test_captured_and_vmap_train_alike():
    histories = []
    for route in ("vmap", "captured"):
        network = perceptron([2, 5, 4, 1])
        optimizer = optimizer_for(network, route, momentum=0.5, damping=1.0)
        histories.append([optimizer.step() for _ in range(6)])
    assert histories[0] == pytest.approx(histories[1], rel=1e-6)
    assert histories[0][-1] < 0.2 * histories[0][0]


def test_weights_of_parts_act_as_factors():
    network = perceptron([2, 5, 1])
    light = CapturedRows(TaylorNetwork(network, laplacian=True), parts(True, weight=0.0), None)
    heavy = CapturedRows(TaylorNetwork(network, laplacian=True), parts(True, weight=2.0), None)
    parted = light.values()
    expected = light.loss() + parted["data"].square().sum() / 4
    dense.assert_same(heavy.loss(), expected, 1e-12)


def test_points_can_be_replaced_between_steps():
    network = perceptron([2, 5, 4, 1])
    optimizer = optimizer_for(network, "captured")
    optimizer.step()
    fresh = points(20, seed=9)
    optimizer.residuals["equation"].replace(fresh, torch.sin(fresh[:, :1]))
    before = flat(network)
    residuals = {**parts(False), "equation": Residual(equation, fresh, torch.sin(fresh[:, :1]))}
    rows, values = reference(network, residuals)
    jacobian, rho = torch.cat(rows), torch.cat(values)
    optimizer.step()
    expected = expected_step(jacobian, rho, [44], optimizer.last.damping, None)
    dense.assert_same(before - flat(network), optimizer.last.length * expected, 1e-8)


def square(u, x, f):
    """Quadratic in the parameters of a linear network, so that differences are exact."""
    value = u.value if hasattr(u, "value") else u(x)
    return value**2 - f


def squares(route: str, count: int, distance: float) -> tuple[nn.Module, dict[str, Residual], Any]:
    """Return a network that far from a solution, its residuals, and what makes optimizers."""
    network = perceptron([2, 1])
    with torch.no_grad():
        for p in network.parameters():
            p.add_(1.0)
        x = points(count).abs()
        residuals = {"part": Residual(square, x, network(x) ** 2, weight=3.0)}
        for p in network.parameters():
            p.add_(distance)
    model = TaylorNetwork(network) if route == "captured" else network

    def make(**options) -> ResidualNGD:
        return ResidualNGD(
            model, residuals, jacobians=route, **{"damping": 1e-2, **options},
        )  # fmt: skip

    return network, residuals, make


def bent_step(
    jacobian: Tensor, rho: Tensor, x: Tensor, weight: float, damping: float
) -> tuple[Tensor, Tensor]:
    """Return Δ and Δ' of squares of a linear network, by hand."""
    damped = jacobian.T @ jacobian + damping * torch.eye(3).double()
    step = torch.linalg.solve(damped, jacobian.T @ rho)
    along = x @ step[:2] + step[2]
    second = math.sqrt(weight / len(x)) * 2.0 * along**2
    return step, torch.linalg.solve(damped, jacobian.T @ second)


@pytest.mark.parametrize("route", ["vmap", "captured"])
@pytest.mark.parametrize("count", [2, 9])
@pytest.mark.parametrize("lr", [1.0, 0.5])
def test_bent_steps_are_those_of_geodesic_acceleration(route, count, lr):
    """Two points have fewer rows than parameters, nine more, which come in chunks."""
    network, residuals, make = squares(route, count, 0.3)
    jacobian, rho = (torch.cat(one) for one in reference(network, residuals))
    step, bend = bent_step(jacobian, rho, residuals["part"].points, 3.0, 1e-2)
    assert 0.02 * step.norm() < bend.norm() < 0.75 * step.norm()
    before = flat(network)
    optimizer = make(lr=lr, momentum=0.5, chunk_size=4)
    optimizer.step()
    moved = before - flat(network)
    dense.assert_same(moved, lr * step + 0.5 * lr**2 * bend, 1e-9)
    dense.assert_same(optimizer._previous(), moved, 1e-9)


def test_a_bend_that_is_longer_than_its_step_is_left_out():
    network, residuals, make = squares("captured", 2, -0.999)
    jacobian, rho = (torch.cat(one) for one in reference(network, residuals))
    before, optimizer = flat(network), make()
    optimizer.step()
    x, damping = residuals["part"].points, optimizer.last.damping
    step, bend = bent_step(jacobian, rho, x, 3.0, damping)
    assert bend.norm() > 0.75 * step.norm()
    dense.assert_same(before - flat(network), optimizer.last.length * step, 1e-9)


def test_bends_raise_the_order_of_convergence():
    """Near a solution a Gauss-Newton step squares the distance, a bent one cubes it."""
    orders = []
    for acceleration in (False, True):
        losses = []
        for distance in (0.02, 0.01):
            _, _, make = squares("captured", 9, distance)
            optimizer = make(acceleration=acceleration, damping=1e-14)
            optimizer.step()
            losses.append(optimizer.last.loss_after)
        orders.append(0.5 * math.log2(losses[0] / losses[1]))
    assert orders[0] == pytest.approx(2, abs=0.1) and orders[1] == pytest.approx(3, abs=0.1)


@pytest.mark.parametrize("count", [7, 24])
def test_momentum_minimises_the_damped_model_around_the_last_step(count):
    network = perceptron([2, 5, 4, 1])
    optimizer = optimizer_for(network, "captured", count, momentum=0.8, damping=10.0)
    start = flat(network)
    optimizer.step()
    last = start - flat(network)
    jacobian, rho = dense_problem(network, count=count)
    before = flat(network)
    damping = optimizer.param_groups[0]["damping"]
    damped = jacobian.T @ jacobian + damping * torch.eye(44).double()
    expected = torch.linalg.solve(damped, jacobian.T @ rho + damping * 0.8 * last)
    optimizer.step()
    assert optimizer.last.trials == 1
    dense.assert_same(before - flat(network), expected, 1e-8)


# Damping.


def cubic(u, x, f):
    value = u.value if hasattr(u, "value") else u(x)
    return value**3 + value - f


def straight(loss_at, step, slope, loss):
    """Return d, its length, the loss there, the factor on λ and 0, or None, by halving lengths."""
    for halvings in range(6):
        t = 0.5**halvings
        after = loss_at(-t * step)
        if after <= loss - 1e-4 * t * slope:
            return -t * step, t, after, 0.1 if t >= 0.5 else 10 if t < 0.25 else 1, 0
    return None


def curved(loss_at, beyond, step, slope, promised, loss):
    """Return the same of a whole step that is corrected up to ten times; 0 is how often."""
    half_bend = 100 * beyond(-0.1 * step)
    bends = 2 * half_bend.norm() <= 0.75 * step.norm()
    moved = -step - half_bend if bends else -step
    found, losses = None, [math.inf]
    while True:
        after = loss_at(moved)
        if after >= losses[-1]:
            return found
        if after <= loss - 1e-4 * slope:
            count = len(losses) - 1
            found = moved, 1.0, after, 0.1**0.5 if count <= 4 else 1, count
        elif after > 0.5 * losses[-1]:
            return found
        if not bends or after <= loss - 0.9 * promised or len(losses) == 11:
            return found
        losses.append(after)
        moved = -step - beyond(moved)


def steps_by_the_rule(network, residual, steps, momentum, bends):
    """Yield λ, length, loss after, trials and corrections of every step, by dense algebra.

    It ends where rounding errors would decide: no step may be found there.
    """
    shapes = {name: p.detach() for name, p in network.named_parameters()}
    sizes = [p.numel() for p in shapes.values()]

    def rho_at(vector):
        pieces = zip(shapes.items(), vector.split(sizes), strict=True)
        given = {name: piece.view(p.shape) for (name, p), piece in pieces}

        def u(x):
            return torch.func.functional_call(network, given, (x,))

        values = cubic(u, residual.points, residual.data)
        return math.sqrt(residual.weight / len(residual)) * values[:, 0]

    def loss_at(theta, d):
        return float(0.5 * rho_at(theta + d).square().sum())

    def beyond(theta, rho, jacobian, damped, d):
        rest = rho_at(theta + d) - rho - jacobian @ d
        return torch.linalg.solve(damped, jacobian.T @ rest)

    theta, damping, last, first = flat(network), None, None, None
    for _ in range(steps):
        rho, jacobian = rho_at(theta).detach(), torch.func.jacrev(rho_at)(theta)
        loss, gradient = float(0.5 * rho @ rho), jacobian.T @ rho
        if damping is None:
            damping = 1e-3 * float(gradient @ gradient) / float(rho @ rho)
        pull = torch.zeros_like(theta) if last is None else momentum * last
        trials, found = 0, None
        while found is None:
            trials += 1
            damped = jacobian.T @ jacobian + damping * torch.eye(len(theta)).double()
            step = torch.linalg.solve(damped, gradient + damping * pull)
            if step @ gradient <= 0:
                step = torch.linalg.solve(damped, gradient)

            slope = float(step @ gradient)
            if bends:
                promised = slope - 0.5 * float((jacobian @ step).square().sum())
                rest = functools.partial(beyond, theta, rho, jacobian, damped)
                found = curved(functools.partial(loss_at, theta), rest, step, slope, promised, loss)
            else:
                found = straight(functools.partial(loss_at, theta), step, slope, loss)
            if found is None:
                pull, damping = torch.zeros_like(theta), damping * (10**0.5 if bends else 10)
        moved, length, after, factor, corrections = found
        first = after if first is None else first
        if after < 1e-9 * first or damping < 1e-9:
            return
        yield damping, length, after, trials, corrections
        theta, last = (theta + moved).detach(), -moved.detach()
        damping *= factor


@pytest.mark.parametrize("count", [12, 60])
@pytest.mark.parametrize(("momentum", "bends"), [(0.0, False), (0.0, True), (0.6, True)])
def test_lengths_and_damping_follow_the_rule(count, momentum, bends):
    """Twelve points have fewer rows than parameters, sixty have more."""
    network, x = perceptron([2, 6, 6, 1]), points(count)
    residual = Residual(cubic, x, torch.cos(3 * x[:, :1]) * x[:, 1:] ** 2, weight=2.0)
    with torch.no_grad():
        expected = list(steps_by_the_rule(network, residual, 25, momentum, bends))
    model = TaylorNetwork(network, first=[])
    optimizer = ResidualNGD(model, residual, momentum=momentum, acceleration=bends)
    losses = [after for _, _, after, *_ in expected]
    assert losses[-1] < 0.1 * losses[0]
    for damping, length, after, trials, corrections in expected:
        optimizer.step()
        assert optimizer.last.damping == pytest.approx(damping, rel=1e-9)
        assert optimizer.last.length == length
        assert optimizer.last.loss_after == pytest.approx(after, rel=1e-6)
        assert optimizer.last.trials == trials
        assert optimizer.last.corrections == corrections
    if bends:
        assert len({corrections for *_, corrections in expected}) > 2
    else:
        assert {length for _, length, *_ in expected} > {1.0, 0.5}
    assert max(trials for _, _, _, trials, _ in expected) > 1


@pytest.mark.parametrize("factor", [2.0**40, 2.0**-40, 1e3])
@pytest.mark.parametrize("count", [7, 24])
def test_runs_do_not_depend_on_the_units_of_the_residuals(count, factor):
    """Powers of two change no rounding error, so that runs are the same to the last bit."""
    networks = [perceptron([2, 5, 4, 1]) for _ in range(2)]
    optimizers = []
    for network, scale in zip(networks, (1.0, factor), strict=True):
        residuals = parts(True, count=count)
        for residual in residuals.values():
            residual.weight *= scale**2
        optimizers.append(
            ResidualNGD(TaylorNetwork(network, laplacian=True), residuals, momentum=0.3)
        )
    exact = math.log2(factor).is_integer()
    for _ in range(8 if exact else 5):
        one, other = (optimizer.step() for optimizer in optimizers)
        assert other == pytest.approx(factor**2 * one, rel=0 if exact else 1e-9)
    if exact:
        assert torch.equal(*map(flat, networks))
    assert optimizers[0].last.trials == optimizers[1].last.trials


@pytest.mark.parametrize(("count", "momentum"), [(12, 0.0), (12, 0.9), (60, 0.0), (60, 0.9)])
def test_damping_stays_in_bounds_where_points_change(count, momentum):
    """Points are fewer than the 44 parameters, or more."""
    network = perceptron([2, 5, 4, 1])
    model = TaylorNetwork(network, laplacian=True)
    residuals = parts(True, count=count)
    optimizer = ResidualNGD(model, residuals, momentum=momentum)
    held_out = CapturedRows(model, parts(True, count=200), None)
    before, losses = float(held_out.loss()), []
    for seed in range(40):
        fresh = points(count, seed=100 + seed)
        residuals["equation"].replace(fresh, torch.sin(fresh[:, :1]))
        optimizer.step()
        assert optimizer.last.loss_after < optimizer.last.loss
        assert 1e-4 < optimizer.last.damping < 100
        assert optimizer.last.length == 1.0 or not seed  # Eigenvalues of F go up to 100 and more.
        losses.append(float(held_out.loss()))
    if count > 44:
        assert statistics.median(losses[20:]) < 0.6 * before


# Failures.


@pytest.mark.parametrize("route", ["vmap", "captured"])
def test_residuals_that_are_nan_move_nothing_and_are_named_once(route):
    network = perceptron([2, 5, 4, 1])
    optimizer = optimizer_for(network, route, momentum=0.5)
    optimizer.step()
    before = flat(network)
    good = optimizer.residuals["data"].points
    optimizer.residuals["data"].replace(good * math.nan)
    with pytest.warns(UserWarning, match="residuals of 'data' are not finite"):
        loss = optimizer.step()
    assert not math.isfinite(loss) and torch.equal(flat(network), before)
    assert optimizer.param_groups[0]["damping"] > optimizer.last.damping
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    optimizer.residuals["data"].replace(good)
    assert math.isfinite(optimizer.step()) and not torch.equal(flat(network), before)


def test_steps_that_lead_to_infinite_loss_are_damped_more():
    network = perceptron([1, 1])
    with torch.no_grad():
        network[0].weight.zero_()
        network[0].bias.fill_(-8.0)
    residual = Residual(lambda u, x: torch.exp(u.value) - 2, torch.zeros(1, 1).double())
    optimizer = optimizer_for(network, "captured", residuals=residual, damping=1e-8)
    optimizer.step()
    slope, rho, damping, tried = math.exp(-8), math.exp(-8) - 2, 1e-8, []
    while True:
        step = slope * rho / (slope**2 + damping)
        ends = [-8 - 0.5**k * step for k in range(6)]
        losses = [0.5 * (math.exp(x) - 2) ** 2 if x < 350 else math.inf for x in ends]
        tried += losses
        lower = [k for k, loss in enumerate(losses) if loss < 0.5 * rho**2]
        if lower:
            break
        damping *= 10
    assert math.inf in tried and optimizer.last.damping > 1e-8
    assert optimizer.last.damping == pytest.approx(damping)
    assert optimizer.last.length == 0.5 ** lower[0]
    assert optimizer.last.loss_after == pytest.approx(losses[lower[0]])
    assert float(network[0].bias.detach()) == pytest.approx(ends[lower[0]])


def test_where_no_step_lowers_the_loss_nothing_moves_and_that_is_said():
    network = perceptron([2, 5, 1])
    here = network(points(4)).detach()

    def kink(u, x, y):  # Its derivative promises a decrease that there is nowhere.
        return u.value + 1e3 * (u.value != y)

    optimizer = ResidualNGD(TaylorNetwork(network), Residual(kink, points(4), here))
    before, loss = flat(network), optimizer.loss()
    for count in range(1, 10):
        assert optimizer.step() == loss
        assert optimizer.last.loss_after == loss and optimizer.last.length == 0
        if count == 1:
            assert optimizer.last.trials == 10
            after = 10**0.5 * optimizer.last.damping
            assert optimizer.param_groups[0]["damping"] == pytest.approx(after, rel=1e-14)
    with pytest.warns(UserWarning, match="last 10 steps of ResidualNGD found no decrease"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(20):
            optimizer.step()
    assert torch.equal(flat(network), before) and optimizer.last.trials == 1
    assert optimizer.param_groups[0]["damping"] < 1e25  # More would change no parameter either.


def test_step_that_raises_leaves_nothing_behind(monkeypatch):
    networks = [perceptron([2, 2, 1]) for _ in range(2)]
    optimizer, other = (optimizer_for(n, "captured", 40, chunk_size=7) for n in networks)
    pulled_back = CapturedRows._pulled_back

    def fail(rows: CapturedRows, chosen: list[tuple[str, slice]]) -> Any:
        if chosen[0][0] == "data":
            raise MemoryError("after chunks of the equation")
        return pulled_back(rows, chosen)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(CapturedRows, "_pulled_back", fail)
        optimizer.step()
    assert optimizer.step() == other.step()
    assert torch.equal(flat(networks[0]), flat(networks[1]))


def test_looking_ahead_leaves_nothing_behind_where_it_fails(monkeypatch):
    networks = [perceptron([2, 2, 1]) for _ in range(2)]
    optimizer, other = (optimizer_for(n, "captured", 40, acceleration=True) for n in networks)

    def fail(rows: CapturedRows) -> Any:
        assert not torch.equal(flat(networks[0]), flat(networks[1]))
        raise MemoryError("ahead of the step")

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(CapturedRows, "scaled_values", fail)
        optimizer.step()
    assert torch.equal(flat(networks[0]), flat(networks[1]))
    assert optimizer.step() == other.step()
    assert torch.equal(flat(networks[0]), flat(networks[1]))


def test_residuals_that_are_infinite_ahead_leave_steps_straight(monkeypatch):
    network, residuals, make = squares("captured", 2, 0.3)
    jacobian, rho = (torch.cat(one) for one in reference(network, residuals))
    step, _ = bent_step(jacobian, rho, residuals["part"].points, 3.0, 1e-2)
    before, values, calls = flat(network), CapturedRows.scaled_values, []

    def infinite_at_first(rows: CapturedRows) -> Any:
        calls.append(rows)
        found = list(values(rows))
        return iter(found if len(calls) > 1 else [one + math.inf for one in found])

    monkeypatch.setattr(CapturedRows, "scaled_values", infinite_at_first)
    make().step()
    assert len(calls) == 2
    dense.assert_same(before - flat(network), step, 1e-9)


def test_factorisation_that_fails_leaves_parameters_as_they_are(monkeypatch):
    network = perceptron([2, 5, 4, 1])
    optimizer = optimizer_for(network, "captured")
    optimizer.step()

    def fail(matrix: Tensor, retries: int = 3) -> Tensor:
        raise natgrad.linalg.FactorizationError("no")

    monkeypatch.setattr("natgrad.linalg.cholesky", fail)
    before, damping = flat(network), optimizer.param_groups[0]["damping"]
    optimizer.step()
    assert torch.equal(flat(network), before)
    assert optimizer.param_groups[0]["damping"] == pytest.approx(1e10 * damping)
    monkeypatch.undo()
    loss = optimizer.step()
    assert optimizer.last.loss_after < loss


# State.


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.5},
        {"structure": Full("eigh")},
        {"structure": Full("conjugate_gradient")},
        {"structure": "kfac"},
    ],
)
def test_resumed_run_continues_exactly(options):
    def make(network: nn.Module) -> ResidualNGD:
        return optimizer_for(network, "captured", **options)

    network = perceptron([2, 5, 4, 1])
    optimizer = make(network)
    for _ in range(3):
        optimizer.step()
    other = copy.deepcopy(network)
    resumed = make(other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(3):
        assert optimizer.step() == resumed.step()
    assert torch.equal(flat(network), flat(other))
    with pytest.raises(ValueError, match="was not saved by ResidualNGD"):
        resumed.load_state_dict(torch.optim.SGD(other.parameters()).state_dict())


def test_copy_goes_on_as_the_original():
    network = perceptron([2, 5, 4, 1])
    model = TaylorNetwork(network, laplacian=True)
    optimizer = ResidualNGD(model, parts(True), momentum=0.3)
    optimizer.step()
    other, twin = copy.deepcopy((network, optimizer))
    assert optimizer.step() == twin.step()
    assert torch.equal(flat(network), flat(other))


# Options.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": -1.0}, "damping must be"),
        ({"damping": 0.0}, "damping must be a finite number above 0, or None"),
        ({"chunk_size": 0}, "chunk_size must be an integer of at least 1"),
        ({"momentum": 1.0}, "momentum must be"),
        ({"jacobians": "hooks"}, "jacobians must be"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ResidualNGD(TaylorNetwork(perceptron([2, 3, 1]), laplacian=True), parts(True), **options)


def test_wrong_kinds_of_arguments_are_named():
    network = perceptron([2, 3, 1])
    with pytest.raises(TypeError, match="needs a natgrad.TaylorNetwork, got Sequential"):
        ResidualNGD(network, parts(True), jacobians="captured")
    with pytest.raises(TypeError, match="needs a natgrad.TaylorNetwork, got Sequential"):
        ResidualNetwork(network, parts(True))
    with pytest.raises(TypeError, match="or a dict of them by name, got int"):
        ResidualNGD(network, 3)
    with pytest.raises(TypeError, match="got function for 'data'"):
        ResidualNGD(network, {"data": data})
    with pytest.raises(ValueError, match="residuals is empty"):
        ResidualNGD(network, {})
    with pytest.raises(ValueError, match=r"points must have shape \(N, D\)"):
        Residual(data, torch.zeros(3))
    with pytest.raises(ValueError, match="one entry for each of the 3 points"):
        Residual(data, torch.zeros(3, 2), torch.zeros(2))
    with pytest.raises(ValueError, match="weight must be"):
        Residual(data, torch.zeros(3, 2), weight=-1.0)
    with pytest.raises(TypeError, match="must return a tensor, got float"):
        ResidualNGD(network, Residual(lambda u, x: 1.0, points(3))).step()
    optimizer = ResidualNGD(network, Residual(data, points(3)))
    with pytest.raises(ValueError, match="takes no closure"):
        optimizer.step(lambda: 0.0)
    with pytest.raises(ValueError, match="has no groups"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


def test_float32_is_warned_of():
    network = perceptron([2, 3, 1]).float()
    with pytest.warns(UserWarning, match="use model.double"):
        ResidualNGD(network, Residual(data, points(3).float()))


@pytest.mark.parametrize("route", ["vmap", "captured"])
def test_float32_takes_the_step_to_its_accuracy_and_trains(route):
    network = perceptron([2, 5, 4, 1]).float()
    residuals = parts(route == "captured")
    for residual in residuals.values():
        data = residual.data
        residual.replace(residual.points.float(), None if data is None else data.float())
    model = TaylorNetwork(network, laplacian=True) if route == "captured" else network
    jacobian, rho = dense_problem(perceptron([2, 5, 4, 1]))
    before = flat(network).double()
    with pytest.warns(UserWarning, match="use model.double"):
        optimizer = ResidualNGD(model, residuals, damping=1e-2, acceleration=False)
    optimizer.step()
    expected = expected_step(jacobian, rho, [44], optimizer.last.damping, None)
    moved = before - flat(network).double()
    dense.assert_same(moved, optimizer.last.length * expected, 2e-4)
    first = optimizer.last.loss
    for _ in range(30):
        loss = optimizer.step()
        assert optimizer.last.loss_after <= loss
        if loss < 1e-6 * first:
            break
    assert loss < 1e-6 * first
    assert all(p.dtype == torch.float32 for p in network.parameters())


def test_chunks_bound_what_a_step_allocates():
    """With 501 parameters the matrix is the largest tensor, but for chunks of more points.

    Sizes count in numbers of eight bytes.
    """
    network = perceptron([2, 20, 20, 1])
    model, parameters = TaylorNetwork(network, laplacian=True), len(flat(network))
    residual = Residual(lambda u, x: u.laplacian - u.value, points(1500))

    def largest(chunk_size: int | None) -> int:
        found = 0

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                nonlocal found
                result = function(*args, **(kwargs or {}))
                leaves = torch.utils._pytree.tree_leaves(result)
                sizes = [leaf.nbytes // 8 for leaf in leaves if isinstance(leaf, Tensor)]
                found = max([found, *sizes])
                return result

        optimizer = ResidualNGD(model, residual, chunk_size=chunk_size)
        with Watch():
            optimizer.step()
        return found

    assert largest(50) == parameters**2
    assert largest(None) == 1500 * parameters  # All rows, as they are fewer numbers than 2²⁵.


# Other optimizers on the captured route.


@pytest.mark.parametrize("name", ["ExactNGD", "BlockDiagonalNGD", "EGN"])
def test_exact_optimizers_take_the_same_step(name):
    network = perceptron([2, 5, 4, 1])
    problem = ResidualNetwork(TaylorNetwork(network, laplacian=True), parts(True))
    jacobian, rho = dense_problem(network)
    sizes = [15, 24, 5] if name == "BlockDiagonalNGD" else [44]
    before = flat(network)
    optimizer = make_optimizer(
        getattr(natgrad, name), problem, "gaussian", lr=1.0, damping=1e-2, kl_clip=None, length="lr"
    )
    problem.loss().backward()
    optimizer.step()
    expected = expected_step(jacobian, rho, sizes, 1e-2, None)
    dense.assert_same(before - flat(network), expected, 1e-7)


def test_kfac_on_the_captured_route():
    network = perceptron([2, 8, 8, 1])
    problem = ResidualNetwork(TaylorNetwork(network, laplacian=True), parts(True, count=30))
    optimizer = make_optimizer(
        natgrad.KFAC, problem, "gaussian", fisher="exact", lr=1.0, momentum=0.9, kl_clip=None,
        length="quadratic_model", damping=natgrad.LevenbergMarquardt(initial=1.0, interval=1),
        factors=1, inverses=1,
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = problem.loss()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]


def test_the_guide_runs():
    guide = Path(__file__).parents[2] / "docs" / "pinns.md"
    blocks = re.findall(r"```python\n(.*?)```", guide.read_text(), re.DOTALL)
    # Those of other packages run in tests/ecosystem/.
    blocks = [block for block in blocks if not re.search(r"import deepxde|from pina", block)]
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Five steps of ImplicitSGD need not converge.
        exec("\n".join(blocks), names)
    assert len(blocks) == 12 and math.isfinite(float(names["loss"].detach()))
    assert names["field"].k.item() == pytest.approx(4.0, abs=1e-3)


@pytest.mark.filterwarnings("ignore:.*float32")
@pytest.mark.parametrize("change", ["frozen", "unfrozen", "type"])
@pytest.mark.parametrize("route", ["vmap", "captured"])
def test_a_network_that_changes_later_is_taken_as_it_is(route, change):
    ends = []
    for changed_first in (True, False):
        network = perceptron([2, 5, 1])
        network[0].requires_grad_(change != "unfrozen")
        if change == "type":
            network.float()
        if not changed_first:
            optimizer = optimizer_for(network, route)
        if change == "type":
            network.double()
        else:
            network[0].requires_grad_(change == "unfrozen")
        if changed_first:
            optimizer = optimizer_for(network, route)
        for _ in range(2):
            optimizer.step()
        ends.append(flat(network))
    dense.assert_same(ends[1], ends[0], 1e-10)


@pytest.mark.parametrize("route", ["vmap", "captured"])
def test_coefficients_of_an_equation_may_be_parameters_of_the_network(route):
    class Problem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = perceptron([2, 5, 1])
            self.rate = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    plain = Problem()
    x = points(7)

    def residuals() -> Tensor:
        gradients = [torch.autograd.grad(plain(p[None]).sum(), p, create_graph=True)[0] for p in
                     x.clone().requires_grad_().unbind()]  # fmt: skip
        return (plain.rate * torch.stack(gradients)[:, 0] - 1.0) / 7**0.5

    rho = residuals()
    leaves = [plain.rate, *plain.inner.parameters()]
    rows = [torch.autograd.grad(r, leaves, retain_graph=True, materialize_grads=True) for r in rho]
    jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    model: Any = plain
    if route == "captured":
        model = TaylorNetwork(plain.inner, first=[0])
        model.rate = plain.rate
        residual = Residual(lambda u, x: model.rate * u.first[0, 0] - 1.0, x)
    else:
        residual = Residual(lambda u, x: model.rate * torch.func.jacrev(u)(x)[0, 0] - 1.0, x)
    before = torch.cat([p.detach().flatten() for p in leaves])
    optimizer = ResidualNGD(model, residual, jacobians=route, damping=0.1, acceleration=False)
    optimizer.step()
    matrix = jacobian.T @ jacobian + optimizer.last.damping * torch.eye(len(before)).double()
    step = torch.linalg.solve(matrix, jacobian.T @ rho.detach())
    after = torch.cat([p.detach().flatten() for p in leaves])
    dense.assert_same(before - after, optimizer.last.length * step, 1e-8)


def oscillation(route: str, where: str) -> tuple[nn.Module, nn.Parameter, Residual]:
    """A network, the coefficient of ``u' = k u``, and residuals that read it from somewhere."""
    inner = perceptron([1, 5, 1])
    model: Any = TaylorNetwork(inner, first=[0]) if route == "captured" else inner
    k = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
    owner: Any = model if where in ("model", "variable of the model") else nn.Module()
    owner.k = k

    def function(u: Any, x: Tensor) -> Tensor:
        slope = u.first[0] if route == "captured" else torch.func.jacrev(u)(x)[:, 0]
        value = u.value if route == "captured" else u(x)
        return slope - (k if where == "variable of the model" else owner.k) * value

    return model, k, Residual(function, points(6)[:, :1])


@pytest.mark.parametrize("route", ["vmap", "captured"])
def test_coefficients_that_are_not_the_models_are_told_of_once(route):
    model, k, residual = oscillation(route, "elsewhere")
    optimizer = ResidualNGD(model, residual, jacobians=route)
    with pytest.warns(UserWarning, match=r"'residual' reads a parameter of shape \(\) that is not"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        optimizer.step()
        k.requires_grad_(False)
        residual.function = functools.partial(residual.function)
        optimizer.step()
    assert k.item() == 0.7


def test_coefficients_that_torch_func_does_not_see_are_refused():
    model, _, residual = oscillation("vmap", "variable of the model")
    optimizer = ResidualNGD(model, residual)
    with pytest.raises(ValueError, match="read it from the model inside the function"):
        optimizer.step()


@pytest.mark.parametrize("where", ["model", "variable of the model"])
def test_captured_coefficients_are_trained_wherever_they_are_held(where):
    model, k, residual = oscillation("captured", where)
    x = residual.points.clone().requires_grad_()
    u = model.derivatives(x).value
    slope = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
    loss = ((slope - k * u) ** 2).sum() / (2 * len(x))
    gradient = torch.autograd.grad(loss, k)[0]
    before = k.item()
    optimizer = ResidualNGD(model, residual, damping=1e6, acceleration=False)
    optimizer.step()  # So much damping that the step is one along the gradient.
    moved = (before - k.item()) * optimizer.last.damping
    assert moved == pytest.approx(optimizer.last.length * gradient.item(), rel=1e-3)
