"""Rows that stay with their processes: products with all of them, and what each holds meanwhile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import natgrad
from natgrad.curvature import Full
from natgrad.curvature.structure import Part
from natgrad.distributed.replicas import Replicas
from natgrad.jacobians import Jacobians
from natgrad.operators.rows import RowsOperator, cross_gram
from natgrad.statistics import RowStatistics
from tests import dense, processes
from tests.cases import normal
from tests.distributed.counting import Held
from tests.distributed.networks import make
from tests.methods import make_optimizer

WORLDS = (2, 3, 4)

#: Samples of each process in two passes; some have none, or less passes.
SAMPLES = (((3, 2), (1, 4), (5, 1), (2, 2)), ((4,), (), (0, 3), (2,)))


def rows_of(seed: int, samples: int) -> tuple[Jacobians, Part]:
    """Return the rows of some samples of a network, two directions each, and what they are of."""
    model = make("mlp")
    with natgrad.Capture(model) as capture:
        blocks = {name: block.layout for name, block in capture.blocks.items()}
        part = Part("all layers", blocks, capture.layout)
        output = model(normal(samples, 5, seed=seed))
        return capture.pull_back(output, normal(2, samples, 3, seed=seed)), part


def passes_of(rank: int, numbers: tuple[int, ...]) -> list[Jacobians]:
    """Return the passes of a process; that of rank 1 does not reach the first layer."""
    found = []
    for number, samples in enumerate(numbers):
        rows, part = rows_of(10 * rank + number, samples)
        found.append(rows.of_blocks(list(rows)[1:], part.layout) if rank == 1 else rows)
    return found


def statistics(rank: int, numbers: tuple[int, ...], limit: int | None) -> RowStatistics | None:
    count, total = torch.tensor(float(sum(numbers)), dtype=torch.float64), None
    for rows in passes_of(rank, numbers):
        one = RowStatistics.of(rows, count / len(numbers), limit)
        total = one if total is None else total.followed_by(one)
    return total


def products(rank: int, world: int) -> list[dict[str, Any]]:
    replicas, results = Replicas(torch.distributed.group.WORLD), []
    _, part = rows_of(0, 1)
    columns = normal(part.layout.numel, 3, seed=7)
    for numbers in SAMPLES:
        own = statistics(rank, numbers[rank], None)
        outlines = replicas.gathered(
            None if own is None else own.outlined_rows(), torch.device("cpu")
        )
        count = replicas.added_up(
            torch.zeros((), dtype=torch.float64) if own is None else own.count
        )
        joint = RowStatistics(count).with_shares(own, outlines, replicas, part)
        operator = Full().operator(part, joint)
        assert isinstance(operator, RowsOperator)
        held = sum(t.numel() for t in joint.tensors())
        weights = normal(joint.number, 2, seed=8)
        results.append(
            {
                "gram": operator.gram,
                "cross": cross_gram(joint.pieces[0][1], joint.pieces[-1][1]),
                "again": operator.gram is RowsOperator(part.layout, joint.pieces, count).gram
                or len(joint.pieces) > 1,
                "dense": operator.to_dense(),
                "diagonal": operator.diagonal(),
                "times": torch.cat([rows.times(columns) for _, rows in joint.pieces]),
                "back": sum(
                    (
                        rows.transposed_times(piece)
                        for (_, rows), piece in zip(
                            joint.pieces,
                            weights.split([rows.rows for _, rows in joint.pieces]),
                            strict=True,
                        )
                    ),
                    torch.zeros(()),
                ),
                "multiply": operator.multiply(columns),
                "solved": operator.inverse(0.1).multiply(columns),
                "finite": bool(joint.is_finite()),
                "held": held,
                "moment": RowStatistics(count, limit=1)
                .with_shares(own, outlines, replicas, part)
                .moment,
            }
        )
        spoilt = None if own is None else own.mapped(lambda t: t)
        if spoilt is not None and rank == 0:
            state = next(iter(spoilt.pieces[0][1].values())).state()
            next(iter(state.values())).flatten()[0] = torch.nan
        broken = RowStatistics(count).with_shares(spoilt, outlines, replicas, part)
        results[-1]["broken"] = bool(broken.is_finite())
    return results


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_products_are_those_with_the_rows_of_all(world: int) -> None:
    each = processes.run(products, world, world=world)
    layout = rows_of(0, 1)[1].layout
    columns = normal(layout.numel, 3, seed=7)
    for case, numbers in enumerate(SAMPLES):
        passes = [passes_of(rank, numbers[rank]) for rank in range(world)]
        pieces = []
        for number in range(max(len(one) for one in passes)):
            own = [one[number] for one in passes if number < len(one) and one[number].rows]
            pieces.append(torch.cat([rows.to_dense() for rows in own]))
        j = torch.cat(pieces)
        count = float(sum(sum(one) for one in numbers[:world]))
        weights = normal(len(j), 2, seed=8)
        f = j.T @ j / count
        expected = {
            "gram": j @ j.T,
            "cross": pieces[0] @ pieces[-1].T,
            "dense": f,
            "diagonal": f.diagonal(),
            "times": j @ columns,
            "back": j.T @ weights,
            "multiply": f @ columns,
            "solved": torch.linalg.solve(f + 0.1 * torch.eye(len(f), dtype=f.dtype), columns),
            "moment": j.T @ j,
        }
        for found in (one[case] for one in each):
            for name, value in expected.items():
                dense.assert_same(found[name], value, 1e-12)
                assert torch.equal(found[name], each[0][case][name]), name
            assert found["again"] and found["finite"] and not found["broken"]
        if case == 0:  # Nobody holds what others have made.
            own = [sum(elements(rows) for rows in one) for one in passes]
            assert [one[case]["held"] - 1 for one in each] == own


def elements(rows: Jacobians) -> int:
    return sum(t.numel() for block in rows.values() for t in block.state().values())


# -- what is held ----------------------------------------------------------------------------------


WIDTH, ROWS = 10000, 48


def training(rank: int) -> dict[str, float]:
    """Return how many shares of a layer's rows are held during a step beside a process's own."""
    found = {}
    for name in ("ExactNGD", "BlockDiagonalNGD", "ImprovedEmpiricalNGD"):
        layers = nn.Sequential(nn.Linear(1, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1)).double()
        model = nn.parallel.DistributedDataParallel(layers)
        kind = getattr(natgrad, name)
        optimizer = make_optimizer(kind, model, likelihood="gaussian", lr=0.1, damping=0.1)
        x = normal(ROWS, 1, seed=rank)
        share = 8 * WIDTH * ROWS
        with Held() as held:
            held.most = 100 * share  # Of what comes before the step nothing is asked.
            (model(x) - x.sin()).square().mean().backward()
            before = held.level
            held.most = before + share
            optimizer.step()
        found[name] = (held.most - before) / share
    return found


@pytest.mark.slow
def test_two_shares_of_a_layer_are_held_beside_ones_own() -> None:
    """The rows of all would be six more shares: those of two layers in three other processes."""
    for found in processes.run(training, world=4):
        for name, shares in found.items():
            assert shares < 3, (name, shares)
