"""The examples of physics-informed networks: their equations, their losses, and that they run."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from natgrad.residuals import ResidualNetwork
from tests import dense
from tests.scripts import run_script

for package in ("matplotlib", "rich"):
    pytest.importorskip(package)

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def examples() -> Iterator[dict[str, ModuleType]]:
    sys.path.insert(0, str(EXAMPLES))  # As for a script, whose folder comes first.
    names = ("pinn_training", "poisson_pinn", "burgers_pinn")
    yield {name.split("_")[0]: importlib.import_module(name) for name in names}
    sys.path.remove(str(EXAMPLES))


def problem_of(examples: dict[str, ModuleType], name: str):
    if name == "poisson":
        return examples["poisson"].Poisson(7, 4, 10.0, seed=0)
    return examples["burgers"].Burgers(8, 4, 10.0, seed=0)


def residual_of(examples: dict[str, ModuleType], name: str, points: Tensor) -> Tensor:
    """Return the residual of the equation for the known solution, by autograd."""
    points = points.clone().requires_grad_(True)
    module = examples[name]
    u = module.solution(points) if name == "poisson" else module.reference(points)
    (first,) = torch.autograd.grad(u.sum(), points, create_graph=True)
    second = [
        torch.autograd.grad(first[:, i].sum(), points, retain_graph=True)[0][:, i] for i in range(2)
    ]
    if name == "poisson":
        return (-second[0] - second[1] - module.source(points)[:, 0]).detach()
    return (first[:, 1] + u[:, 0] * first[:, 0] - module.VISCOSITY * second[0]).detach()


def test_known_solutions_solve_their_equations(examples):
    points = torch.rand(40, 2, dtype=torch.float64)
    assert float(residual_of(examples, "poisson", points).abs().max()) < 1e-10
    points = torch.stack([0.3 * torch.randn(60).double().clamp(-3, 3),
                          0.05 + 0.95 * torch.rand(60).double()], 1)  # fmt: skip
    # Terms are of the order of 150² at the front.
    assert float(residual_of(examples, "burgers", points).abs().max()) < 1e-7


def test_reference_of_burgers_is_accurate_and_meets_its_conditions(examples):
    module = examples["burgers"]
    points = torch.rand(300, 2, dtype=torch.float64) * torch.tensor([2.0, 1.0]) - torch.tensor(
        [1.0, 0.0]
    )
    points[:100, 0] *= 0.02
    found = module.reference(points)
    assert float((found - module.reference(points, nodes=9001)).abs().max()) < 1e-10
    mirrored = module.reference(points * torch.tensor([-1.0, 1.0]))
    assert float((found + mirrored).abs().max()) < 1e-12
    along = torch.linspace(-1, 1, 21).double().unsqueeze(1)
    begin = module.reference(torch.cat([along, torch.zeros_like(along)], 1))
    assert float((begin - module.start(along)).abs().max()) < 1e-12
    ends = torch.tensor([[-1.0, 0.3], [1.0, 0.9], [0.0, 0.5]], dtype=torch.float64)
    assert float(module.reference(ends).abs().max()) < 1e-12


@pytest.mark.parametrize("name", ["poisson", "burgers"])
def test_both_ways_to_write_the_loss_agree(examples, name):
    problem = problem_of(examples, name)
    network = examples["pinn"].perceptron(5, 2, seed=0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model = ResidualNetwork(problem.taylor(network), problem.residuals)
    gradients = []
    for loss in (problem.loss(network), model.loss()):
        network.zero_grad()
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    dense.assert_same(problem.loss(network).detach(), model.loss().detach(), 1e-12)
    dense.assert_same(gradients[0], gradients[1], 1e-10)


@pytest.mark.parametrize("name", ["poisson", "burgers"])
def test_points_lie_where_they_should(examples, name):
    problem = problem_of(examples, name)
    low, high = problem.grid.amin(0), problem.grid.amax(0)
    (inside, *edges) = problem.residuals.values()
    assert bool(((inside.points >= low - 0.02) & (inside.points <= high + 0.02)).all())
    for edge in edges:
        sides = [edge.points == bound for bound in ([0.0, 1.0] if name == "poisson" else [])]
        sides += [edge.points[:, :1].abs() == 1, edge.points[:, 1:] == 0]
        assert bool(torch.cat(sides, 1).any(1).all())
    network = examples["pinn"].perceptron(5, 2, seed=0)
    expected = (network(problem.grid) - problem.truth).norm() / problem.truth.norm()
    assert problem.error(network) == pytest.approx(float(expected.detach()))


@pytest.mark.parametrize(
    ("script", "sizes"),
    [("poisson_pinn", "--interior 40 --boundary 12"), ("burgers_pinn", "--inside 40 --edge 8")],
)
def test_scripts_run_and_every_loss_falls(tmp_path, examples, script, sizes):
    settings = f"--fast --width 8 --depth 1 --steps 6 --seconds 20 --adam-lr 0.01 {sizes}"
    done = run_script(EXAMPLES / f"{script}.py", *settings.split(), "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    runs = json.loads((tmp_path / "pinn.json").read_text())
    assert [run["name"] for run in runs] == list(examples["pinn"].OPTIMIZERS)
    for run in runs:
        assert run["losses"][-1] < run["losses"][0], run["name"]
        assert run["steps"][-1] <= 6
    assert (tmp_path / "pinn.png").stat().st_size > 10_000


def test_seeds_and_searches_are_summarised(tmp_path, examples, capsys):
    settings = "--fast --interior 20 --boundary 8 --width 4 --depth 1 --steps 3 --seeds 2 --search"
    examples["poisson"].main(
        [*settings.split(), "--optimizer", "adam", "exact", "--output", str(tmp_path)]
    )
    runs = json.loads((tmp_path / "pinn.json").read_text())
    assert [(run["name"], run["seed"]) for run in runs] == [
        ("adam", 0), ("exact", 0), ("adam", 1), ("exact", 1),
    ]  # fmt: skip
    assert runs[0]["lr"] in examples["pinn"].ADAM_RATES
    printed = capsys.readouterr().out
    assert "Adam's error is" in printed and "–" in printed
