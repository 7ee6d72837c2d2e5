"""Residual losses of whose points several processes have a share each."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import natgrad
from natgrad.curvature import EigenKronecker, Full
from natgrad.residuals import AdaptivePoints, Residual, TaylorNetwork
from natgrad.solvers import ConjugateGradient
from tests import processes
from tests.distributed.counting import Held
from tests.distributed.networks import weights

WORLDS = (2, 4)


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1)]
        return nn.Sequential(*layers).double()


def points(count: int, seed: int) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(count, 2, generator=source, dtype=torch.float64) - 1


def equation(u, x, f):
    """Two residuals at a point."""
    return torch.cat([u.laplacian - u.value**3 - f, u.first[0] * u.first[1] - f])


def edge(u, x):
    return u.value - x.sum()


def equation_by_functions(u, x, f):
    first, second = torch.func.jacrev(u)(x)[0], torch.func.hessian(u)(x)[0]
    return torch.cat([second.trace() - u(x) ** 3 - f, first[:1] * first[1:] - f])


def edge_by_functions(u, x):
    return u(x) - x.sum()


@dataclass(frozen=True)
class Run:
    """A training.

    Attributes:
        options: Of the optimizer.
        shares: Points of the equation and of the edge in each of four processes; where there are
            two, the first has those of the first two.
        functions: Whether derivatives are those of ``torch.func``.
        steps: How many.
        new_points: Whether the latter half of the processes has others in each step.
        wrapped: Whether DistributedDataParallel tells of the processes.
    """

    options: dict[str, Any] = field(default_factory=dict)
    shares: tuple[tuple[int, int], ...] = ((5, 2), (3, 3), (8, 1), (2, 2))
    functions: bool = False
    steps: int = 3
    new_points: bool = False
    wrapped: bool = False

    def model(self) -> Any:
        plain = network()
        return plain if self.functions else TaylorNetwork(plain, laplacian=True)

    def residuals(self, world: int, rank: int | None, step: int = 0) -> dict[str, Residual]:
        """Return the parts with the points of a process, or of all."""
        inside, outside = (sum(one) for one in zip(*self.shares, strict=True))
        x, y = points(inside, 10), points(outside, 11)
        staying = [sum(of[:2]) for of in zip(*self.shares, strict=True)]
        x[staying[0] :] = points(inside, 12 + 2 * step)[staying[0] :]
        y[staying[1] :] = points(outside, 13 + 2 * step)[staying[1] :]
        f = torch.sin(x[:, :1])
        if rank is not None:
            each = 4 // world
            own = [
                [sum(of[i * each : (i + 1) * each]) for i in range(world)]
                for of in zip(*self.shares, strict=True)
            ]
            x, f = x.split(own[0])[rank], f.split(own[0])[rank]
            y = y.split(own[1])[rank]
        inner, outer = (
            (equation_by_functions, edge_by_functions) if self.functions else (equation, edge)
        )
        return {"equation": Residual(inner, x, f), "edge": Residual(outer, y, weight=3.0)}

    def train(self, world: int, rank: int | None = None) -> dict[str, Any]:
        model, residuals = self.model(), self.residuals(world, rank)
        options = dict(self.options)
        given: nn.Module = model
        if rank is not None and self.wrapped:
            given = nn.parallel.DistributedDataParallel(model)
        elif rank is not None:
            options["process_group"] = torch.distributed.group.WORLD
        optimizer = natgrad.ResidualNGD(given, residuals, **options)
        start, losses, steps = weights(model), [], []
        for step in range(self.steps):
            if self.new_points and (rank is None or 2 * rank >= world):
                for name, one in self.residuals(world, rank, step).items():
                    residuals[name].replace(one.points, one.data)
            losses.append(optimizer.step())
            assert optimizer.last is not None
            steps.append((optimizer.last.trials, optimizer.last.corrections))
        losses.append(optimizer.loss())
        damping = optimizer.param_groups[0]["damping"]
        return {
            "moved": weights(model) - start,
            "losses": torch.tensor(losses, dtype=torch.float64),
            "damping": torch.tensor(damping, dtype=torch.float64),
            "steps": steps,
        }


RUNS: dict[str, Run] = {
    "fewer rows than parameters": Run(wrapped=True),
    "functions": Run(functions=True, steps=2),
    "functions, in chunks": Run(
        {"chunk_size": 11}, ((12, 2), (10, 3), (8, 1), (2, 2)), functions=True, steps=2
    ),
    "more rows than parameters": Run(shares=((20, 2), (11, 3), (8, 1), (2, 2))),
    "many rows in chunks": Run({"chunk_size": 15}, ((20, 2), (11, 3), (8, 1), (2, 2))),
    "no points of a part": Run(shares=((8, 0), (0, 3), (5, 0), (0, 4)), wrapped=True),
    "no points": Run(shares=((0, 0), (0, 0), (9, 3), (6, 2))),
    "no points, in chunks": Run({"chunk_size": 15}, ((0, 0), (0, 0), (40, 3), (21, 5))),
    "no points, functions": Run(shares=((0, 0), (0, 0), (9, 3), (6, 2)), functions=True, steps=2),
    "straight": Run({"acceleration": False}),
    "momentum": Run({"momentum": 0.5}, new_points=True, wrapped=True),
    "momentum, in chunks": Run(
        {"momentum": 0.5, "chunk_size": 15}, ((20, 2), (11, 3), (8, 1), (2, 2))
    ),
    "new points, straight": Run({"acceleration": False, "lr": 0.5}, new_points=True),
    "block-diagonal": Run({"structure": "block_diagonal"}),
    "conjugate gradients": Run(
        {"structure": Full(solver=ConjugateGradient(1e-13, 300)), "chunk_size": 9}, steps=2
    ),
    "kfac": Run({"structure": "kfac"}, wrapped=True),
    "ekfac": Run({"structure": EigenKronecker(max_moment_samples=None)}, steps=2),
    "units": Run({"structure": "unit_wise"}),
}


#: What four processes do, too: every way to add and gather, and shares that two do not have.
IN_FOUR = (
    "fewer rows than parameters", "functions, in chunks", "no points of a part",
    "no points, in chunks", "momentum", "momentum, in chunks", "block-diagonal", "kfac", "ekfac",
    "units",
)  # fmt: skip


def runs(world: int) -> Iterable[str]:
    return IN_FOUR if world == 4 else RUNS


@functools.cache
def alone(name: str) -> dict[str, Any]:
    return RUNS[name].train(1)


def trained(rank: int, world: int) -> dict[str, Any]:
    return {name: RUNS[name].train(world, rank) for name in runs(world)}


@pytest.fixture(scope="module", params=WORLDS)
def of_processes(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return processes.run(trained, request.param, world=request.param)


@pytest.mark.slow
def test_processes_take_the_steps_of_one(of_processes: list[dict[str, Any]]) -> None:
    first, *others = of_processes
    wrong = {}
    for name in runs(len(of_processes)):
        expected = alone(name)
        assert float(expected["moved"].norm()) > 0, name
        for one in of_processes:
            for what in ("moved", "losses", "damping"):
                error = float((one[name][what] - expected[what]).norm() / expected[what].norm())
                if not error <= 1e-10:
                    wrong[name, what] = error
            assert one[name]["steps"] == expected["steps"], name
        assert all(torch.equal(one[name]["moved"], first[name]["moved"]) for one in others), name
    assert not wrong


# -- what goes wrong in one process ----------------------------------------------------------------


def broken(rank: int, world: int) -> dict[str, Any]:
    """The last process has a point that is NaN in the second step."""
    found: dict[Any, Any] = {}
    for chunk_size in (None, 3):
        run = Run()
        model, residuals = run.model(), run.residuals(world, rank)
        optimizer = natgrad.ResidualNGD(
            model, residuals, chunk_size=chunk_size, process_group=torch.distributed.group.WORLD
        )
        lengths, said = [], []
        for step in range(3):
            good = residuals["edge"].points
            if step == 1 and rank == world - 1:
                residuals["edge"].replace(torch.full_like(good, torch.nan))
            before = weights(model)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                optimizer.step()
            said += [str(one.message) for one in caught if "ResidualNGD" in str(one.message)]
            residuals["edge"].replace(good)
            assert optimizer.last is not None
            lengths.append(optimizer.last.length)
            if step == 1:
                found["unmoved", chunk_size] = torch.equal(weights(model), before)
        found["lengths", chunk_size], found["said", chunk_size] = lengths, said
        found["weights", chunk_size] = weights(model)
    return found


def refused(rank: int, world: int) -> dict[str, str]:
    """Processes have other parts or weights, or no points; they go on together afterwards."""
    found, run = {}, Run()
    for what in ("weights", "parts", "points"):
        residuals = run.residuals(world, rank)
        if what == "weights" and rank == 0:
            residuals["edge"].weight = 2.0
        if what == "parts" and rank == 0:
            del residuals["edge"]
        if what == "points":
            residuals["edge"].replace(residuals["edge"].points[:0])
        optimizer = natgrad.ResidualNGD(
            run.model(), residuals, process_group=torch.distributed.group.WORLD
        )
        with pytest.raises(ValueError) as caught:
            optimizer.step()
        found[what] = str(caught.value)
    return found


WIDTH, POINTS = 1500, 48


def holding(rank: int, world: int) -> list[float]:
    """Return how many numbers a step takes beside what is there before: alone, then together."""
    found: list[float] = []
    x = points(POINTS, 1)
    for own in (x, x.chunk(world)[rank]):
        layers = nn.Sequential(nn.Linear(2, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1)).double()
        model = TaylorNetwork(layers)
        group = torch.distributed.group.WORLD if len(own) < len(x) else None
        optimizer = natgrad.ResidualNGD(model, Residual(edge, own), process_group=group)
        with Held() if group else Held(late=0.0) as held:
            before = held.level
            held.most = before + (8 * int(found[0] / world) if group else 0)
            optimizer.step()
        found.append((held.most - before) / 8)
    return found


def in_all(rank: int, world: int) -> dict[str, Any]:
    return {
        "broken": broken(rank, world),
        "refused": refused(rank, world),
        "held": holding(rank, world),
        "adaptive": adaptive(world, rank),
    }


# -- points where they are needed ------------------------------------------------------------------


def planted(u, x, f):
    """Small near the origin, and large elsewhere."""
    return torch.where((x.abs() < 0.2).all(), 0.0, 10.0 + 0.5 * f) + 0.1 * u.value


def adaptive(world: int, rank: int | None = None) -> list[Any]:
    """Return points and which parts got some, step by step."""
    streams = [torch.Generator().manual_seed(rank) for rank in range(world)]

    def draw(count: int) -> tuple[Tensor, Tensor]:
        if rank is not None:
            x = torch.rand(count, 2, generator=streams[rank], dtype=torch.float64)
        else:
            shares = [count // world + (r < count % world) for r in range(world)]
            x = torch.cat(
                [
                    torch.rand(share, 2, generator=stream, dtype=torch.float64)
                    for share, stream in zip(shares, streams, strict=True)
                ]
            )
        return 2 * x - 1, torch.sin(x[:, :1])

    run = Run(shares=((3, 2), (1, 2), (0, 1), (2, 3)))
    model, residuals = run.model(), run.residuals(world, rank)
    inside = residuals["equation"]
    residuals["equation"] = Residual(planted, 0.1 * inside.points, inside.data)
    options: Any = {} if rank is None else {"process_group": torch.distributed.group.WORLD}
    points = AdaptivePoints(
        model, residuals, {"equation": draw}, growth=0.3, most=12,
        generator=torch.Generator().manual_seed(9 + (rank or 0)), **options,
    )  # fmt: skip
    found = []
    for _ in range(5):
        needy = points.update()
        assert residuals["equation"].data is not None
        both = torch.cat([residuals["equation"].points, residuals["equation"].data], 1)
        found.append((needy, both, len(points.held_out["equation"])))
    return found


@pytest.fixture(scope="module", params=WORLDS)
def found(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return processes.run(in_all, request.param, world=request.param)


@pytest.mark.slow
def test_a_residual_that_is_nan_in_one_is_skipped_by_all(found: list[dict[str, Any]]) -> None:
    for one in (each["broken"] for each in found):
        for chunk_size in (None, 3):
            assert one["unmoved", chunk_size] and one["lengths", chunk_size] == [1.0, 0.0, 1.0]
            (said,) = one["said", chunk_size]
            assert "residuals of 'edge' are not finite" in said
            assert torch.equal(
                one["weights", chunk_size], found[0]["broken"]["weights", chunk_size]
            )


@pytest.mark.slow
def test_other_parts_and_weights_are_refused_in_all(found: list[dict[str, Any]]) -> None:
    for one in (each["refused"] for each in found):
        assert "weights differ between processes: [1.0, 2.0], [1.0, 3.0]" in one["weights"]
        assert "same parts in the same order" in one["parts"]
        assert one["points"] == "no points in any process in 'edge'"


@pytest.mark.slow
def test_each_process_holds_its_share_of_the_rows(found: list[dict[str, Any]]) -> None:
    world = len(found)
    for alone, together in (each["held"] for each in found):
        assert together < (1 / world + 0.15) * alone


@pytest.mark.slow
def test_points_are_added_as_one_process_adds_them(found: list[dict[str, Any]]) -> None:
    expected = adaptive(len(found))
    assert [bool(needy) for needy, *_ in expected] == [True, True, True, False, False]
    assert len(expected[-1][1]) == 12  # No more are allowed, so that some made room.
    for step, (needy, points, held_out) in enumerate(expected):
        own = [each["adaptive"][step] for each in found]
        assert all(one[0] == needy for one in own)
        joint = torch.cat([one[1] for one in own])
        assert sorted(joint.tolist()) == sorted(points.tolist())
        assert sum(one[2] for one in own) == held_out


def test_a_part_without_points_is_refused_where_it_is_evaluated() -> None:
    run = Run()
    residuals = run.residuals(1, None)
    residuals["edge"].replace(residuals["edge"].points[:0])
    with pytest.raises(ValueError, match="no points in 'edge'"):
        natgrad.ResidualNGD(run.model(), residuals).step()
    with pytest.raises(ValueError, match="no points in 'edge'"):
        natgrad.ResidualNetwork(run.model(), residuals).loss()
