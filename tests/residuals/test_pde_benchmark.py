"""The benchmark of equations: its solutions solve them, its references are accurate, it runs."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from natgrad.residuals import Taylor
from tests.scripts import run_script

pytest.importorskip("scipy")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def problems() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))  # As for a script, whose folder comes first.
    yield importlib.import_module("pde_problems")
    sys.path.remove(str(BENCHMARKS))


def taylor(function, x: Tensor, summed: tuple[int, ...]) -> Taylor:
    """Return what a TaylorNetwork would of a function of points ``(N, D)``."""

    def at(point: Tensor) -> Tensor:
        return function(point.unsqueeze(0))[0]

    hessian = torch.func.hessian(at)(x)
    laplacian = sum(hessian[:, i, i] for i in summed)
    return Taylor(at(x), torch.func.jacrev(at)(x).T, torch.zeros(0), laplacian)


@pytest.mark.parametrize("name", ["poisson_5d", "poisson_10d", "poisson_100d"])
def test_solutions_of_poisson_solve_it(problems, name):
    problem = problems.PROBLEMS[name]
    equation, boundary = problem.sample(3).values()
    solutions = {
        "poisson_5d": lambda x: (math.pi * x).cos().sum(1, keepdim=True),
        "poisson_10d": lambda x: (x[:, ::2] * x[:, 1::2]).sum(1, keepdim=True),
        "poisson_100d": lambda x: x.square().sum(1, keepdim=True),
    }
    x, f = equation.points[0], equation.data[0]
    u = taylor(solutions[name], x, tuple(range(len(x))))
    assert float(equation.function(u, x, f).abs().max()) < 1e-11 * len(x)
    sides = (boundary.points == 0) | (boundary.points == 1)
    assert bool(sides.any(1).all())
    torch.testing.assert_close(boundary.data, solutions[name](boundary.points))
    torch.testing.assert_close(problem.truth()[1], solutions[name](problem.truth()[0]))


def test_other_known_solutions_solve_their_equations(problems):
    cases = [
        (problems.kovasznay, problems.stationary_flow, None, (0, 1), 2),
        (problems.heat_solution, problems.heat, None, (1, 2, 3, 4), 5),
        (
            lambda x: torch.cat([problems.potential(x), problems.conductivity(x)], 1),
            problems.conduction, problems.inverse_source, (0, 1), 2,
        ),
    ]  # fmt: skip
    for solution, residual, source, summed, dimension in cases:
        for x in problems.uniform(5, dimension, 0):
            data = () if source is None else (source(x.unsqueeze(0))[0],)
            assert float(residual(taylor(solution, x, summed), x, *data).abs().max()) < 1e-13


@pytest.mark.parametrize("viscosity", [0.01 / math.pi, 0.01])
def test_reference_of_burgers_has_converged_and_solves_it(problems, viscosity):
    points = problems.uniform(60, 2, 0)
    points[:, 0] = 0.3 * (points[:, 0] - 0.5)
    found = problems.burgers(points, viscosity)
    assert float((found - problems.burgers(points, viscosity, 5001)).abs().max()) < 1e-12
    for x in points[:10]:
        x[1] += 0.05
        u = taylor(lambda p: problems.burgers(p, viscosity), x, (0,))
        value = u.first[1] + u.value * u.first[0] - viscosity * u.laplacian
        assert float(value.abs().max()) < 1e-8 * max(1.0, float(u.first.abs().max()) ** 2)


def test_reference_of_allen_and_cahn_has_converged_and_solves_it(problems):
    points, coarse = problems.allen_cahn(times=101, modes=512, steps=400)
    _, fine = problems.allen_cahn(times=101, modes=1024, steps=600)
    assert float((coarse - fine).norm() / fine.norm()) < 1e-7
    u, x = fine.view(101, 257), points[:257, 0]
    start = x.square() * torch.cos(math.pi * x)
    torch.testing.assert_close(u[0], start, rtol=0, atol=1e-15)
    # Means over [0, 1] of u_t and of u u_t, by differences of fourth order in time.
    weights = torch.full((257,), 1 / 256).double()
    weights[[0, -1]] /= 2
    mirrored = torch.fft.rfft(torch.cat([u, u[:, 1:-1].flip(1)], 1))
    slopes = torch.fft.irfft(1j * math.pi * torch.arange(257) * mirrored, 512)[:, :257]
    diffused = 1e-4 * slopes.square() @ weights
    for power, right in (
        (1, (5 * u - 5 * u**3) @ weights),
        (2, 2 * ((5 * u**2 - 5 * u**4) @ weights - diffused)),
    ):
        mean = u**power @ weights
        change = (8 * (mean[12:22] - mean[10:20]) - mean[13:23] + mean[9:19]) / 0.12
        torch.testing.assert_close(change, right[11:21], rtol=1e-5, atol=1e-5)
        assert power == 1 or float(diffused[11:21].min()) > 1e-4


def test_layer_of_allen_and_cahn_diffuses_and_takes_the_kink(problems):
    """With it the smooth part solves its own residuals where u solves the equation's."""
    points = problems.uniform(200, 2, 0)
    points[:, 0] = 1 - 0.03 * points[:, 0]
    smooth, whole = (problems.allen_cahn_sample(0, smooth=one) for one in (True, False))
    for x in points:
        c = taylor(problems.layer, x, (0,))
        assert float(c.first[1] - 1e-4 * c.laplacian) == pytest.approx(0, abs=1e-9)
        torch.testing.assert_close(c.first[0], problems.layer_slope(x), rtol=1e-9, atol=1e-12)
        v = taylor(lambda p: (3 * p[:, :1] - p[:, 1:]).sin(), x, (0,))
        u = Taylor(v.value + c.value, v.first + c.first, v.second, v.laplacian + c.laplacian)
        for part in ("equation", "ends"):
            of_v, of_u = (
                one[part].function(d._replace(second=d.laplacian.unsqueeze(0)), x)
                for one, d in ((smooth, v), (whole, u))
            )
            torch.testing.assert_close(of_v, of_u, rtol=0, atol=1e-9)
    ends = problems.column(torch.ones(9).double(), torch.linspace(0.1, 1, 9).double())
    assert bool((problems.layer_slope(ends) == 2).all())
    start = problems.column(torch.linspace(0, 1, 9).double(), torch.zeros(9).double())
    assert float(problems.layer(start).abs().max()) < 1e-100
    points, v = problems.smooth_part()
    torch.testing.assert_close(v + problems.layer(points), problems.allen_cahn()[1])


