"""The example of a physics-informed network: its derivatives, its rows, and that it runs."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import natgrad
from tests import dense

for package in ("matplotlib", "rich"):
    pytest.importorskip(package)

SCRIPT = Path(__file__).parent.parent / "examples" / "poisson_pinn.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("poisson_pinn", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["poisson_pinn"] = module  # Dataclasses look themselves up.
    spec.loader.exec_module(module)
    return module


def small(example: ModuleType) -> tuple[nn.Module, object]:
    torch.manual_seed(0)
    network = example.LaplaceNetwork([2, 5, 4, 1]).double()
    with torch.no_grad():
        for layer in network.layers:
            layer.weight[:, 0].normal_()  # biases
    return network, example.Problem.sample(7, 4, 10.0, seed=0)


def test_stack_holds_value_gradient_and_laplacian(example):
    network, problem = small(example)

    def plain(point: Tensor) -> Tensor:
        for index, layer in enumerate(network.layers):
            point = layer.weight[:, 1:] @ point + layer.weight[:, 0]
            point = point if index == 2 else torch.tanh(point)
        return point[0]

    points = problem.points
    hessians = torch.func.vmap(torch.func.hessian(plain))(points)
    expected = torch.cat(
        [
            torch.func.vmap(plain)(points).unsqueeze(1),
            torch.func.vmap(torch.func.grad(plain))(points),
            hessians.diagonal(dim1=1, dim2=2).sum(1, keepdim=True),
        ],
        dim=1,
    )
    dense.assert_same(network.propagate(points).squeeze(2), expected, 1e-12)


def test_source_belongs_to_the_solution(example):
    points = torch.rand(9, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def u(point: Tensor) -> Tensor:
        return example.solution(point.unsqueeze(0))[0, 0]

    hessians = torch.func.vmap(torch.func.hessian(u))(points)
    laplacian = hessians.diagonal(dim1=1, dim2=2).sum(1, keepdim=True)
    dense.assert_same(example.source(points), -laplacian, 1e-10)


def test_loss_is_mean_over_interior_plus_weighted_mean_over_boundary(example):
    network, problem = small(example)
    raw = (network(problem.points, problem.boundary, problem.scale) - problem.target).square()
    raw = (raw / problem.scale.square()).detach()
    expected = raw[:7].mean() + 10.0 * raw[7:].mean()
    dense.assert_same(problem.loss(network).detach(), expected, 1e-12)
    assert torch.equal(problem.target[7:] / problem.scale[7:], example.solution(problem.points[7:]))
    edge = problem.points[7:]
    assert ((edge == 0) | (edge == 1)).any(1).all()


@pytest.mark.parametrize("structure", ["full", "block_diagonal"])
def test_rows_are_exact(example, structure):
    network, problem = small(example)
    inputs = (problem.points, problem.boundary, problem.scale)
    parameters = {n: p.detach() for n, p in network.named_parameters()}
    jacobians = torch.func.jacrev(lambda p: torch.func.functional_call(network, p, inputs))(
        parameters
    )
    preconditioner = natgrad.Preconditioner(
        network, structure, nn.MSELoss(), fisher="exact", damping=1e-2
    )
    problem.loss(network).backward()
    gradients = {n: p.grad.clone() for n, p in network.named_parameters()}
    preconditioner.step()
    rows = {n: j.flatten(0, 1).flatten(1) for n, j in jacobians.items()}
    blocks = [[n] for n in rows] if structure == "block_diagonal" else [list(rows)]
    for names in blocks:
        jacobian = torch.cat([rows[n] for n in names], 1)
        fisher = 2 * jacobian.T @ jacobian / len(jacobian)  # MSELoss has no ½.
        gradient = torch.cat([gradients[n].flatten() for n in names])
        found = torch.cat([network.get_parameter(n).grad.flatten() for n in names])
        damped = fisher + 1e-2 * torch.eye(len(fisher)).double()
        dense.assert_same(found, torch.linalg.solve(damped, gradient), 1e-8)


def test_search_takes_the_best_step_of_the_grid(example):
    parameter = nn.Parameter(torch.tensor([1.0]))
    parameter.grad = torch.tensor([5.0])
    assert example.search([parameter], lambda: parameter.square().sum(), 1.0) == 0.25
    assert parameter.item() == -0.25
    parameter.grad = torch.tensor([5.0])  # uphill
    assert example.search([parameter], lambda: parameter.square().sum(), 0.0625) == 0.0
    assert parameter.item() == -0.25


def test_script_runs_and_every_loss_falls(tmp_path, example):
    settings = "--fast --interior 40 --boundary 12 --width 8 --depth 1 --steps 12 --seconds 20"
    subprocess.run(
        [sys.executable, str(SCRIPT), *settings.split(), "--output", str(tmp_path)],
        check=True, timeout=120, capture_output=True,
    )  # fmt: skip
    runs = json.loads((tmp_path / "pinn.json").read_text())
    assert [run["name"] for run in runs] == list(example.OPTIMIZERS)
    for run in runs:
        assert run["losses"][-1] < run["losses"][0], run["name"]
        assert run["steps"][-1] <= 12
    assert (tmp_path / "pinn.png").stat().st_size > 10_000
