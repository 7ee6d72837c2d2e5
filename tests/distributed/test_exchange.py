"""Nested values that processes add up or gather, whatever each of them has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_map_only

from natgrad.distributed.exchange import (
    Sum,
    Symmetric,
    gathered,
    packed_triangles,
    unpacked_triangles,
)
from natgrad.distributed.replicas import Place, PlacedGenerator, drawn
from natgrad.jacobians.positions import Draw, random_samples
from natgrad.statistics.triangles import LowerTriangles
from tests import processes
from tests.cases import normal

CPU = torch.device("cpu")


@given(st.integers(1, 9), st.lists(st.integers(1, 3), max_size=2))
def test_triangles_keep_symmetric_matrices(d: int, batch: list[int]) -> None:
    x = normal(*batch, d, d, seed=d)
    symmetric = x + x.mT
    packed = packed_triangles(symmetric.tril() + normal(*batch, d, d).triu(1))
    assert torch.equal(unpacked_triangles(packed, d), symmetric)
    assert packed.shape[-2] * packed.shape[-1] <= (d + 1) * (d + 2) / 2


def values(rank: int) -> list[Any]:
    """Return what a process has: the same as others, more, other numbers of rows, or nothing."""
    square = normal(3, 3, seed=rank)
    return [
        {"a": normal(2, seed=rank), "b": [torch.tensor(rank), 7, "name"]},
        {"a": Symmetric(square + square.T), "b": Symmetric(LowerTriangles.of(square + square.T))},
        {"a": normal(2, seed=rank)} if rank else {"b": normal(3).float()},
        None if rank == 1 else {"c": {"d": normal(4, seed=rank), "kind": "K"}},
        {"large": torch.full((5, 2**20), float(rank)), "small": torch.ones(1)},
        None,
    ]


def rows(rank: int) -> list[Any]:
    return [
        [normal(rank + 1, 2), torch.arange(rank), {"weight": 0.5}],
        None if rank == 0 else {"x": normal(2), "y": torch.ones(1, dtype=torch.float32)},
        {"same": normal(3, seed=rank)},
        {"most": normal(50 if rank == 1 else rank, seed=rank), "number": torch.tensor([rank])},
        normal(9) if rank == 2 else None,
    ]


def on_meta(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


def exchange(rank: int) -> dict[str, Any]:
    known: Any = {}
    found: dict[str, Any] = {"sums": [Sum(v, None, CPU, known).result() for v in values(rank)]}
    small = Sum({"large": torch.ones(2**20), "small": torch.ones(2)}, None, CPU, known).result()
    found["kept"] = small["small"].untyped_storage().nbytes()
    found["rows"] = [gathered(v, None, CPU, known) for v in rows(rank)]
    found["again"] = [gathered(v, None, CPU, known) for v in rows(rank)]
    likes = zip(*(tree_map_only(Tensor, on_meta, rows(other)) for other in range(3)), strict=True)
    found["foreseen"] = [
        gathered(v, None, CPU, {}, like=like) for v, like in zip(rows(rank), likes, strict=True)
    ]
    try:
        Sum(normal(2 + rank), None, CPU, known)
    except ValueError as error:
        found["said"] = str(error)
    return found


@pytest.mark.slow
def test_values_are_added_and_gathered() -> None:
    each = [values(rank) for rank in range(3)]
    for found in processes.run(exchange, world=3):
        plain, symmetric, different, one_less, large, nothing = found["sums"]
        same(plain, {"a": total(v[0]["a"] for v in each), "b": [torch.tensor(3), 7, "name"]})
        squares = total(v[1]["a"].held for v in each)
        assert isinstance(symmetric["b"], LowerTriangles)
        whole = symmetric["b"].matrices()
        same({**symmetric, "b": whole.tril()}, {"a": squares, "b": squares.tril()})
        same(different, {"b": each[0][2]["b"], "a": each[1][2]["a"] + each[2][2]["a"]})
        sums = each[0][3]["c"]["d"] + each[2][3]["c"]["d"]
        same(one_less, {"c": {"d": sums, "kind": "K"}})
        same(large, {"large": torch.full((5, 2**20), 3.0), "small": torch.full((1,), 3.0)})
        assert nothing is None
        for kind in ("rows", "again", "foreseen"):
            for index, one in enumerate(found[kind]):
                same(one, [rows(other)[index] for other in range(3)])
        assert found["kept"] == 8  # Its own bytes, without the message of 4 MiB.
        assert "different shapes or types" in found["said"]


def total(tensors: Any) -> Tensor:
    return torch.stack(list(tensors)).sum(0)


def same(found: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected)
    elif isinstance(expected, dict):
        assert set(found) == set(expected)
        for key, value in expected.items():
            same(found[key], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    else:
        assert found == expected


@given(st.integers(1, 5), st.integers(0, 5), st.integers(0, 5), st.integers(0, 1))
def test_draws_depend_on_the_place_alone(own: int, before: int, after: int, dim: int) -> None:
    def draw(place: Place, samples: int) -> Tensor:
        generator = PlacedGenerator()
        generator.manual_seed(3)
        generator.place = place
        shape = (samples, 4) if dim == 0 else (2, samples, 4)
        dtype = torch.float64
        return drawn(Tensor.normal_, shape, generator, dim=dim, dtype=dtype, device=CPU)

    number = before + own + after
    whole = draw(Place(0, number, number), number)
    part = draw(Place(before, own, number), own)
    assert torch.equal(part, whole.narrow(dim, before, own))


@given(st.integers(1, 6), st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 99))
def test_processes_take_their_parts_of_a_random_subset(
    limit: int, shares: list[int], number: int
) -> None:
    total, taken, before = sum(shares), [], 0
    for samples in shares:
        draw = Draw(number, Place(before, samples, total))
        chosen, weight = random_samples(samples, limit, draw)
        if total <= limit:
            assert chosen is None and weight == 1.0
            chosen = list(range(samples))
        else:
            assert weight == total / limit
        # As many as the share says, to within one.
        assert abs(len(chosen) - samples * min(1.0, limit / total)) < 1
        taken += [before + i for i in chosen]
        before += samples
    assert len(set(taken)) == len(taken) == min(limit, total) and taken == sorted(taken)
    if total > limit:
        assert random_samples(total, limit, Draw(number))[0] == taken


def test_every_sample_is_taken_equally_often() -> None:
    counts = torch.zeros(10)
    for number in range(3000):
        counts[random_samples(10, 4, Draw(number))[0]] += 1
    assert float((counts / 3000 - 0.4).abs().max()) < 5 * (0.4 * 0.6 / 3000) ** 0.5