def test_points_of_allen_and_cahn_divided_by_their_density_are_even(problems):
    draw, even = problems.allen_cahn_draw(0), problems.sobol_points(2, 3)(2**14)
    densities = {
        "equation": problems.layer_density,
        "start": problems.start_density,
        "ends": problems.ends_density,
    }
    for part, density in densities.items():
        drawn = draw[part](2**14)
        points = drawn[0] if isinstance(drawn, tuple) else drawn
        share = 1 / density(points)[:, 0]
        assert float(share.max()) <= 2
        assert float(((points[:, 0] > 0.99) & (points[:, 1] < 1e-3)).double().mean()) > 0.08
        x, t = even.unbind(1)
        x, t = {"equation": (x, t), "start": (x, 0 * t), "ends": (x.round(), t)}[part]
        for power in range(3):
            found, expected = share @ points**power / len(points), torch.stack([x, t], 1) ** power
            torch.testing.assert_close(found, expected.mean(0), rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", ["burgers", "burgers_smooth", "allen_cahn"])
def test_points_that_are_added_lie_where_their_part_is(problems, name):
    problem = problems.PROBLEMS[name]
    parts, draw = problem.sample(0), problem.draw(5)
    assert set(draw) == set(parts)
    low = 0.0 if name == "allen_cahn" else -1.0
    for part, function in draw.items():
        for count in (1, 1001):
            drawn = function(count)
            points, known = drawn if isinstance(drawn, tuple) else (drawn, None)
            assert points.shape == (count, 2) and points.dtype == torch.float64
            assert (known is None) == (parts[part].data is None)
            x, t = points.unbind(1)
            assert bool(((x >= low) & (x <= 1) & (t >= 0) & (t <= 1)).all())
            if part == "start":
                first = x.square() * torch.cos(math.pi * x)
                exact = first if name == "allen_cahn" else problems.burgers(points, 0.01)[:, 0]
                assert not t.any()
                torch.testing.assert_close(known[:, 0], exact, rtol=0, atol=1e-14)
            if part == "ends":
                assert bool(((x == low) | (x == 1)).all()) and len(x.unique()) == min(count, 2)
                assert known is None or not known.any()
        assert len(points.unique(dim=0)) == 1001


def test_the_benchmark_goes_on_where_it_was(tmp_path):
    settings = "--problems kovasznay --methods natgrad,lbfgs,ssbfgs --seconds 0.4"
    outputs = [
        run_script(BENCHMARKS / "pde.py", *settings.split(), "--out", tmp_path / "runs.jsonl")
        for _ in range(2)
    ]
    runs = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [run["method"] for run in runs] == ["natgrad", "lbfgs", "ssbfgs"]
    assert all(run["state"] == "done" and run["loss"] < run["curve"][0][2] for run in runs)
    assert "ssbfgs" in outputs[1].stdout and "seed 0" not in outputs[1].stdout
