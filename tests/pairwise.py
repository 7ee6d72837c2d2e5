"""Fewer combinations of what does not depend on one another: every pair of values meets."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest


def pairwise(*axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Return combinations of one value per axis in which any two values of two axes meet.

    Two axes keep their full product. Combinations are chosen one after another, each with the
    most pairs that have not met, the first of them in the order of the product.
    """
    values: list[Sequence[Any]] = [list(axis) for axis in axes]
    product = list(itertools.product(*(range(len(axis)) for axis in values)))

    def pairs(combination: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
        return set(itertools.combinations(enumerate(combination), 2))

    left = set().union(*map(pairs, product))
    chosen = []
    while left:
        best = max(product, key=lambda one: len(pairs(one) & left))
        left -= pairs(best)
        chosen.append(best)
    return [tuple(values[axis][i] for axis, i in enumerate(one)) for one in sorted(chosen)]


def parametrize(axes: Mapping[str, Iterable[Any]]) -> pytest.MarkDecorator:
    """Parametrise a test by pairwise combinations of axes, of one argument or some each.

    Args:
        axes: Names of arguments, separated by commas → their values.
    """
    names = [name.split(", ") for name in axes]
    rows: list[list[Any]] = []
    for combination in pairwise(*axes.values()):
        rows.append([])
        for name, value in zip(names, combination, strict=True):
            rows[-1] += value if len(name) > 1 else [value]
    return pytest.mark.parametrize([one for name in names for one in name], rows)
