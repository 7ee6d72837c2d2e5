"""Which inputs are inducing points."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from natgrad.arguments import check_choice, check_integer
from natgrad.capture.evaluation import count_samples, take_samples
from natgrad.ntk import empirical_kernel

#: Samples that are read to choose among, per inducing point.
CANDIDATES_PER_POINT = 20


def choose_inducing_points(
    model: nn.Module,
    batches: Iterable[Any],
    number: int,
    selection: str,
    generator: torch.Generator,
    output: Callable[[Any], Tensor] | None = None,
) -> Any:
    """Return M inducing points chosen from the first ``20 · M`` samples of batches in random order.

    ``"k_means"`` takes the means of M clusters of inputs; ``"random"`` some inputs; ``"greedy"``
    always the sample with the largest variance given those chosen before it, by the tangent kernel
    summed over outputs. There are fewer if there are no more samples, or if others add nothing
    (``"greedy"``). No data, or means of what has none, are a ValueError.
    """
    check_integer("inducing", number)
    check_choice("selection", selection, "k_means", "random", "greedy")
    candidates = _first_samples(batches, CANDIDATES_PER_POINT * number)
    total = count_samples(candidates)
    some = torch.randperm(total, generator=generator)[:number]
    if selection == "random":
        return _at(candidates, some)
    if selection == "greedy":
        kernel = empirical_kernel(model, candidates, outputs="trace", output=output)
        return _at(candidates, _pivots(kernel, number))
    if not (isinstance(candidates, Tensor) and candidates.is_floating_point()):
        raise ValueError(
            "selection='k_means' needs inputs that are one floating-point tensor: use "
            "selection='random' or 'greedy'"
        )
    points = candidates.flatten(1)
    points = points.to(torch.promote_types(points.dtype, torch.float32))
    means = _means(points, some.to(candidates.device)).to(candidates.dtype)
    return means.view(-1, *candidates.shape[1:])


def _first_samples(batches: Iterable[Any], number: int) -> Any:
    found: list[Any] = []
    for inputs in batches:
        found.append(inputs)
        number -= count_samples(inputs)
        if number <= 0:
            break
    if not found:
        raise ValueError("data has no batches")
    first = found[0]
    if isinstance(first, Tensor):
        return torch.cat(found)
    if isinstance(first, Mapping):
        return {key: _joined([one[key] for one in found]) for key in first}
    return tuple(_joined(list(entries)) for entries in zip(*found, strict=True))


def _joined(entries: list[Any]) -> Any:
    return torch.cat(entries) if isinstance(entries[0], Tensor) else entries[0]


def _at(inputs: Any, indices: Tensor) -> Any:
    return take_samples(inputs, cast("slice", indices))


def _means(points: Tensor, start: Tensor, iterations: int = 20) -> Tensor:
    """Return the means of clusters of ``(n, d)`` by Lloyd's algorithm, ``(k, d)``."""
    means = points[start]
    for _ in range(iterations):
        nearest = torch.cdist(points, means).argmin(1)
        sums = torch.zeros_like(means).index_add_(0, nearest, points)
        sizes = torch.bincount(nearest, minlength=len(means)).unsqueeze(1)
        means = torch.where(sizes > 0, sums / sizes.clamp(min=1), means)
    return means


def _pivots(kernel: Tensor, number: int) -> Tensor:
    """Return the pivots of a Cholesky factorisation of ``(n, n)``, largest remainder first."""
    remainder = kernel.diagonal().clone()
    least = len(kernel) * torch.finfo(kernel.dtype).eps * remainder.max()
    factor = kernel.new_zeros(min(number, len(kernel)), len(kernel))
    chosen: list[int] = []
    for row in factor:
        pivot = int(remainder.argmax())
        if chosen and remainder[pivot] <= least:
            break
        done = factor[: len(chosen)]
        row.copy_((kernel[pivot] - done[:, pivot] @ done) * remainder[pivot].rsqrt())
        remainder = remainder - row.square()
        remainder[pivot] = 0.0
        chosen.append(pivot)
    return torch.tensor(chosen, device=kernel.device)
